"""The inner loop of compensated rounding as a Triton kernel: a program walks the columns of a block for a few rows."""

# triton is not installed where there is no GPU, and has no types where it is
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from toolkit.quantize.compensate import BLOCK, Block

__all__ = ["round_block"]

#: Rows of the weight to a program, one to a thread of its only warp: the sum over a block's errors needs no exchange
#: between warps, and the errors fit its registers.
_ROWS = 32


def round_block(block: Block, targets: Tensor, feedback: Tensor, values: Tensor) -> None:
    """Round a block of columns; what :func:`toolkit.quantize.compensate.round_block` does, in one launch."""
    count, rows = targets.shape
    _walk[(triton.cdiv(rows, _ROWS),)](
        targets,
        block.weight,
        feedback,
        block.scales,
        block.zeros,
        block.groups,
        block.channels,
        values,
        rows,
        count,
        feedback.stride(0),
        block.top,
        BLOCK=BLOCK,
        ROWS=_ROWS,
        num_warps=1,
    )


@triton.jit
def _walk(
    targets,
    weight,
    feedback,
    scales,
    zeros,
    groups,
    channels,
    values,
    rows,
    count,
    feedback_stride,
    top,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round ``count`` columns, last first, of ROWS rows; a column of the weight is a row of what the pointers hold."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK)
    errors = tl.zeros((BLOCK, ROWS), tl.float32)
    for step in range(count):
        k = count - 1 - step
        # columns that are not rounded yet have no error: the factor's diagonal and what is left of it add nothing
        part = tl.load(feedback + k * feedback_stride + column, mask=column < count, other=0.0)
        target = tl.load(targets + k * rows + row, mask=inside, other=0.0) + tl.sum(errors * part[:, None], axis=0)
        group = tl.load(groups + k)
        scale = tl.load(scales + group * rows + row, mask=inside, other=1.0)
        zero = tl.load(zeros + group * rows + row, mask=inside, other=0.0)
        level = tl.floor(tl.minimum(tl.maximum(target / scale + zero, 0.0), top * 1.0) + 0.5)
        error = tl.load(weight + k * rows + row, mask=inside, other=0.0) - (level - zero) * scale
        errors = tl.where(column[:, None] == k, error[None, :], errors)
        tl.store(targets + k * rows + row, error, mask=inside)
        tl.store(values + tl.load(channels + k) * rows + row, level.to(tl.uint8), mask=inside)
