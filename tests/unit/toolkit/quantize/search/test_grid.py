"""The 4-bit grid: what is rounded is what the file holds, for any weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.quantize.search.grid import best_clip, dequantize, group_moments, round_to_grid


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128]),
    shift=st.floats(-3, 3),
    spread=st.floats(1e-4, 10),
)
def test_no_weight_moves_more_than_half_a_step(
    seed: int, groups: int, group_size: int, shift: float, spread: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = (torch.randn(8, groups * group_size, generator=rng) + shift) * spread
    rounded = round_to_grid(weight, group_size)
    assert rounded.values.shape == weight.shape and int(rounded.values.max()) <= 15
    assert rounded.scales.shape == rounded.zeros.shape == (8, groups)
    assert rounded.scales.dtype == torch.float16 and bool((rounded.scales > 0).all())
    moved = (dequantize(rounded) - weight).abs().view(8, groups, group_size)
    # half a step inside the range; the ends can lie half a step beyond it, since the zero point is rounded,
    # and another 2^-11 of the range, since the scale is
    assert bool((moved <= rounded.scales.float().unsqueeze(-1) * (1.0 + 16 * 2**-11)).all())
    inside = moved.flatten() <= rounded.scales.float().repeat_interleave(group_size).view(-1) * 0.5001
    assert inside.float().mean() > 0.9


def test_a_group_of_one_sign_keeps_its_values() -> None:
    weight = torch.linspace(1.0, 1.3, 32).view(1, 32)
    assert torch.allclose(dequantize(round_to_grid(weight, 32)), weight, atol=1.3 / 15 / 2 * 1.01)
    assert torch.allclose(dequantize(round_to_grid(-weight, 32)), -weight, atol=1.3 / 15 / 2 * 1.01)


def test_zeros_and_huge_values_have_finite_scales() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 32:] = 3e38
    rounded = round_to_grid(weight, 32)
    assert bool(torch.isfinite(rounded.scales).all()) and bool((rounded.scales > 0).all())
    assert bool((dequantize(rounded)[0] == 0).all())


def test_a_whole_row_as_one_group() -> None:
    rounded = round_to_grid(torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), -1)
    assert rounded.scales.shape == (4, 1)


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_clip_is_the_one_that_trying_every_bound_on_every_token_finds(group_size: int) -> None:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 128, generator=rng) * torch.randn(8, 128, generator=rng).exp()
    x = torch.randn(300, 128, generator=rng) * torch.linspace(0.1, 3, 128)
    found = best_clip(weight, group_moments(x, group_size))
    for row in range(8):
        for group in range(128 // group_size):
            columns = slice(group * group_size, (group + 1) * group_size)
            w, inputs = weight[row, columns].double(), x[:, columns].double()
            losses = {}
            for step in range(10):
                bound = w.abs().max() * (1 - step / 20)
                rounded = dequantize(round_to_grid(w.clamp(-bound, bound).float().view(1, -1), group_size))
                losses[float(bound)] = float((inputs @ (rounded[0].double() - w)).pow(2).mean())
            chosen = min(losses, key=lambda bound: abs(bound - float(found[row, group])))
            assert losses[chosen] <= min(losses.values()) * 1.001


def test_the_clip_search_agrees_with_autoawq() -> None:
    from toolkit.quantize.search.awq_classes import AwqQuantizer

    stock = AwqQuantizer.__new__(AwqQuantizer)
    stock.group_size, stock.w_bit, stock.zero_point = 64, 4, True
    rng = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=rng)
    x = torch.randn(400, 128, generator=rng)  # fewer than the 512 tokens that AutoAWQ takes: both see all
    theirs = stock._compute_best_clip(weight, x)
    ours = best_clip(weight, group_moments(x, 64))
    # AutoAWQ does not round scales to fp16 in the search: near-ties may fall the other way
    assert (ours == theirs).float().mean() > 0.9
