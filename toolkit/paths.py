"""Where the toolkit keeps what it may throw away and make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir(*parts: str) -> Path:
    """Return ``$QVL_CACHE`` (default ``$XDG_CACHE_HOME/qvl`` or ``~/.cache/qvl``) joined with parts. Not created."""
    root = os.environ.get("QVL_CACHE")
    if not root:
        xdg = os.environ.get("XDG_CACHE_HOME")
        root = str((Path(xdg) if xdg else Path.home() / ".cache") / "qvl")
    return Path(root).joinpath(*parts)
