"""LoRA adapters: merged into their base model with peft, written under the base's own tensor names.

peft does the arithmetic. What is done here is what it leaves to its caller: names of older transformers are brought to
today's, each module's rank and alpha are settled by the names that their patterns were written for, a key that is
missing or unknown is an error, and a head that is tied to the embeddings is let go of where one of them is trained.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.config import untied
from toolkit.checkpoint.side_files import TEMPLATES, chat_template
from toolkit.checkpoint.writer import side_files
from toolkit.console import note
from toolkit.errors import CheckpointError
from toolkit.sources.adapter_files import ADAPTER_FILES, BASE, Adapter, check_fit, open_adapter, own_files

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn

__all__ = ["check_adapter", "merge", "transformers_name", "with_side_files"]


def check_adapter(adapter: Path, checkpoint: Checkpoint) -> None:
    """Refuse what is no peft adapter of this model, or not whole, before anything is loaded.

    Raises:
        CheckpointError: names what is missing or does not fit.
    """
    check_fit(open_adapter(adapter), checkpoint)


def merge(checkpoint: Checkpoint, adapter: Path, out: Path, force: bool = False) -> Path:
    """Write ``checkpoint`` with the adapter's weights merged in, and with the tokenizer and processor it brings.

    Host memory holds the whole model once, in the source's dtype.

    Args:
        checkpoint: an fp16/bf16/fp32 Qwen2-VL.
        adapter: a peft adapter directory made for it (LoRA and its kin, with or without ``modules_to_save``).
        out: directory to write; names, dtypes and side files are the base's. A head that was tied and is not any more
            is written on its own.
        force: replace an existing ``out``.

    Raises:
        CheckpointError: the adapter does not fit the model, is not whole, or changes the shape of a tensor.
    """
    opened = open_adapter(adapter)
    check_fit(opened, checkpoint)
    with (
        with_side_files(checkpoint, adapter) as side,
        CheckpointWriter(out, force, source=checkpoint.path, expected_bytes=checkpoint.nbytes) as writer,
    ):
        state = _merged(checkpoint, opened)
        changed = 0
        for name, info in checkpoint.tensors.items():
            source = checkpoint.get(name)
            tensor = _checked(state[transformers_name(checkpoint, name)], info.shape, name, adapter).to(source.dtype)
            _refuse_infinite(tensor, name, adapter)
            changed += not _equal(tensor, source)
            writer.add(name, tensor)
        head, embeddings = (
            state["lm_head.weight"],
            state[f"{checkpoint.family.transformers.language}embed_tokens.weight"],
        )
        config = checkpoint.config
        if checkpoint.tied_lm_head and not _equal(head, embeddings):
            config = untied(config)
            changed += 1
            note(
                "the adapter trained lm_head apart from the embeddings: it becomes a tensor of its own, no longer tied"
            )
            if "lm_head.weight" not in checkpoint.tensors:
                writer.add("lm_head.weight", head)
        if not changed:
            raise CheckpointError(
                f"the adapter {adapter} changes no weight of {checkpoint.path}: was it made for another model?"
            )
        writer.copy_side_files(side)
        writer.set_config(config)
    return out


@contextlib.contextmanager
def with_side_files(checkpoint: Checkpoint, adapter: Path | None) -> Iterator[Path]:
    """Yield a directory with config.json and the side files of a checkpoint, those that an adapter brings in place.

    Without an adapter, or where it brings none that say something else, it is the checkpoint's own.
    """
    own = own_files(adapter, checkpoint.path) if adapter is not None else {}
    if adapter is None or not own:
        yield checkpoint.path
        return
    template, base_template = chat_template(adapter), chat_template(checkpoint.path)
    blind = template is not None and "image" not in template and "image" in (base_template or "")
    with tempfile.TemporaryDirectory(prefix="qvl-adapter-") as directory:
        place = Path(directory)
        for file in [checkpoint.path / "config.json", *side_files(checkpoint.path)]:
            (place / file.relative_to(checkpoint.path)).parent.mkdir(exist_ok=True)
            shutil.copy(file, place / file.relative_to(checkpoint.path))
        if template is not None and template != base_template and not blind:
            for name in TEMPLATES:
                (place / name).unlink(missing_ok=True)
        for name in ADAPTER_FILES:
            if (adapter / name).is_file() and not (blind and name in TEMPLATES):
                shutil.copy(adapter / name, place / name)
        note("with the adapter: " + "; ".join(f"{name}, {what}" for name, what in own.items()))
        if blind:
            note("the adapter's chat template leaves images out: the base's is kept")
        yield place


def _merged(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the state of the base with the adapter merged in, by transformers' names."""
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    import torch
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForImageTextToText

    # "auto" is what config.json says, which may be narrower than what the file holds
    wide = any(info.dtype == "F32" for info in checkpoint.tensors.values())
    base = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype=torch.float32 if wide else "auto")
    before = set(base.state_dict())
    try:
        saved = load_peft_weights(str(adapter.path), device="cpu")
        for name, tensor in saved.items():
            _refuse_infinite(tensor, name, adapter.path)
        if adapter.shapes is None:
            adapter = replace(adapter, shapes={name: tuple(tensor.shape) for name, tensor in saved.items()})
            check_fit(adapter, checkpoint)
        saved = {_today(name, checkpoint): tensor for name, tensor in saved.items()}
        if any("lm_head" in name or "embed_tokens" in name for name in saved) and checkpoint.tied_lm_head:
            # one matrix while it is tied: what is merged into the one would be merged into the other
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone(), requires_grad=False)
            base.config.tie_word_embeddings = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of was looked at, or is an error below
            model = PeftModel(base, _settled(adapter, checkpoint))
            expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            if missing := sorted(expected - saved.keys()):
                raise CheckpointError(f"the adapter {adapter.path} is incomplete: {_first(missing)} is missing")
            _, unknown = set_peft_model_state_dict(model, saved)
            if unknown:
                raise CheckpointError(
                    f"the adapter {adapter.path} does not fit {checkpoint.path}: it has no {_first(sorted(unknown))}"
                )
            merged: nn.Module = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the adapter {adapter.path} does not fit {checkpoint.path}: {reason}") from error
    state = merged.state_dict()
    if set(state) != before:
        raise CheckpointError(f"the adapter {adapter.path} changes the model's modules: merge it with its own trainer")
    return state


