"""What a block of compensated rounding works on, by a kernel or in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rounding"]


@dataclass(frozen=True)
class Rounding:
    """What rounding a weight [N, K] reads and writes, besides what it feeds forward; K columns as rows.

    ``weight``: [K, N], by channel, as are the values. ``scales``, ``zeros``: [G, N], in the weight's dtype.
    ``channels``, ``groups``: int64 [K], of each column in the order of the moments' factor. ``top``: largest value.
    ``values``: uint8 [K, N], written.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    channels: Tensor
    groups: Tensor
    top: int
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, bits: int) -> Rounding:
        """Return what rounds a weight [N, K] to a grid of scales and zeros [N, K/g], in the channels' ``order`` [K]."""
        rows, columns = weight.shape
        # transposed, so that a column is contiguous
        grid_scales, grid_zeros = (part.t().to(weight.dtype).contiguous() for part in (scales, zeros))
        values = torch.empty((columns, rows), dtype=torch.uint8, device=weight.device)
        groups = order // (columns // scales.shape[1])
        return cls(weight.t(), grid_scales, grid_zeros, order, groups, 2**bits - 1, values)
