"""The thorough search: what it aims at, and that a layer is rounded on what reaches it."""

from __future__ import annotations

import pytest
import torch

from tests.unit.toolkit.quantize.search.test_compensate import damped
from toolkit.quantize.search.chained import asymmetric_target
from toolkit.quantize.search.compensate import factor
from toolkit.quantize.search.gram import PairedMoments


def pair(tokens: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, K] in a source, and behind something that has lost a little of them."""
    rng = torch.Generator().manual_seed(seed)
    source = torch.randn(tokens, columns, generator=rng) @ torch.randn(columns, columns, generator=rng)
    lossy = torch.eye(columns) + 0.05 * torch.randn(columns, columns, generator=rng)
    return source, source @ lossy + 0.1 * torch.randn(tokens, columns, generator=rng)


def moments_of(source: torch.Tensor, behind: torch.Tensor) -> PairedMoments:
    found = PairedMoments(source.shape[1], source.device)
    for x, y in zip(behind.split(100), source.split(100), strict=True):
        found.add_pair(x.clone(), y.clone())
    found.finish()
    return found


def test_the_target_comes_closest_to_the_sources_output() -> None:
    source, behind = pair(2000, 48, 0)
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(1))
    moments = moments_of(source, behind)
    target = asymmetric_target(weight, moments.drift, factor(moments.second, moments.tokens))
    x, y = behind.double(), source.double()
    h = damped(x.t() @ x / 2000)
    ridge = h - x.t() @ x / 2000
    exact = torch.linalg.solve(h, (weight.double() @ (y.t() @ x / 2000 + ridge)).t()).t()
    torch.testing.assert_close(target.double(), exact, rtol=0, atol=2e-4)

    def missed(w: torch.Tensor) -> float:
        return float((behind @ w.t() - source @ weight.t()).square().mean())

    assert missed(target) < 0.2 * missed(weight)


def test_without_drift_the_target_is_the_weight() -> None:
    source, _ = pair(500, 32, 2)
    moments = moments_of(source, source)
    weight = torch.randn(6, 32)
    assert torch.equal(asymmetric_target(weight, moments.drift, factor(moments.second, moments.tokens)), weight)


def test_weights_of_tokens_count_in_both_moments() -> None:
    source, behind = pair(300, 16, 3)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(4))
    found = PairedMoments(16, source.device)
    found.add_pair(behind.clone(), source.clone(), weights)
    found.finish()
    drift = ((source - behind) * weights.unsqueeze(1)).t() @ behind / weights.sum()
    torch.testing.assert_close(found.drift, drift, rtol=1e-4, atol=1e-4)
    assert found.tokens == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()), rel=1e-5)
