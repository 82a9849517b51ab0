"""GEMV checkpoints as vLLM can read them: vLLM takes every AWQ checkpoint for GEMM, whatever its config says."""

from __future__ import annotations

import contextlib
from pathlib import Path

from serve.state import locked
from toolkit.checkpoint import Checkpoint
from toolkit.console import note
from toolkit.errors import QvlError
from toolkit.formats.convert import convert
from toolkit.paths import cache_dir

__all__ = ["servable"]


def servable(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint itself, or, for a GEMV one, its GEMM twin in the cache, repacked when it is not there yet.

    The twin is found by the content of the checkpoint, so a changed one is repacked anew. Two servers that start at
    once repack once: the second waits for the first.

    Raises CheckpointError or FormatError for weights that can't be repacked, ResourceError when the disk is full.
    """
    if checkpoint.quantization is None or checkpoint.quantization.version != "gemv":
        return checkpoint
    key = checkpoint.content_hash()
    twin = cache_dir("gemm", key)
    with locked(key, "gemm"):
        if not _is_whole(twin):
            note(f"{checkpoint.path} is packed as GEMV, which vLLM can't read: repacking it as GEMM, without loss")
            convert(checkpoint.path, twin, "gemm", force=True)
            note(f"repacked into {twin}; the next start finds it there")
        else:
            note(f"{checkpoint.path} is packed as GEMV: serving its GEMM twin {twin}")
    return Checkpoint.open(twin)


def _is_whole(twin: Path) -> bool:
    with contextlib.suppress(QvlError):
        return Checkpoint.open(twin).quantization is not None
    return False
