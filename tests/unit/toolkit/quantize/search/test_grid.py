"""The 4-bit grid: what is rounded is what the file holds, for any weights."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.formats.packing import QuantizedLinear
from toolkit.formats.packing import dequantize as dequantized
from toolkit.quantize.search.grid import round_to_grid


def dequantize(linear: QuantizedLinear) -> torch.Tensor:
    return dequantized(linear, torch.float32)


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
