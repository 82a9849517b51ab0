"""Models and calibration data of the benchmark, made once and kept in its work directory."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.studies.quantizer.settings import Settings
from toolkit.files import write_whole

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2VLProcessor

    from toolkit.calibration.inputs import PreparedSample

__all__ = ["image_manifest", "padded_batch", "prepared", "random_model", "text_manifest", "with_channels"]

#: Width and height of the calibration images, in twenty-eighths of the side they are to have on average.
_ASPECTS = ((16, 16), (20, 14), (14, 18), (12, 24), (18, 16))


def random_model(settings: Settings, shape: str, layers: int | None = None, *, channels: bool = False) -> Path:
    """Return a checkpoint of a shape with random weights, made if it is not there yet.

    Args:
        settings: of the run; ``tiny`` gives the embedded model, whatever the shape.
        shape: ``2b``, ``7b`` or ``72b``.
        layers: decoder layers; None: the shape's own.
        channels: give it channels that differ in size, see :func:`with_channels`.
    """
    from toolkit.paths import demo_checkpoint

    if settings.tiny and not channels:
        return demo_checkpoint()
    name = "demo" if settings.tiny else f"{shape}-{layers or 'all'}"
    path = settings.work / "models" / (name + ("-channels" if channels else ""))
    if path.is_dir():
        return path
    if channels:
        plain = random_model(settings, shape, layers)
        with_channels(plain, path)
        if not settings.tiny:
            shutil.rmtree(plain)  # a few GB
        return path
    import torch

    from toolkit.sources.random_model import write_random_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Path(settings.tokenizer) if settings.tokenizer else None
    return write_random_model(shape, path, layers=layers, tokenizer=tokenizer, device=device)


def with_channels(source: Path, out: Path, seed: int = 0) -> Path:
    """Copy a checkpoint with channels made to differ in size, as a trained model's do and random weights do not.

    Norm weights are multiplied by exp(0.8 z), rows of ``up_proj`` by exp(0.7 z) and columns of the embedding by
    exp(0.5 z), z normal: without outlier channels there is nothing for AWQ's scales to do.
    """
    import torch

    from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter

    checkpoint = Checkpoint.open(source)
    rng = torch.Generator().manual_seed(seed)

    def spread(size: int, strength: float) -> torch.Tensor:
        return torch.randn(size, generator=rng).mul_(strength).exp_()

    with CheckpointWriter(out, source=source) as writer:
        for name in sorted(checkpoint.tensors):
            tensor = checkpoint.get(name)
            if name.startswith(checkpoint.layers_prefix) and name.endswith("layernorm.weight"):
                tensor = (tensor.float() * spread(len(tensor), 0.8)).to(tensor.dtype)
            elif name.startswith(checkpoint.layers_prefix) and name.endswith("up_proj.weight"):
                tensor = tensor * spread(len(tensor), 0.7)[:, None].to(tensor.dtype)
            elif name == f"{checkpoint.language_prefix}embed_tokens.weight":
                tensor = tensor * spread(tensor.shape[1], 0.5).to(tensor.dtype)
            writer.add(name, tensor)
        writer.set_config(checkpoint.config)
        writer.copy_side_files(source)
    return out


def text_manifest(settings: Settings, model: Path, samples: int, seed: int) -> Path:
    """Return a manifest of random words whose chats have ``settings.tokens`` tokens each, made if it is not there yet.

    Only words that are one token of the model's vocabulary are drawn; one more or less then makes the count fit.
    """
    path = settings.work / f"text-{model.name}-{samples}-{seed}.jsonl"
    if path.is_file():
        return path
    processor = _processor(model)
    words = sorted(word[1:] for word in processor.tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{2,}", word))
    rng = random.Random(f"text/{seed}")

    def count(text: str) -> int:
        chat = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        return len(processor.tokenizer(processor.apply_chat_template(chat, tokenize=False))["input_ids"])

    rows = []
    for _ in range(samples):
        drawn = rng.choices(words, k=settings.tokens)
        for _ in range(8):
            extra = count(" ".join(drawn)) - settings.tokens
            if extra == 0:
                break
            drawn = drawn[:-extra] if extra > 0 else drawn + rng.choices(words, k=-extra)
        rows.append({"text": " ".join(drawn)})
    _write(path, rows)
    return path


def image_manifest(settings: Settings, samples: int) -> Path:
    """Return a manifest of the embedded model's calibration chats, their images enlarged; made if not there yet."""
    directory = settings.work / f"images-{settings.image_size}-{samples}"
    path = directory / "calib.jsonl"
    if path.is_file():
        return path
    from PIL import Image

    from toolkit.tasks.manifests import write_calibration

    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_calibration(part, samples)
    unit = settings.image_size / 16
    for index, file in enumerate(sorted((part / "images").iterdir())):
        across, down = _ASPECTS[index % len(_ASPECTS)]
        with Image.open(file) as image:
            large = image.convert("RGB").resize((round(across * unit), round(down * unit)))
        large.save(file, compress_level=1)
    part.rename(directory)
    return path


def prepared(model: Path, manifest: Path, samples: int | None = None) -> list[PreparedSample]:
    """Return a manifest's samples as the quantizer makes them into model inputs."""
    from toolkit.calibration.inputs import prepare
    from toolkit.calibration.manifest import read_manifest

    chats = read_manifest(manifest, samples)
    return list(prepare(chats, _processor(model), max_tokens=10**6, max_pixels=None))


def padded_batch(samples: Sequence[PreparedSample], pad: int) -> dict[str, torch.Tensor]:
    """Join samples of B different lengths to one batch, padded on the left, as a processor does with ``padding=True``.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 [B, T], T the longest; ``pixel_values`` and ``image_grid_thw`` of all
        samples in a row, if any sample has images.
    """
    import torch

    longest = max(sample.tokens for sample in samples)

    def padded(ids: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(ids, (longest - ids.shape[1], 0), value=fill)

    batch = {
        "input_ids": torch.cat([padded(s.inputs["input_ids"], pad) for s in samples]),
        "attention_mask": torch.cat([padded(torch.ones_like(s.inputs["input_ids"]), 0) for s in samples]),
    }
    for name in ("pixel_values", "image_grid_thw"):
        found = [sample.inputs[name] for sample in samples if name in sample.inputs]
        if found:
            batch[name] = torch.cat(found)
    return batch


def _processor(model: Path) -> Qwen2VLProcessor:
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