def _first(names: list[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} more)" if names[1:] else names[0]


def _settled(adapter: Adapter, checkpoint: Checkpoint) -> PeftConfig:
    """Return peft's config with every module, rank and alpha by its full name of today."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter.path))
    config.inference_mode = True
    settled: dict[str, Any] = {}
    if saved := adapter.config.get("modules_to_save"):
        settled["modules_to_save"] = [_today(name, checkpoint) for name in saved]
    if adapter.lora:
        settled |= _settled_lora(adapter, checkpoint)
    for key, value in settled.items():
        setattr(config, key, value)
    return config


def _settled_lora(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Any]:
    modules = adapter.modules()
    names = {module: _today(module, checkpoint) for module in modules}
    settled: dict[str, Any] = {
        "target_modules": set(names.values()),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = adapter.config.get(pattern) or {}
        found = {
            re.escape(names[module]): value for module in modules if (value := _by_pattern(given, module)) is not None
        }
        settled[pattern] = found
    return settled


def _by_pattern(patterns: Mapping[str, Any], module: str) -> Any:
    """Return what a pattern says of a module: the first that matches its name's end, as in peft."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)


def _today(name: str, checkpoint: Checkpoint) -> str:
    """Return a module's or key's name as transformers 5 has it, from that of any version."""
    prefix = BASE if name.startswith(BASE) else ""
    inner, old, new = name.removeprefix(BASE), checkpoint.family.hub, checkpoint.family.transformers
    if inner.startswith((new.language, new.visual)):
        return name
    if inner.startswith(old.visual):
        return prefix + new.visual + inner.removeprefix(old.visual)
    if inner.startswith(old.language):
        return prefix + new.language + inner.removeprefix(old.language)
    return name


def _checked(tensor: torch.Tensor, shape: tuple[int, ...], name: str, adapter: Path) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"the adapter {adapter} makes {name} {tuple(tensor.shape)} where the base has {shape}: "
            "a resized vocabulary can't be merged into this base"
        )
    return tensor


def _refuse_infinite(tensor: torch.Tensor, name: str, adapter: Path) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CheckpointError(f"the adapter {adapter} makes {name} NaN or infinite: take an earlier save of it")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return torch.equal(a, b)


def transformers_name(checkpoint: Checkpoint, name: str) -> str:
    """Return what transformers 5 calls the tensor that the checkpoint calls ``name``."""
    inside = checkpoint.family.transformers
    for prefix, inner in ((checkpoint.visual_prefix, inside.visual), (checkpoint.language_prefix, inside.language)):
        if name.startswith(prefix):
            return inner + name.removeprefix(prefix)
    return name  # lm_head.weight
