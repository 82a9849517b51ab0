"""Where the toolkit's own files are, and where it keeps what it may throw away and make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "demo_checkpoint", "source_root"]

_TOOLKIT = Path(__file__).resolve().parent


def source_root() -> Path:
    """Return the directory that holds the packages: what PYTHONPATH needs, so that a child process imports the same."""
    return _TOOLKIT.parent


def demo_checkpoint() -> Path:
    """Return the directory of the embedded model's fp16 checkpoint."""
    return _TOOLKIT / "demo" / "checkpoint"


def cache_dir(*parts: str) -> Path:
    """Return ``$QVL_CACHE`` (default ``$XDG_CACHE_HOME/qvl`` or ``~/.cache/qvl``) joined with parts. Not created."""
    root = os.environ.get("QVL_CACHE")
    if not root:
        xdg = os.environ.get("XDG_CACHE_HOME")
        root = str((Path(xdg) if xdg else Path.home() / ".cache") / "qvl")
    return Path(root).joinpath(*parts)
