"""Compensated rounding: each column's rounding error is made up for by the columns that are rounded after it.

GPTQ's update (Frantar et al., arXiv 2210.17323) on a grid that is chosen already, so the file stays plain AWQ; in the
form that QuIP (Chee et al., arXiv 2307.13304, "LDLQ") proves equal to GPTQ's and that needs no inverse. Let E = W - Q
be the error of a weight [N, K], H = X^T X / n the moments of its inputs and H = L L^T with L lower triangular. The
error of the output is

    tr(E H E^T) = |E L|^2 = sum over k of L_kk^2 |r_k|^2    with    r_k = E_k + sum over i > k of E_i L_ik / L_kk

so once the columns i > k are rounded, column k is best rounded from W_k + sum over i > k of E_i L_ik / L_kk, and r_k is
what that leaves. Columns are rounded from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from toolkit.quantize.search.kernels.rounding import Rounding
from toolkit.quantize.search.kernels.trust import trusted

__all__ = ["BLOCK", "Factor", "compensate", "factor", "feed_forward", "round_block", "round_by_columns"]

#: Columns that are rounded at a time where there is no kernel for it.
BLOCK = 128
#: How often the damping is raised, tenfold, before the moments are given up.
_RAISES = 6


@dataclass(frozen=True)
class Factor:
    """What :func:`compensate` has to know of a linear's inputs; serves all linears that share them.

    ``feedback``: [K, K], unit upper triangular: entry (k, i) is L_ik / L_kk, how much of column i's error column k
    makes up for. ``order``: int64 [K], the channels by rising second moment; ``feedback`` is in this order, and the
    last is rounded first. ``pivots``: [K], L_kk. ``damping``: scalar, what H's diagonal was raised by.
    """

    feedback: Tensor
    order: Tensor
    pivots: Tensor
    damping: Tensor


@torch.no_grad()
def factor(moments: Tensor, tokens: float) -> Factor:
    """Factor the moments of a linear's inputs.

    H's diagonal is damped by K / tokens of its mean: few tokens show the moments of few directions well, and what is
    made up for by chance costs elsewhere. GPTQ's constant 0.01 suits some 50 tokens a channel; with two, as wide layers
    may have, the rounding it gives is worse than plain rounding on other tokens.

    The channels with the largest moments are rounded first, while all others can still make up for their error: GPTQ's
    act-order. Every column keeps its own group's grid, so the file does not show it.

    Holds one [K, K] besides ``moments``: the one returned.

    Args:
        moments: H, float32 [K, K], symmetric; not changed.
        tokens: how many the moments are the mean of; for a weighted mean (sum of weights)^2 / (sum of squared weights).

    Raises:
        ArithmeticError: the moments are not finite, or have large negative eigenvalues.
    """
    order = moments.diagonal().argsort(stable=True)
    feedback = torch.empty_like(moments, memory_format=torch.contiguous_format)
    lower = feedback.mT  # column-major, as LAPACK and cuSOLVER want it: the factor is made in place
    info = torch.empty((), dtype=torch.int32, device=moments.device)
    damping = (len(order) / tokens * moments.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(_RAISES + 1):
        for start in range(0, len(order), BLOCK):  # by blocks, since permuting at once would hold another [K, K]
            feedback[start : start + BLOCK] = moments[order[start : start + BLOCK]][:, order]
        feedback.diagonal().add_(damping)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        pivots = feedback.diagonal().clone()
        if info.item() == 0 and bool(pivots.isfinite().all()):
            return Factor(feedback.div_(pivots.unsqueeze(1)), order, pivots, damping)
        damping *= 10
    raise ArithmeticError(
        f"the moments of {len(order)} inputs can't be factored: not finite, or far from a Gram matrix"
    )


@torch.no_grad()
def compensate(weight: Tensor, scales: Tensor, zeros: Tensor, factor: Factor, bits: int = 4) -> Tensor:
    """Round a weight to a given grid, greedily minimising the error of the linear's output, tr(E H E^T).

    Rows don't depend on each other. Holds one float and two uint8 [N, K] besides ``weight``.

    Args:
        weight: float32 [N, K], scaled by AWQ but not clipped: what a clipped grid cuts off is made up for too.
        scales: float16 [N, K/g], as :func:`toolkit.quantize.search.grid.round_to_grid` returns them.
        zeros: uint8 [N, K/g], likewise.
        factor: of the moments of the K inputs.
        bits: width of a value.

    Returns:
        values, uint8 [N, K] in 0..2^bits-1; the weight they stand for is (value - zero) x scale.
    """
    return _compensate(weight, scales, zeros, factor, bits, _rounder(weight))


Rounder = Callable[["Rounding", int, Tensor, Tensor], None]


def _compensate(
    weight: Tensor, scales: Tensor, zeros: Tensor, factor: Factor, bits: int, way: tuple[int, Rounder]
) -> Tensor:
    """Round a weight in one of the ways that :func:`_rounder` chooses from."""
    rounding = Rounding.of(weight, scales, zeros, factor.order, bits)
    round_by_columns(rounding, weight.t()[factor.order], factor.feedback, way)
    return rounding.values.t().contiguous()


def round_by_columns(
    rounding: Rounding, targets: Tensor, feedback: Tensor, way: tuple[int, Rounder] | None = None
) -> None:
    """Round all columns from the last to the first, each error fed to the columns before; writes the values.

    Args:
        rounding: what is rounded, and to what.
        targets: [K, N], what each column is best rounded from, but for that; becomes their errors.
        feedback: [K, K], in the order of ``rounding``: how much of column i's error column k < i makes up for.
        way: columns at a time, and what rounds them; None: what is fastest on the device.
    """
    width, rounder = _rounder(rounding.weight.t()) if way is None else way
    feed_forward(targets, feedback, width, partial(rounder, rounding))


def feed_forward(
    targets: Tensor, feedback: Tensor, width: int, round_columns: Callable[[int, Tensor, Tensor], None], start: int = 0
) -> None:
    """Round columns from the last to the first, ``width`` at a time, and feed their errors to those before.

    By halves: the errors of the second half go to the first in one product.

    Args:
        targets: [C, N], columns as rows; becomes their errors.
        feedback: [C, C], of these columns.
        width: columns that ``round_columns`` is given at most.
        round_columns: called with the position of a block, its targets and its part of ``feedback``; replaces the
            targets by the errors.
        start: position of the first column.
    """
    count = len(targets)
    if count <= width:
        round_columns(start, targets, feedback)
        return
    half = -(-count // width) // 2 * width
    feed_forward(targets[half:], feedback[half:, half:], width, round_columns, start + half)
    targets[:half].addmm_(feedback[:half, half:], targets[half:])
    feed_forward(targets[:half], feedback[:half, :half], width, round_columns, start)


def round_block(rounding: Rounding, start: int, targets: Tensor, feedback: Tensor) -> None:
    """Round a block of C columns on any device.

    Args:
        rounding: of the whole weight; the block's values are written.
        start: position of the block's first column.
        targets: [C, N], what the columns are best rounded from, but for the feedback within the block; becomes their
            errors.
        feedback: [C, C], within the block.
    """
    part = slice(start, start + len(targets))
    channels, groups = rounding.channels[part], rounding.groups[part]
    scales, zeros = rounding.scales[groups], rounding.zeros[groups]
    # (value - zero) x scale is subtracted in one step from this
    shifted = rounding.weight[channels].addcmul_(zeros, scales)
    levels = torch.empty_like(shifted)

    def round_column(k: int, target: Tensor, _: Tensor) -> None:
        level = torch.addcdiv(zeros[k], target[0], scales[k], out=levels[k]).clamp_(0, rounding.top).round_()
        torch.addcmul(shifted[k], level, scales[k], value=-1, out=target[0])

    feed_forward(targets, feedback, 1, round_column)
    rounding.values[channels] = levels.to(torch.uint8)


def _rounder(weight: Tensor) -> tuple[int, Rounder]:
    """Return what rounds a weight [N, K] fastest, and how many columns at a time."""
    if weight.dtype == torch.float32 and has_rounding_kernel(weight.device):
        from toolkit.quantize.search.kernels import compensate as kernel

        if weight.shape[1] % kernel.SUB_BLOCK == 0:
            return kernel.BLOCK, kernel.round_block
    return BLOCK, round_block


def has_rounding_kernel(device: torch.device) -> bool:
    """Return whether the Triton kernel rounds float32 weights there. The first call compiles it."""
    return trusted("compensated rounding", device, lambda: _kernel_agrees(device))


def _kernel_agrees(device: torch.device) -> bool:
    """Round a small weight with the kernel and without; sums in another order may turn a value here and there.

    Its rows are a multiple of 16, as a model's are, for which Triton compiles, and none of the kernel's own. Errors are
    fed forward in TF32, which is how a search on a GPU has it.
    """
    from toolkit.quantize.search.kernels import compensate as kernel

    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(2048, 512, generator=rng) @ torch.randn(512, 512, generator=rng)).to(device)
    weight = torch.randn(112, 512, generator=rng).to(device)
    scales = weight.new_full((112, 4), 0.4).half()
    zeros = torch.full((112, 4), 8, dtype=torch.uint8, device=device)
    made = factor(x.t() @ x / len(x), len(x))

    def rounded(width: int, rounder: Rounder) -> tuple[Tensor, float]:
        values = _compensate(weight, scales, zeros, made, 4, (width, rounder))
        error = x @ ((values.float() - 8) * scales[:, :1].float() - weight).t()
        return values, float(error.square().sum())

    ours, error = rounded(kernel.BLOCK, partial(kernel.round_block, precision="tf32"))
    theirs, limit = rounded(BLOCK, round_block)
    return float((ours == theirs).float().mean()) > 0.9 and error <= 1.02 * limit
