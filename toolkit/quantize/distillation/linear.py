"""A linear layer on packed 4-bit codes whose scales can learn.

Codes stay two to a byte on the device and become a weight where one is multiplied, in the forward pass and again in the
backward pass. With W = (q - z) s, the gradient of a group's scale is the sum over the group of dL/dW (q - z): a
gradient as large as the weight exists for one linear at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.formats.packing import QuantizedLinear

__all__ = ["Codes", "Learned", "LearningLinear"]


@dataclass(frozen=True)
class Codes:
    """A weight's values and zero points.

    ``pairs``: uint8 [N, K/2], a column of the first half of K in the low four bits, one of the second in the high ones.
    ``zeros``: uint8 [N, G].
    """

    pairs: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, quantized: QuantizedLinear) -> Codes:
        """Return those of a linear."""
        low, high = quantized.values.chunk(2, dim=1)
        return cls(low | high << 4, quantized.zeros)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """Return value - zero, [N, G, g]; they are small integers, which every dtype holds."""
        values = torch.cat([self.pairs & 15, self.pairs >> 4], dim=1)
        return values.view(*self.zeros.shape, -1).to(dtype).sub_(self.zeros.to(dtype).unsqueeze(-1))


class Learned(nn.Module):
    """A tensor of the file that learns, as a share of what it was: ``start`` x (1 + ``share``), or + unit x share.

    What is given out is rounded as the file will hold it, and the gradient passes as though it were not.
    """

    def __init__(self, start: Tensor, unit: Tensor | None = None) -> None:
        """Args: the tensor as it stands in the file, in its dtype; what a share of 1 is (None: the tensor itself)."""
        super().__init__()
        self.start = start
        self.unit = unit
        self.share = nn.Parameter(torch.zeros_like(start, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the value, float32."""
        value = self._exact()
        return value + (value.detach().to(self.start.dtype).float() - value.detach())

    def _exact(self) -> Tensor:
        begun = self.start.float()
        return torch.addcmul(begun, begun if self.unit is None else self.unit, self.share)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return it as the file is to hold it."""
        return self._exact().to(self.start.dtype)


class LearningLinear(nn.Module):
    """Takes the place of a linear layer."""

    def __init__(self, quantized: QuantizedLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Args: the linear as the file holds it, its bias, and what weights are multiplied in."""
        super().__init__()
        self.codes = Codes.of(quantized)
        self.scales = Learned(quantized.scales)
        self.bias = None if bias is None else Learned(bias, bias.float().abs().median())
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        product: Any = _Product.apply
        y: Tensor = product(x.to(self.dtype), self.scales(), self.codes)
        return y if self.bias is None else y + self.bias().to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T with W from codes and scales; x [..., K] in the dtype of the product, scales [N, G] float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.codes = codes
        return nn.functional.linear(x, _weight(codes.levels(x.dtype), scales))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (above,) = gradients
        x, scales = ctx.saved_tensors
        codes: Codes = ctx.codes
        above = above.to(x.dtype)
        levels = codes.levels(x.dtype)
        below = above @ _weight(levels, scales)
        of_weight = above.flatten(0, -2).t() @ x.flatten(0, -2)
        of_scales = (of_weight.view(levels.shape) * levels).sum(-1, dtype=torch.float32)
        return below, of_scales, None


def _weight(levels: Tensor, scales: Tensor) -> Tensor:
    """Return levels [N, G, g] x scales [N, G], [N, K] in the levels' dtype; rounded once, behind the product."""
    return (levels * scales.unsqueeze(-1)).to(levels.dtype).flatten(1)
