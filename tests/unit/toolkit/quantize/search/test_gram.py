"""Second moments, and products in bfloat16."""

from __future__ import annotations

import pytest
import torch

from toolkit.quantize.search import gram
from toolkit.quantize.search.gram import Moments, exact_products
from toolkit.quantize.search.scales import screen


def test_narrow_moments_and_losses_are_close_to_wide_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 256, generator=rng) @ torch.randn(256, 256, generator=rng)
    weights = torch.rand(3000, generator=rng)
    for given in (None, weights):
        wide, narrow = Moments(256, x.device), Moments(256, x.device, narrow=True)
        for moments in (wide, narrow):
            moments.add(x.clone(), given)
            moments.finish()
        assert wide.tokens == narrow.tokens and torch.equal(wide.sizes, narrow.sizes)
        size = wide.second.diagonal().mean()
        assert (wide.second - narrow.second).abs().max() < 1e-3 * size
        assert (wide.second - narrow.second).abs().max() > 0
    weight, scales = torch.randn(64, 256, generator=rng), torch.rand(3, 256, generator=rng) + 0.5
    exact = screen(weight, wide.second, scales, 128)
    fast = screen(weight, wide.second.bfloat16(), scales, 128)
    torch.testing.assert_close(fast, exact, rtol=3e-3, atol=0)


def test_a_cpu_multiplies_in_float32() -> None:
    assert not gram.takes_bfloat16(torch.device("cpu"))
    assert gram._products_agree(torch.device("cpu"))


@pytest.mark.parametrize("allowed", [True, False])
def test_products_are_exact_in_the_block_alone(allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with exact_products():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        with pytest.raises(ZeroDivisionError), exact_products():
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
