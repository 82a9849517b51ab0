"""The inner loop of compensated rounding as a Triton kernel: a program walks the columns of a block for a few rows.

A warp holds ROWS rows, a thread one of them. Rounding a column waits for the one after it, so what counts is how little
lies between two: the columns of a sub-block and their errors stay in the thread's registers, all that they need is
loaded before, and the errors of the sub-blocks after it come in by one small product each.
"""

# triton is not installed where there is no GPU, and has no types where it is; its tuples grow by addition only
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.quantize.search.kernels.rounding import Rounding

__all__ = ["BLOCK", "SUB_BLOCK", "round_block"]

#: Columns to a launch: with fewer a narrow weight's time goes into launches, and with more into feeding forward here
#: what one large product feeds faster.
BLOCK = 256
#: Columns that a thread holds; the least that a product of tensor cores takes. Divides the columns of a weight.
SUB_BLOCK = 16
#: Rows of the weight to a program, one to a thread of its only warp.
_ROWS = 32


def round_block(
    rounding: Rounding, start: int, targets: Tensor, feedback: Tensor, precision: str | None = None
) -> None:
    """Round a block of columns; what :func:`toolkit.quantize.search.compensate.round_block` does, in one launch.

    For float32, and a multiple of SUB_BLOCK columns. Feeds forward in ``precision``, as Triton names it; None: in TF32
    where torch's own products may be.
    """
    if precision is None:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    count, rows = targets.shape
    _walk[(triton.cdiv(rows, _ROWS),)](
        targets,
        feedback,
        rounding.weight,
        rounding.scales,
        rounding.zeros,
        rounding.channels,
        rounding.groups,
        rounding.values,
        start,
        count,
        rows,
        feedback.stride(0),
        rounding.weight.stride(0),
        rounding.weight.stride(1),
        rounding.top,
        SUB_BLOCK=SUB_BLOCK,
        ROWS=_ROWS,
        PRECISION=precision,
        num_warps=1,
    )


@triton.jit
def _walk(
    targets,
    feedback,
    weight,
    scales,
    zeros,
    channels,
    groups,
    values,
    start,
    count,
    rows,
    feedback_stride,
    channel_stride,
    row_stride,
    top,
    SUB_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Round ``count`` columns, last first, of ROWS rows; a column of the weight is a row of what the pointers hold."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, SUB_BLOCK)
    tile = column[:, None] * rows + row[None, :]
    for part in range(count // SUB_BLOCK):
        first = count - (part + 1) * SUB_BLOCK
        # loaded here and used after the products, which take as long as the loads
        weights, steps, offsets = (), (), ()
        for k in tl.static_range(SUB_BLOCK):
            group = tl.load(groups + start + first + k) * rows + row
            entry = tl.load(channels + start + first + k) * channel_stride + row * row_stride
            steps = steps + (tl.load(scales + group, mask=inside, other=1.0),)
            offsets = offsets + (tl.load(zeros + group, mask=inside, other=0.0),)
            # a strided access, whose lines would drive all others out of the first cache
            weights = weights + (tl.load(weight + entry, mask=inside, other=0.0, cache_modifier=".cg"),)

        block = targets + first * rows
        factors = feedback + first * feedback_stride
        total = tl.load(block + tile, mask=inside[None, :], other=0.0)
        for later in range(first + SUB_BLOCK, count, SUB_BLOCK):
            part_factors = tl.load(factors + column[:, None] * feedback_stride + later + column[None, :])
            errors = tl.load(targets + later * rows + tile, mask=inside[None, :], other=0.0)
            total = tl.dot(part_factors, errors, total, input_precision=PRECISION)
        # through memory, from the product's layout to a row a thread
        tl.store(block + tile, total, mask=inside[None, :])
        tl.debug_barrier()
        remaining = ()
        for k in tl.static_range(SUB_BLOCK):
            remaining = remaining + (tl.load(block + k * rows + row, mask=inside, other=0.0),)

        found, levels = (), ()  # of the last column first
        for k in tl.static_range(SUB_BLOCK - 1, -1, -1):
            level = tl.minimum(tl.maximum(remaining[k] * (1.0 / steps[k]) + offsets[k], 0.0), top * 1.0)
            level = (level + 8388608.0) - 8388608.0  # to the nearest integer: beyond 2^23 float32 holds no others
            error = (weights[k] + offsets[k] * steps[k]) - level * steps[k]
            found = found + (error,)
            levels = levels + (level,)
            remaining = _feed(remaining, error, factors + first + k, feedback_stride, k)
        for k in tl.static_range(SUB_BLOCK):
            position = first + SUB_BLOCK - 1 - k
            tl.store(targets + position * rows + row, found[k], mask=inside)
            channel = tl.load(channels + start + position)
            tl.store(values + channel * rows + row, levels[k].to(tl.uint8), mask=inside)
        tl.debug_barrier()  # the next products read what other threads have stored


@triton.jit
def _feed(remaining, error, factors, stride, COUNT: tl.constexpr):
    """Return the first COUNT targets with a column's error fed to them."""
    fed = ()
    for k in tl.static_range(COUNT):
        fed = fed + (remaining[k] + error * tl.load(factors + k * stride),)
    return fed
