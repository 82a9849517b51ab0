"""What a block of compensated rounding works on, by a kernel or in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

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
