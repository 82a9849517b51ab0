"""The arithmetic of a 4-bit grid: pure functions of tensors."""

from __future__ import annotations

import torch

from toolkit.formats import packing
from toolkit.formats.packing import QuantizedLinear

__all__ = ["best_clip", "dequantize", "group_moments", "round_to_grid"]

#: Smallest range of a group, so that an all-zero group has a scale; AutoAWQ's value.
_MIN_RANGE = 1e-5


def round_to_grid(weight: torch.Tensor, group_size: int, bits: int = 4) -> QuantizedLinear:
    """Round a weight to its groups' asymmetric grids, as the file will hold them.

    The scale is rounded to fp16 first and the weights are rounded against that, so that what is searched is what is
    served. A group's range always contains 0: AutoAWQ clamps the zero point into 0..15, which cuts off a group whose
    weights all have one sign.

    Args:
        weight: [N, K], any float dtype; the work is done in float32.
        group_size: inputs that share a scale, -1 for all of a row; divides K.
        bits: width of a value.

    Returns:
        values [N, K] uint8 in 0..2^bits-1, zeros [N, K/g] uint8, scales [N, K/g] float16;
        the weight they stand for is (value - zero) x scale.
    """
    rows, columns = weight.shape
    group = columns if group_size == -1 else group_size
    w = weight.float().reshape(rows, -1, group)
    top = 2**bits - 1
    high = w.amax(-1, keepdim=True).clamp(min=0)
    low = w.amin(-1, keepdim=True).clamp(max=0)
    scales = ((high - low).clamp(min=_MIN_RANGE) / top).clamp(max=torch.finfo(torch.float16).max).half()
    step = scales.float()
    zeros = (-torch.round(low / step)).clamp_(0, top)
    values = (torch.round(w / step) + zeros).clamp_(0, top)
    return QuantizedLinear(
        values=values.to(torch.uint8).view(rows, columns),
        zeros=zeros.to(torch.uint8).view(rows, -1),
        scales=scales.view(rows, -1),
    )


def dequantize(layer: QuantizedLinear) -> torch.Tensor:
    """Return the float32 weight [N, K] that a quantized linear stands for."""
    return packing.dequantize(layer, torch.float32)


def group_moments(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the second moments X^T X / n of every group of inputs.

    Args:
        x: [n, K], n tokens; the sum is taken in float32.
        group_size: g, -1 for all of K.

    Returns:
        [K/g, g, g] float32: the diagonal blocks of the Gram matrix of a linear layer's inputs.
    """
    tokens, columns = x.shape
    group = columns if group_size == -1 else group_size
    blocks = x.float().view(tokens, -1, group).transpose(0, 1)
    return torch.bmm(blocks.transpose(1, 2), blocks) / tokens


def best_clip(
    weight: torch.Tensor, moments: torch.Tensor, bits: int = 4, grid: int = 20, max_shrink: float = 0.5
) -> torch.Tensor:
    """Find, for every group of every row, the bound on |w| that costs the group's output least.

    AutoAWQ's grid and loss (`_compute_best_clip`): bounds max |w| x (1 - i/grid), the mean over tokens of the squared
    error of the group's partial sum. With d the error of the group's weights that mean is d^T H d, H the group's
    moments, so all tokens count and a step costs g instead of n multiplications a weight.

    Args:
        weight: [N, K].
        moments: [K/g, g, g] from :func:`group_moments`.
        bits: width of a value.
        grid, max_shrink: bounds tried: the first ``grid * max_shrink`` of ``grid``.

    Returns:
        [N, K/g, 1], the bounds.
    """
    rows = weight.shape[0]
    groups, group, _ = moments.shape
    w = weight.float().view(rows, groups, group)
    widest = w.abs().amax(-1, keepdim=True)
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for step in range(int(max_shrink * grid)):
        bound = widest * (1 - step / grid)
        clipped = w.clamp(-bound, bound).reshape(rows * groups, group)
        d = (dequantize(round_to_grid(clipped, -1, bits)).view_as(w) - w).transpose(0, 1)
        loss = (torch.bmm(d, moments) * d).sum(-1).t().unsqueeze(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, bound, best)
    return best
