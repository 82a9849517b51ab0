"""The embedded Qwen2-VL: small, trained, and so able to lose quality."""

from __future__ import annotations

from pathlib import Path

__all__ = ["checkpoint_dir"]


def checkpoint_dir() -> Path:
    """Return the directory of the embedded model's fp16 checkpoint."""
    return Path(__file__).parent / "checkpoint"
