"""The values of a checkpoint's floating tensors, read once in the order of the files: NaN, infinity, what 16 bits hold.

Bit patterns are compared, not numbers: without its sign bit, a float orders as an integer does, and everything from
infinity on is infinity or NaN. So a tensor costs one pass over bytes that were read in pieces, at the disk's speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.checkpoint.weights import TensorInfo

__all__ = ["Values", "in_16_bits", "nbytes_in_16_bits", "read_values", "refuse_values"]

#: By dtype: bytes an element takes, the bits of infinity, and those of what becomes infinite as fp16 (65,520, halfway
#: to the next power of two); None where fp16 holds all or the tensor is stored in 16 bits anyway.
_INFINITY = {"F16": (2, 0x7C00, None), "BF16": (2, 0x7F80, None), "F32": (4, 0x7F800000, 0x477FF000)}
_CHUNK = 4 * 2**20
_THREADS = 4
#: Tensors that one message names.
_NAMED = 3


@dataclass(frozen=True)
class Values:
    """What was found in one tensor."""

    tensor: TensorInfo
    #: Values that are NaN or infinite.
    not_finite: int
    #: Whether a finite one is over fp16's range.
    over_fp16: bool


def read_values(checkpoint: Checkpoint) -> Iterator[Values]:
    """Read every tensor of 16 or 32 bit floats, in the order of files and offsets; several at a time.

    Raises:
        CheckpointError: a file can't be read, or was cut short meanwhile.
    """
    tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in _INFINITY]
    tensors.sort(key=lambda tensor: (tensor.file, tensor.offset))
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda tensor: _read(checkpoint, tensor), tensors)


def refuse_values(checkpoint: Checkpoint, on_tensor: Callable[[int], None] | None = None) -> None:
    """Refuse weights that are NaN or infinite, or would be as fp16, in which a quantization writes what was fp32.

    Args:
        checkpoint: with 16 or 32 bit floats.
        on_tensor: called with the number of tensors that were read.

    Raises:
        CheckpointError: names the tensors.
    """
    broken: list[Values] = []
    wide: list[Values] = []
    for count, found in enumerate(read_values(checkpoint), 1):
        if found.not_finite:
            broken.append(found)
        elif found.over_fp16:
            wide.append(found)
        if on_tensor is not None:
            on_tensor(count)
    if broken:
        named = [f"{f.tensor.name} ({f.not_finite:,} of {f.tensor.numel:,} values)" for f in broken]
        raise CheckpointError(
            f"{checkpoint.path} has weights that are NaN or infinite: {_listed(named)}. "
            "Its training diverged or a file is damaged: take an earlier save, or download it again."
        )
    if wide:
        raise CheckpointError(
            f"{checkpoint.path} is fp32 with weights beyond ±65,504, which fp16 does not hold: "
            f"{_listed([f.tensor.name for f in wide])}. Save it as bfloat16 first."
        )


def in_16_bits(tensor: Tensor) -> Tensor:
    """Return a tensor as a quantized checkpoint holds it where it is not packed: fp32 as fp16, the rest as it is."""
    import torch

    return tensor.half() if tensor.dtype == torch.float32 else tensor


def nbytes_in_16_bits(tensor: TensorInfo) -> int:
    """Return the bytes that `in_16_bits` leaves of a tensor."""
    return tensor.nbytes // 2 if tensor.dtype == "F32" else tensor.nbytes


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _read(checkpoint: Checkpoint, tensor: TensorInfo) -> Values:
    import numpy as np

    width, infinity, over = _INFINITY[tensor.dtype]
    words: NDArray[np.unsignedinteger[Any]] = np.empty(_CHUNK // width, np.uint16 if width == 2 else np.uint32)
    start = bad = highest = 0
    while start < tensor.nbytes:
        count = checkpoint.read_into(tensor.name, words.view(np.uint8).data, start)
        found = words[: count // width]
        np.bitwise_and(found, (1 << (8 * width - 1)) - 1, out=found)
        top = int(found.max())
        if top >= infinity:
            broken = found >= infinity
            bad += int(broken.sum())
            top = int(found[~broken].max(initial=0))
        highest = max(highest, top)
        start += count
    return Values(tensor, bad, over is not None and highest >= over)
