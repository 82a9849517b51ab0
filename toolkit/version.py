"""Which version this is: pyproject.toml says it, and the installed package repeats it."""

from __future__ import annotations

from importlib import metadata

__all__ = ["__version__"]

try:
    __version__ = metadata.version("qvl")
except metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "unknown"
