"""The search for clipped ranges: exact, over all tokens, on AutoAWQ's grid."""

from __future__ import annotations

import pytest
import torch

from toolkit.formats.packing import dequantize
from toolkit.quantize.search.clips import best_clip
from toolkit.quantize.search.gram import group_moments
from toolkit.quantize.search.grid import round_to_grid


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
                clipped = w.clamp(-bound, bound).float().view(1, -1)
                rounded = dequantize(round_to_grid(clipped, group_size), torch.float32)
                losses[float(bound)] = float((inputs @ (rounded[0].double() - w)).pow(2).mean())
            chosen = min(losses, key=lambda bound: abs(bound - float(found[row, group])))
            assert losses[chosen] <= min(losses.values()) * 1.001


def test_the_clip_search_agrees_with_autoawq() -> None:
    from toolkit.quantize.search.autoawq import AwqQuantizer

    stock = AwqQuantizer.__new__(AwqQuantizer)
    stock.group_size, stock.w_bit, stock.zero_point = 64, 4, True
    rng = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=rng)
    x = torch.randn(400, 128, generator=rng)  # fewer than the 512 tokens that AutoAWQ takes: both see all
    theirs = stock._compute_best_clip(weight, x)
    ours = best_clip(weight, group_moments(x, 64))
    # AutoAWQ does not round scales to fp16 in the search: near-ties may fall the other way
    assert (ours == theirs).float().mean() > 0.9
