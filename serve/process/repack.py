"""GEMV checkpoints as vLLM can read them: vLLM takes every AWQ checkpoint for GEMM, whatever its config says."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from serve.process.state import locked
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.writer import side_files
from toolkit.console import note
from toolkit.errors import QvlError, ResourceError
from toolkit.files import DIGEST_BYTES, file_digest
from toolkit.formats.convert import convert
from toolkit.paths import cache_dir

__all__ = ["servable"]


def servable(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint itself, or, for a GEMV one, its GEMM twin in the cache, repacked when it is not there yet.

    The twin is found by the content of the checkpoint, tokenizer and processor files included, so a changed one is
    repacked anew. Two servers that start at once repack once: the second waits for the first.

    Raises CheckpointError or FormatError for weights that can't be repacked, ResourceError when the disk is full; a
    twin that is not whole does not appear.
    """
    if checkpoint.quantization is None or checkpoint.quantization.format != "gemv":
        return checkpoint
    key = _key(checkpoint)
    twin = cache_dir("gemm", key)
    with locked(key, "gemm"):
        if not _is_whole(twin):
            note(f"{checkpoint.path} is packed as GEMV, which vLLM can't read: repacking it as GEMM, without loss")
            try:
                convert(checkpoint.path, twin, "gemm", force=True)
            except ResourceError as error:
                raise ResourceError(f"{error} QVL_CACHE names another directory for repacked weights.") from error
            note(f"repacked into {twin}; the next start finds it there")
        else:
            note(f"{checkpoint.path} is packed as GEMV: serving its GEMM twin {twin}")
    return Checkpoint.open(twin)


def _key(checkpoint: Checkpoint) -> str:
    """Return 40 hex digits that change with the checkpoint's config, weights or side files."""
    total = hashlib.blake2b(checkpoint.content_hash().encode(), digest_size=DIGEST_BYTES)
    for file in side_files(checkpoint.path):
        total.update(f"\0{file.relative_to(checkpoint.path)}\0".encode() + file_digest(file))
    return total.hexdigest()


def _is_whole(twin: Path) -> bool:
    with contextlib.suppress(QvlError):
        return Checkpoint.open(twin).quantization is not None
    return False
