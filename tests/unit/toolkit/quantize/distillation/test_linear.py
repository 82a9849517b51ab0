"""Products by packed codes: those of the dense weight, with the gradients that autograd finds for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.formats.packing import QuantizedLinear, dequantize
from toolkit.quantize.distillation.linear import Codes, Learned, LearningLinear
from toolkit.quantize.search.grid import round_to_grid


def quantized(rows: int = 24, columns: int = 64, group: int = 32) -> QuantizedLinear:
    torch.manual_seed(0)
    return round_to_grid(torch.randn(rows, columns), group)


def test_codes_come_back_from_half_bytes() -> None:
    found = quantized()
    codes = Codes.of(found)
    assert codes.pairs.nbytes * 2 == found.values.nbytes
    levels = found.values.view(24, 2, 32).float() - found.zeros.float().unsqueeze(-1)
    assert torch.equal(codes.levels(torch.float32), levels)


@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_are_those_of_the_dense_weight(bias: bool) -> None:
    found = quantized()
    own = torch.randn(24).half() if bias else None
    learning = LearningLinear(found, own, torch.float32)
    x = torch.randn(2, 5, 64, requires_grad=True)
    scales = found.scales.float().requires_grad_()
    levels = found.values.view(24, 2, 32).float() - found.zeros.float().unsqueeze(-1)
    dense = (levels * scales.unsqueeze(-1)).view(24, 64)
    above = torch.randn(2, 5, 24)
    expected = nn.functional.linear(x, dense, None if own is None else own.float())
    (of_x, of_scales) = torch.autograd.grad(expected, (x, scales), above)
    y = learning(x)
    torch.testing.assert_close(y, expected)
    y.backward(above)
    assert x.grad is not None and learning.scales.share.grad is not None
    torch.testing.assert_close(x.grad, of_x)
    # what learns is the share of the scale
    torch.testing.assert_close(learning.scales.share.grad, of_scales * scales.detach())
    if own is not None and learning.bias is not None:
        unit = own.float().abs().median()
        torch.testing.assert_close(learning.bias.share.grad, above.sum((0, 1)) * unit)


def test_what_learns_is_given_out_as_the_file_will_hold_it() -> None:
    start = torch.tensor([1.0, 2.0, -3.0]).bfloat16()
    learned = Learned(start)
    assert torch.equal(learned.value(), start) and torch.equal(learned(), start.float())
    learned.share.data.fill_(0.001)
    assert torch.equal(learned.value(), start), "less than bfloat16 tells apart"
    learned.share.data.fill_(0.01)
    assert learned.value().dtype == torch.bfloat16 and not torch.equal(learned.value(), start)
    assert torch.equal(learned(), learned.value().float())
    learned().sum().backward()
    assert learned.share.grad is not None and torch.equal(learned.share.grad, start.float())


def test_untouched_it_is_the_weight_of_the_file() -> None:
    found = quantized()
    learning = LearningLinear(found, None, torch.float32)
    assert torch.equal(learning.scales.value(), found.scales)
    assert torch.equal(learning(torch.eye(64)), dequantize(found, torch.float32).t())
