"""How many tokens an image becomes, by its size: a family's rule, which its image processor follows.

An image is scaled so that both sides are multiples of the square that becomes a token and its pixels lie within bounds;
it is transformers' ``smart_resize`` (``models/qwen2_vl/image_processing_qwen2_vl.py``), which vLLM calls too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["RULES", "ImageRule", "rule_of"]


@dataclass(frozen=True, slots=True)
class ImageRule:
    """Attributes: side in pixels of the square that becomes one token, and bounds of an image's pixels."""

    side: int
    min_pixels: int
    max_pixels: int

    def tokens(self, width: int, height: int) -> int:
        """Return how many tokens an image of so many pixels becomes, without the two that stand around it."""
        side = self.side
        across, down = round(width / side), round(height / side)
        if across * down * side**2 > self.max_pixels:
            scale = math.sqrt(width * height / self.max_pixels)
            across, down = (max(1, math.floor(length / scale / side)) for length in (width, height))
        elif across * down * side**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
            across, down = (math.ceil(length * scale / side) for length in (width, height))
        return across * down


#: By family, with the bounds of the published checkpoints' processors.
RULES: Mapping[str, ImageRule] = MappingProxyType(
    {
        "Qwen2-VL, Qwen2.5-VL": ImageRule(28, 56 * 56, 16384 * 28 * 28),
        "Qwen3-VL": ImageRule(32, 65_536, 16_777_216),
    }
)


def rule_of(directory: Path) -> ImageRule | None:
    """Return the rule of a checkpoint by its preprocessor_config.json; None where that does not say."""
    try:
        found = json.loads((directory / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = found.get("size") or {}
        least = found.get("min_pixels") or size["shortest_edge"]
        most = found.get("max_pixels") or size["longest_edge"]
        return ImageRule(int(found["patch_size"]) * int(found["merge_size"]), int(least), int(most))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
