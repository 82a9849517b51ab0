"""Requests for speed runs: every picture and prompt is new to the server, so that no cache answers for the model."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bench.client import ChatRequest
from toolkit.errors import BenchError

__all__ = ["ImageSize", "SpeedInputs", "parse_sizes"]

#: Width, height in pixels; None means a request without a picture.
ImageSize = tuple[int, int] | None

TEXT = "text"
PIXELS_MAX = 4096


def parse_sizes(text: str) -> tuple[ImageSize, ...]:
    """Read ``224x224,336x252`` (width x height); ``text`` stands for requests without a picture.

    Raises:
        BenchError: on anything else.
    """
    sizes: list[ImageSize] = []
    for part in text.split(","):
        part = part.strip().lower()
        if part == TEXT:
            sizes.append(None)
            continue
        width, cross, height = part.partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise BenchError(f"image size {part!r}: write WIDTHxHEIGHT in pixels, e.g. 448x448, or text")
        size = int(width), int(height)
        if not all(28 <= side <= PIXELS_MAX for side in size):
            raise BenchError(f"image size {part}: each side must be between 28 and {PIXELS_MAX} pixels")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


@dataclass(frozen=True, slots=True)
class SpeedInputs:
    """Makes the requests of a run.

    Attributes:
        nonce: different in every run: a server that outlives one run may have cached its pictures.
        sizes: requests go through them in turn.
        output_tokens: exact length of each answer.
    """

    nonce: str
    sizes: tuple[ImageSize, ...]
    output_tokens: int

    def request(self, block: str, index: int) -> ChatRequest:
        """Return request ``index`` of ``block``; equal arguments give equal bytes, any other argument other bytes.

        Blocks have disjoint inputs, so that a warm-up block warms no input of a measured one.
        """
        key = hashlib.sha256(f"{self.nonce}/{block}/{index}".encode()).hexdigest()
        size = self.sizes[index % len(self.sizes)]
        if size is None:
            # The unique part comes first: a prefix cache matches from the left.
            return ChatRequest(f"Note {key[:16]}. Describe it.", (), self.output_tokens, fixed_length=True)
        picture = f"data:image/jpeg;base64,{base64.b64encode(_noise(int(key[:15], 16), size)).decode()}"
        return ChatRequest(f"Picture {key[:16]}. Describe it.", (picture,), self.output_tokens, fixed_length=True)

    def bodies(self, block: str, count: int, model: str) -> list[bytes]:
        """Return the encoded bodies of the first ``count`` requests of ``block``."""
        return [self.request(block, index).body(model) for index in range(count)]


def _noise(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG of smooth colour noise. What a picture shows does not change its cost; its size and novelty do."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 14), max(2, width // 14), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
