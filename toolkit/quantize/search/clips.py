"""The search for clipped ranges: AutoAWQ's grid and loss, by second moments."""

from __future__ import annotations

import torch

from toolkit.quantize.search.gram import group_moments
from toolkit.quantize.search.grid import MIN_RANGE, snap
from toolkit.quantize.search.kernels.trust import trusted

__all__ = ["best_clip", "has_clip_kernel"]

#: Weights that the clip search works on at once.
_CLIP_WEIGHTS = 2**25


def best_clip(
    weight: torch.Tensor, moments: torch.Tensor, bits: int = 4, grid: int = 20, max_shrink: float = 0.5
) -> torch.Tensor:
    """Find, for every group of every row, the bound on |w| that costs the group's output least.

    AutoAWQ's grid and loss (`_compute_best_clip`): bounds max |w| x (1 - i/grid), the mean over tokens of the squared
    error of the group's partial sum. With d the error of the group's weights that mean is d^T H d, H the group's
    moments, so all tokens count and a step costs g instead of n multiplications a weight.

    Args:
        weight: [N, K].
        moments: [K/g, g, g] from :func:`toolkit.quantize.search.gram.group_moments`.
        bits: width of a value.
        grid, max_shrink: bounds tried: the first ``grid * max_shrink`` of ``grid``.

    Returns:
        [N, K/g, 1], the bounds.
    """
    groups, group, _ = moments.shape
    tried = int(max_shrink * grid)
    if has_clip_kernel(weight.device, group):
        from toolkit.quantize.search.kernels import clip as _clip_kernel

        return _clip_kernel.best_clip(weight, moments.contiguous(), bits, grid, tried, MIN_RANGE)
    # a few rows at a time: what is tried is four times as large as what it is tried on
    chunks = weight.float().view(-1, groups, group).split(max(1, _CLIP_WEIGHTS // (groups * group)))
    return torch.cat([_best_clip(w, moments, bits, grid, tried) for w in chunks])


def has_clip_kernel(device: torch.device, group: int) -> bool:
    """Return whether the Triton kernel takes weights there: groups that fill its tiles, a GPU that multiplies in TF32.

    The first call compiles it.
    """
    return (
        device.type == "cuda"
        and group in (32, 64, 128)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and trusted(f"clips of {group}", device, lambda: _clip_kernel_agrees(device, group))
    )


def _clip_kernel_agrees(device: torch.device, group: int) -> bool:
    """Search the clips of a small weight with the kernel and without; near ties may fall either way.

    Its rows are a multiple of 16, as a model's are, for which Triton compiles, and none of the kernel's own.
    """
    from toolkit.quantize.search.kernels import clip as _clip_kernel

    rng = torch.Generator().manual_seed(0)
    weight = (torch.randn(112, 2 * group, generator=rng) ** 3).to(device)
    x = (torch.randn(500, 2 * group, generator=rng) @ torch.randn(2 * group, 2 * group, generator=rng)).to(device)
    moments = group_moments(x, group)
    w = weight.view(112, 2, group)

    def loss(bounds: torch.Tensor) -> float:
        d = (snap(w.clamp(-bounds, bounds), 4) - w).transpose(0, 1)
        return float((torch.bmm(d, moments) * d).sum())

    ours = loss(_clip_kernel.best_clip(weight, moments, 4, 20, 10, MIN_RANGE))
    return ours <= 1.01 * loss(_best_clip(w, moments, 4, 20, 10))


def _best_clip(w: torch.Tensor, moments: torch.Tensor, bits: int, grid: int, tried: int) -> torch.Tensor:
    widest = w.abs().amax(-1, keepdim=True)
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for step in range(tried):
        bound = widest * (1 - step / grid)
        d = snap(w.clamp(-bound, bound), bits).sub_(w).transpose(0, 1)
        loss = torch.bmm(d, moments).mul_(d).sum(-1).t().unsqueeze(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, bound, best)
    return best
