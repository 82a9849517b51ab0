"""Packed 4-bit weights as vLLM keeps them before a kernel lays them out, and the weights that they stand for."""

from __future__ import annotations

import torch

__all__ = ["unpack"]

_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def unpack(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the weights that words stand for, in the scales' dtype.

    Args:
        words: int32 [K / 8, N], eight inputs a word, the first in the lowest bits.
        scales: [groups, N]. zeros: int32 [N / 8, groups], eight outputs a word.

    Returns:
        [N, K].
    """
    groups, columns = scales.shape
    values = (words.unsqueeze(1) >> _SHIFTS.view(1, 8, 1) & 15).reshape(-1, columns)
    points = (zeros.unsqueeze(1) >> _SHIFTS.view(1, 8, 1) & 15).reshape(columns, groups).t()
    by_group = values.view(groups, -1, columns).float() - points.unsqueeze(1).float()
    return (by_group * scales.unsqueeze(1).float()).view(-1, columns).t().contiguous().to(scales.dtype)
