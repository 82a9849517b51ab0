"""Sizes and counts as people read them."""

from __future__ import annotations

__all__ = ["human_bytes", "human_count"]


def human_bytes(size: float) -> str:
    """Return a size with three digits and a binary unit: 11051712 is "10.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def human_count(number: float) -> str:
    """Return a count with three digits: 8291375616 is "8.29 B"."""
    for unit, size in ((" B", 1e9), (" M", 1e6), (" K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
