"""LoRA adapters: merged into their base model with peft, written under the base's own tensor names."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.errors import CheckpointError

__all__ = ["check_adapter", "merge"]


def check_adapter(adapter: Path) -> None:
    """Refuse what is no peft adapter directory before anything is loaded.

    Raises:
        CheckpointError: names what is missing.
    """
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise CheckpointError(f"{adapter} is no LoRA adapter: it has no adapter_config.json")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON ({error})") from None
    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise CheckpointError(f"{adapter} has no adapter_model.safetensors: is the download complete?")


def merge(checkpoint: Checkpoint, adapter: Path, out: Path, force: bool = False) -> Path:
    """Write ``checkpoint`` with the adapter's weights merged in.

    Host memory holds the whole model once, in the source's dtype.

    Args:
        checkpoint: an fp16/bf16/fp32 Qwen2-VL.
        adapter: a peft adapter directory made for it (LoRA and its kin, with or without ``modules_to_save``).
        out: directory to write; names, dtypes and side files are the base's.
        force: replace an existing ``out``.

    Raises:
        CheckpointError: the adapter does not fit the model, or changes the shape of a tensor.
    """
    check_adapter(adapter)
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    with CheckpointWriter(out, force, source=checkpoint.path, expected_bytes=checkpoint.nbytes) as writer:
        base = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype="auto")
        before = set(base.state_dict())
        try:
            merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"the adapter {adapter} does not fit {checkpoint.path}: {reason}") from error
        state = merged.state_dict()
        if set(state) != before:
            raise CheckpointError(f"the adapter {adapter} changes the model's modules: merge it with its own trainer")
        changed = 0
        for name, info in checkpoint.tensors.items():
            source = checkpoint.get(name)
            tensor: torch.Tensor = state[_transformers_name(checkpoint, name)]
            if tuple(tensor.shape) != info.shape:
                raise CheckpointError(
                    f"the adapter {adapter} makes {name} {tuple(tensor.shape)} where the base has {info.shape}: "
                    "a resized vocabulary can't be merged into this base"
                )
            tensor = tensor.to(source.dtype)
            changed += not torch.equal(tensor, source)
            writer.add(name, tensor)
        if not changed:
            raise CheckpointError(
                f"the adapter {adapter} changes no weight of {checkpoint.path}: was it made for another model?"
            )
        writer.copy_side_files(checkpoint.path)
        writer.set_config(checkpoint.config)
    return out


def _transformers_name(checkpoint: Checkpoint, name: str) -> str:
    """Return what transformers 5 calls the tensor that the checkpoint calls ``name``."""
    inside = checkpoint.family.transformers
    for prefix, inner in ((checkpoint.visual_prefix, inside.visual), (checkpoint.language_prefix, inside.language)):
        if name.startswith(prefix):
            return inner + name.removeprefix(prefix)
    return name  # lm_head.weight
