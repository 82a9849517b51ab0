"""The arithmetic of a 4-bit grid: pure functions of tensors, which say what the file will hold."""

from __future__ import annotations

import torch

from toolkit.formats.packing import QuantizedLinear

__all__ = ["MIN_RANGE", "grid_steps", "groups_of", "round_error", "round_to_grid", "snap"]

#: Smallest range of a group, so that an all-zero group has a scale; AutoAWQ's value.
MIN_RANGE = 1e-5


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
    w = groups_of(weight.float(), group_size)
    step, zeros = _grid(w, bits)
    values = torch.div(w, step).round_().add_(zeros).clamp_(0, 2**bits - 1)
    return QuantizedLinear(
        values=values.to(torch.uint8).view(rows, columns),
        zeros=zeros.to(torch.uint8).view(rows, -1),
        scales=step.half().view(rows, -1),
    )


def groups_of(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> [N, K/g, g]."""
    return weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)


def _grid(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step, a number that fp16 holds, and the zero point of each group of [N, G, g]: [N, G, 1] float32."""
    top = 2**bits - 1
    low, high = w.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low).clamp(min=MIN_RANGE) / top).clamp(max=torch.finfo(torch.float16).max).half().float()
    return step, (low / step).round_().neg_().clamp_(0, top)


def snap(w: torch.Tensor, bits: int) -> torch.Tensor:
    """Return weights [N, G, g] rounded to their grid, float32: what :func:`round_to_grid` does, not packed."""
    step, zeros = _grid(w, bits)
    return torch.div(w, step).round_().clamp_(-zeros, 2**bits - 1 - zeros).mul_(step)


def grid_steps(weight: torch.Tensor, group_size: int, bits: int = 4) -> torch.Tensor:
    """Return the steps [N, K/g] float32 of a weight's grids, as :func:`round_to_grid` makes them."""
    return _grid(groups_of(weight.float(), group_size), bits)[0].squeeze(-1)


def round_error(weight: torch.Tensor, scales: torch.Tensor, group_size: int, bits: int = 4) -> torch.Tensor:
    """Return what rounding a weight [N, K] float32 under scales [K] for its inputs changes: [N, K]."""
    return snap(groups_of(weight * scales, group_size), bits).view_as(weight).div_(scales).sub_(weight)
