"""The embedded model cut down to its first layers: real weights and processor, seconds to quantize."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.paths import demo_checkpoint

#: The halved decoder's config: of 4 heads two stay, of two for keys and values one.
HALF = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}


def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the first half of each of a tensor's dimensions that the decoder's width is in."""
    if name.startswith("visual."):
        return tensor[:128].contiguous() if name.startswith("visual.merger.mlp.2.") else tensor
    kept = [slice(None) if size == 1024 else slice(size // 2) for size in tensor.shape]  # the vocabulary stays
    return tensor[tuple(kept)].contiguous()


def short_demo(out: Path, layers: int = 1, blocks: int | None = None, halved: bool = False, **config: Any) -> Path:
    """Write the embedded model with ``layers`` decoder layers to ``out``; ``config`` overrides its config.

    ``blocks``: of the vision tower; None for all. ``halved``: the decoder has half its width, which is no good model,
    and takes half the time.
    """
    source = Checkpoint.open(demo_checkpoint())
    vision = dict(source.config["vision_config"])
    if blocks is not None:
        vision["depth"] = blocks
    if halved:
        vision["hidden_size"] = HALF["hidden_size"]
        config = HALF | config
    config = {"vision_config": vision} | config
    limits = {source.layers_prefix: layers, f"{source.visual_prefix}blocks.": blocks or source.vision.depth}
    with CheckpointWriter(out) as writer:
        for name in source.tensors:
            if all(not name.startswith(before) or int(name[len(before)]) < most for before, most in limits.items()):
                writer.add(name, half(name, source.get(name)) if halved else source.get(name))
        writer.copy_side_files(source.path)
        writer.set_config({**source.config, "num_hidden_layers": layers, "max_window_layers": layers, **config})
    return out


def calibration(directory: Path, samples: int = 4) -> Path:
    """Write a manifest of small images with questions and answers, of several sizes, and one text-only chat."""
    rng = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "What colour is the sky?"}]}]
    for i in range(samples - 1):
        size = (rng.choice([112, 168]), rng.choice([112, 140]))
        image = Image.new("RGB", size, (240, 240, 240))
        ImageDraw.Draw(image).ellipse((20, 20, 90, 90), fill=rng.choice(["red", "green", "blue"]))
        image.save(directory / f"{i}.png")
        content = [{"type": "image_url", "image_url": {"url": f"{i}.png"}}, {"type": "text", "text": "Which shape?"}]
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "circle"}]})
    path = directory / "calib.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
