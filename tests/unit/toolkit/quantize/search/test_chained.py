"""The thorough search: what it aims at, and that a layer is rounded on what reaches it."""

from __future__ import annotations

import pytest
import torch

from tests.unit.toolkit.quantize.search.test_compensate import damped
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.chained import asymmetric_target, residuals_of
from toolkit.quantize.search.compensate import factor
from toolkit.quantize.search.gram import PairedMoments
from toolkit.quantize.stream.states import Inputs


def pair(tokens: int, columns: int, seed: int, residual: int = 0) -> tuple[Inputs, Inputs]:
    """What a unit is given in a source, and behind something that has lost a little of it."""
    rng = torch.Generator().manual_seed(seed)
    source = torch.randn(tokens, columns, generator=rng) @ torch.randn(columns, columns, generator=rng)
    lossy = torch.eye(columns) + 0.05 * torch.randn(columns, columns, generator=rng)
    behind = source @ lossy + 0.1 * torch.randn(tokens, columns, generator=rng)
    if not residual:
        return Inputs(source), Inputs(behind)
    true = torch.randn(tokens, residual, generator=rng)
    lost = source @ torch.randn(columns, residual, generator=rng) * 0.1 + 0.1 * torch.randn(
        tokens, residual, generator=rng
    )
    return Inputs(source, true), Inputs(behind, true - lost)


def moments_of(source: Inputs, behind: Inputs, weights: torch.Tensor | None = None) -> PairedMoments:
    width = 0 if source.residual is None else source.residual.shape[1]
    found = PairedMoments(source.x.shape[1], width, source.x.device)
    for start in range(0, len(source.x), 100):
        part = slice(start, start + 100)
        both = [Inputs(i.x[part].clone(), None if i.residual is None else i.residual[part]) for i in (source, behind)]
        found.add_pair(*both, None if weights is None else weights[part])
    found.finish()
    return found


@pytest.mark.parametrize("residual", [0, 10])
def test_the_target_comes_closest_to_the_sources_output(residual: int) -> None:
    source, behind = pair(2000, 48, 0, residual)
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(1))
    moments = moments_of(source, behind)
    target = asymmetric_target(weight, moments, factor(moments.second, moments.tokens))
    x, wanted = behind.x.double(), source.x.double() @ weight.double().t()
    if source.residual is not None and behind.residual is not None:
        wanted += (source.residual - behind.residual).double()
    h = damped(x.t() @ x / 2000)
    ridge = h - x.t() @ x / 2000
    exact = torch.linalg.solve(h, (wanted.t() @ x / 2000 + weight.double() @ ridge).t()).t()
    torch.testing.assert_close(target.double(), exact, rtol=0, atol=2e-4)

    def missed(w: torch.Tensor) -> float:
        return float((x @ w.double().t() - wanted).square().mean())

    assert missed(target) < 0.2 * missed(weight)


def test_without_drift_the_target_is_the_weight() -> None:
    source, _ = pair(500, 32, 2, 6)
    moments = moments_of(source, source)
    weight = torch.randn(6, 32)
    assert torch.equal(asymmetric_target(weight, moments, factor(moments.second, moments.tokens)), weight)


def test_weights_of_tokens_count_in_all_moments() -> None:
    source, behind = pair(300, 16, 3, 8)
    assert source.residual is not None and behind.residual is not None
    weights = torch.rand(300, generator=torch.Generator().manual_seed(4))
    found = moments_of(source, behind, weights)
    counted = weights.unsqueeze(1) / weights.sum()
    drift = ((source.x - behind.x) * counted).t() @ behind.x
    lack = ((source.residual - behind.residual) * counted).t() @ behind.x
    torch.testing.assert_close(found.drift, drift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lack, lack, rtol=1e-4, atol=1e-4)
    assert found.tokens == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()), rel=1e-5)


def test_what_ends_a_branch_is_added_to_what_its_norm_was_given() -> None:
    assert residuals_of(QWEN2_VL) == {
        "self_attn.o_proj": "input_layernorm",
        "mlp.down_proj": "post_attention_layernorm",
    }
