"""The clip search as a Triton kernel: a program reads a group of some rows once and tries all bounds on it."""

# triton is not installed where there is no GPU, and has no types where it is
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["best_clip"]

#: Rows of the weight to a program, the least that Hopper's products take. With groups of 128 it takes 96 KiB of shared
#: memory, which every GPU that multiplies in TF32 has.
_ROWS = 64


def best_clip(weight: Tensor, moments: Tensor, bits: int, grid: int, tried: int, min_range: float) -> Tensor:
    """Find each group's bound, as :func:`toolkit.quantize.search.clips.best_clip` does; losses are taken in TF32.

    Args:
        weight: [N, K], any float dtype and strides.
        moments: [K/g, g, g] float32, contiguous and symmetric; g is 32, 64 or 128.
        bits: width of a value.
        grid, tried: bounds are max |w| x (1 - i/grid) for i < tried.
        min_range: smallest range of a group.

    Returns:
        [N, K/g, 1] float32, the bounds.
    """
    groups, group, _ = moments.shape
    rows = weight.shape[0]
    bounds = torch.empty((rows, groups, 1), dtype=torch.float32, device=weight.device)
    _search[(groups, triton.cdiv(rows, _ROWS))](
        weight,
        moments,
        bounds,
        rows,
        groups,
        weight.stride(0),
        weight.stride(1),
        grid,
        tried,
        TOP=2.0**bits - 1,
        MIN_RANGE=min_range,
        GROUP=group,
        ROWS=_ROWS,
        num_warps=4,
    )
    return bounds


@triton.jit
def _search(
    weight,
    moments,
    bounds,
    rows,
    groups,
    row_stride,
    column_stride,
    steps,
    tried,
    TOP: tl.constexpr,
    MIN_RANGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Find the bounds of a group of ROWS rows."""
    group = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, GROUP)
    entry = row[:, None].to(tl.int64) * row_stride + (group * GROUP + column)[None, :] * column_stride
    w = tl.load(weight + entry, mask=inside[:, None], other=0.0).to(tl.float32)
    # symmetric, so transposed at no cost into the order that a TF32 product takes its second factor in
    h = tl.load(moments + group * GROUP * GROUP + column[None, :] * GROUP + column[:, None])

    widest = tl.max(tl.abs(w), axis=1)

    # adds nothing but leaves w laid out as products are: else every bound's errors would change layout twice
    w = tl.dot(tl.zeros_like(w), h, w, input_precision="tf32")
    lowest, highest = tl.min(w, axis=1), tl.max(w, axis=1)
    best = tl.full((ROWS,), 1.0, tl.float32)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for i in range(tried):
        share = tl.div_rn((steps - i) * 1.0, steps * 1.0)
        bound = tl.maximum(-lowest, highest) * share
        # the range of clipped weights, with 0 in it
        low = tl.minimum(tl.maximum(lowest, -bound), 0.0)
        high = tl.maximum(tl.minimum(highest, bound), 0.0)
        step = tl.minimum(tl.div_rn(tl.maximum(high - low, MIN_RANGE), TOP), 65504.0).to(tl.float16).to(tl.float32)
        zero = tl.minimum(tl.maximum(-_round(tl.div_rn(low, step)), 0.0), TOP)
        clipped = tl.minimum(tl.maximum(w, -bound[:, None]), bound[:, None])
        level = tl.minimum(tl.maximum(clipped * (1.0 / step)[:, None], -zero[:, None]), (TOP - zero)[:, None])
        error = _round(level) * step[:, None] - w
        loss = tl.sum(tl.dot(error, h, input_precision="tf32") * error, axis=1)
        better = loss < least
        least = tl.where(better, loss, least)
        best = tl.where(better, share, best)
    tl.store(bounds + row * groups + group, widest * best, mask=inside)


@triton.jit
def _round(x):
    """Return the nearest integer, the even one of two, for |x| < 2^22: from 2^23 on float32 holds no others."""
    return (x + 12582912.0) - 12582912.0
