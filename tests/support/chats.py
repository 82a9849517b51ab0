"""Chats with all that a model is shown: images of several sizes, several in one, videos of several rates, text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

from toolkit.calibration.inputs import PreparedSample, prepare
from toolkit.calibration.manifest import CalibrationSample
from toolkit.compat import patch_torchvision


def noise(path: Path, width: int, height: int, seed: int = 0) -> str:
    """Write an image of coarse noise, so that windows of it differ; returns its name."""
    rng = random.Random(f"{width} {height} {seed}")
    small = Image.new("RGB", (width // 8 + 1, height // 8 + 1))
    small.putdata(
        [(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(small.width * small.height)]
    )
    name = f"{width}x{height}-{seed}.png"
    small.resize((width, height), Image.Resampling.NEAREST).save(path / name)
    return name


def chats(directory: Path) -> list[CalibrationSample]:
    """Write the media of a text, an image, two images, a slow and a fast video, and a video beside an image."""
    directory.mkdir(parents=True, exist_ok=True)
    frames = [noise(directory, 140, 84, seed) for seed in range(5)]
    strip, wide = (noise(directory, *size) for size in ((90, 400), (300, 200)))
    small = noise(directory, 112, 112)

    def image(name: str) -> dict[str, Any]:
        return {"type": "image", "image": name}

    def video(rate: float) -> dict[str, Any]:
        return {"type": "video", "video": frames, "sample_fps": rate}

    parts: list[list[dict[str, Any]]] = [
        [],
        [image(small)],
        [image(wide), image(strip)],
        [video(0.5)],
        [video(4.0)],
        [video(2.0), image(small)],
    ]
    return [
        CalibrationSample(
            messages=[
                {"role": "user", "content": [*shown, {"type": "text", "text": f"What is in it, {number}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
            ],
            where=f"chat {number}",
            base=directory,
        )
        for number, shown in enumerate(parts)
    ]


def inputs(model: Path, directory: Path) -> list[PreparedSample]:
    """Return `chats` as a model's inputs."""
    patch_torchvision()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    return list(prepare(chats(directory), processor, max_tokens=4096, max_pixels=None))
