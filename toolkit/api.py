"""What a program calls: the verbs that read or write weights, as functions. `toolkit.quantize` has the fifth.

A model is named as on the command line: a directory, a hub id such as ``Qwen/Qwen2-VL-2B-Instruct``, or ``demo``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from toolkit.checkpoint.inspection import Inspection

__all__ = ["convert", "inspect", "merge"]


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Literal["gemm", "gemv", "compressed-tensors"] | None = None,
    *,
    pad_tp: int | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Repack 4-bit weights in another format, bit for bit, or pad a checkpoint so that more GPUs can share it.

    Args:
        model: a directory, a hub id or ``demo``.
        out: directory to write; it appears when it is complete.
        to: format of the result; None keeps the source's.
        pad_tp: number of GPUs that are to share the weights: zeros widen the MLP until they can.
        revision: branch, tag or commit of a hub id.
        force: replace ``out`` if it is a checkpoint.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the source can't be used as it is, or ``out`` can't be taken.
        FormatError: the format is unknown or can't hold the source, padding does not help, or there is nothing to do.
        HubError: the model can't be fetched.
        ResourceError: the disk is full.
    """
    from toolkit.formats.convert import convert as run
    from toolkit.sources.directory import resolve

    return run(resolve(os.fspath(model), revision), Path(out), to, force, pad_tp=pad_tp)


def merge(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Merge a LoRA adapter into its base model, under the base's own tensor names and dtypes.

    Args:
        model: the 16-bit base: a directory, a hub id or ``demo``.
        adapter: a peft adapter directory made for it.
        out: directory to write; it appears when it is complete.
        revision: branch, tag or commit of a hub id.
        force: replace ``out`` if it is a checkpoint.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the base or the adapter can't be used, they don't fit, or ``out`` can't be taken.
        HubError: the model can't be fetched.
        ResourceError: the disk is full.
    """
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.checkpoint.problems import refuse_broken
    from toolkit.sources.adapter import merge as run
    from toolkit.sources.directory import resolve

    base = Checkpoint.open(resolve(os.fspath(model), revision))
    refuse_broken(base)
    return run(base, Path(adapter), Path(out), force)


def inspect(model: str | os.PathLike[str], *, deep: bool = False, revision: str | None = None) -> Inspection:
    """Say what a checkpoint is, what it weighs, which engines run it and what is wrong with it.

    Args:
        model: a directory, a hub id or ``demo``.
        deep: read the values too: NaN, infinity, zero scales. Without it, config and headers alone are read.
        revision: branch, tag or commit of a hub id.

    Returns:
        what was found; ``broken`` says whether a problem keeps engines from running it.

    Raises:
        CheckpointError: the directory can't be opened as a checkpoint at all.
        HubError: the model can't be fetched.
    """
    from toolkit.checkpoint.inspection import inspect_checkpoint
    from toolkit.sources.directory import resolve

    return inspect_checkpoint(resolve(os.fspath(model), revision), deep)
