"""Compensated rounding: GPTQ's values on a given grid, for any moments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from toolkit.formats.packing import QuantizedLinear
from toolkit.quantize.search.compensate import BLOCK, compensate, factor
from toolkit.quantize.search.grid import round_to_grid

TOKENS = 2000


def correlated(columns: int, seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """Moments [K, K], float64, of inputs that go together and differ in size."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=rng).double()
    x = torch.randn(tokens, columns // 4, generator=rng).double() @ mixing
    x = (x + torch.randn(tokens, columns, generator=rng)) * torch.randn(columns, generator=rng).exp()
    return x.t() @ x / tokens


def random_linear(rows: int, columns: int, group_size: int, seed: int) -> tuple[torch.Tensor, QuantizedLinear]:
    """A weight [N, K], float64, and the grid of a clipped copy with its nearest values."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight.double(), round_to_grid(weight.clamp(-2, 2), group_size)


def spread(part: torch.Tensor, columns: int) -> torch.Tensor:
    """Per-group [N, G] as per-column [N, K], float64."""
    return part.double().repeat_interleave(columns // part.shape[1], 1)


def error(weight: torch.Tensor, grid: QuantizedLinear, values: torch.Tensor) -> torch.Tensor:
    columns = weight.shape[1]
    return weight - (values.double() - spread(grid.zeros, columns)) * spread(grid.scales, columns)


def loss(e: torch.Tensor, moments: torch.Tensor) -> float:
    return float(((e @ moments) * e).sum())


def damped(moments: torch.Tensor, tokens: float = TOKENS) -> torch.Tensor:
    columns = len(moments)
    return moments + torch.eye(columns).double() * (columns / tokens * moments.diagonal().mean())


def gptq(weight: torch.Tensor, grid: QuantizedLinear, moments: torch.Tensor) -> torch.Tensor:
    """GPTQ as its paper has it, row by row of the inverse's factor, the channels with the largest moments first."""
    columns = weight.shape[1]
    order = moments.diagonal().argsort(stable=True).flip(0)
    w, h = weight[:, order].clone(), damped(moments)[order][:, order]
    scales, zeros = spread(grid.scales, columns)[:, order], spread(grid.zeros, columns)[:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    found = torch.empty_like(w)
    for k in range(columns):
        found[:, k] = (w[:, k] / scales[:, k] + zeros[:, k]).round().clamp(0, 15)
        left = w[:, k] - (found[:, k] - zeros[:, k]) * scales[:, k]
        w[:, k:] -= (left / upper[k, k]).unsqueeze(1) * upper[k, k:]
    return found[:, order.argsort()].to(torch.uint8)


@pytest.mark.parametrize(("columns", "group_size"), [(32, 32), (96, -1), (128, 64), (2 * BLOCK + 64, 64)])
def test_the_values_are_those_of_gptq(columns: int, group_size: int) -> None:
    for seed in range(3):
        weight, grid = random_linear(12, columns, group_size, seed)
        moments = correlated(columns, seed)
        values = compensate(weight, grid.scales, grid.zeros, factor(moments, TOKENS))
        assert values.dtype == torch.uint8 and values.is_contiguous()
        assert torch.equal(values, gptq(weight, grid, moments))


def test_single_precision_errs_no_more() -> None:
    weight, grid = random_linear(48, 192, 64, 0)
    moments = correlated(192, 0)
    values = compensate(weight.float(), grid.scales, grid.zeros, factor(moments.float(), TOKENS))
    exact = loss(error(weight, grid, gptq(weight, grid, moments)), moments)
    assert loss(error(weight, grid, values), moments) == pytest.approx(exact, rel=0.01)


def test_what_rounding_leaves_adds_up_to_the_error_of_the_output() -> None:
    weight, grid = random_linear(8, 192, 32, 1)
    moments = correlated(192, 1)
    found = factor(moments, TOKENS)
    e = error(weight, grid, compensate(weight, grid.scales, grid.zeros, found))
    assert torch.equal(found.feedback.tril(-1), torch.zeros(192, 192).double())
    remainders = e[:, found.order] @ found.feedback.t()  # of every column, after what it makes up for
    h = damped(moments)
    pivots = torch.linalg.cholesky(h[found.order][:, found.order]).diagonal()
    assert float((remainders * pivots).pow(2).sum()) == pytest.approx(loss(e, h), rel=1e-9)
    step = spread(grid.scales, 192)[:, found.order]
    assert (remainders.abs() <= step / 2 * 1.0001).double().mean() > 0.9  # the others lie outside their grid


def test_it_errs_much_less_than_the_nearest_values() -> None:
    for seed in range(5):
        weight, grid = random_linear(32, 128, 64, seed)
        moments = correlated(128, seed)
        values = compensate(weight, grid.scales, grid.zeros, factor(moments, TOKENS))
        assert loss(error(weight, grid, values), moments) < 0.6 * loss(error(weight, grid, grid.values), moments)


def test_few_tokens_do_no_harm_on_others() -> None:
    for seed in range(5):
        columns = 128
        weight, grid = random_linear(32, columns, 64, seed)
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(columns, columns, generator=rng).double()  # one token a channel, nothing in common to learn
        values = compensate(weight, grid.scales, grid.zeros, factor(x.t() @ x / columns, columns))
        others = torch.eye(columns).double()
        nearest = compensate(weight, grid.scales, grid.zeros, factor(others, TOKENS))
        assert loss(error(weight, grid, values), others) < 1.5 * loss(error(weight, grid, nearest), others)


def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest() -> None:
    weight, grid = random_linear(16, 64, 32, 2)
    values = compensate(weight, grid.scales, grid.zeros, factor(torch.rand(64).double().diag(), TOKENS))
    e, nearest = error(weight, grid, values), error(weight, grid, grid.values)
    assert bool((e.abs() <= nearest.abs() + 1e-9).all())


def test_rows_can_be_rounded_in_parts() -> None:
    weight, grid = random_linear(40, 96, 32, 3)
    found = factor(correlated(96, 3), TOKENS)
    whole = compensate(weight, grid.scales, grid.zeros, found)
    parts = [
        compensate(w, s, z, found)
        for w, s, z in zip(weight.split(16), grid.scales.split(16), grid.zeros.split(16), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_nothing_that_is_given_is_changed() -> None:
    weight, grid = random_linear(8, 64, 32, 4)
    moments = correlated(64, 4)
    found = factor(moments, TOKENS)
    given = [weight, moments, grid.scales, grid.zeros, found.feedback, found.order]
    before = [tensor.clone() for tensor in given]
    again = [compensate(weight, grid.scales, grid.zeros, factor(moments, TOKENS)) for _ in range(2)]
    assert torch.equal(*again)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("case", ["zero", "silent channels", "fewer tokens than channels", "not quite semidefinite"])
def test_moments_that_have_no_factor_are_damped_until_they_have(case: str) -> None:
    moments = correlated(96, 5, 20 if case == "fewer tokens than channels" else TOKENS)
    if case == "zero":
        moments.zero_()
    elif case == "silent channels":
        moments[10:40], moments[:, 10:40] = 0, 0
    elif case == "not quite semidefinite":
        moments -= torch.eye(96) * 0.2 * moments.diagonal().mean()
    weight, grid = random_linear(8, 96, 32, 5)
    found = factor(moments.float(), 1e6)
    assert bool(found.feedback.isfinite().all())
    e = error(weight, grid, compensate(weight.float(), grid.scales, grid.zeros, found))
    assert bool(e.isfinite().all()) and int(found.order.bincount().max()) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    moments = correlated(32, 6)
    moments[3, 3] = bad
    with pytest.raises(ArithmeticError, match="32 inputs"):
        factor(moments, TOKENS)


AGREE = """
import sys
import torch
from tests.unit.toolkit.quantize.search.test_compensate import correlated, error, loss, random_linear
from toolkit.quantize.search import compensate as module
from toolkit.quantize.search.kernels import compensate as kernel

def on(device, width, rounder):
    module._rounder = lambda _: (width, rounder)
    found = module.factor(moments.to(device), 2000)
    return module.compensate(weight.to(device), grid.scales.to(device), grid.zeros.to(device), found).cpu()

device = sys.argv[1]
for precision in ("highest", "high") if device == "cuda" else ("highest",):
    torch.set_float32_matmul_precision(precision)
    for rows, columns, group_size in ((70, 320, 64), (5, 96, -1), (32, 128, 128)):
        weight, grid = random_linear(rows, columns, group_size, 0)
        exact, moments = weight, correlated(columns, 0)
        weight, moments = weight.float(), moments.float()
        ours = on("cpu", module.BLOCK, module.round_block)
        theirs = on(device, kernel.BLOCK, kernel.round_block)
        # a difference in the last digit may tip a value, and with it those after it in the row
        same = (ours == theirs).float().mean()
        assert same > (0.99 if precision == "highest" else 0.5), (precision, rows, columns, same)
        ratio = loss(error(exact, grid, theirs), moments.double()) / loss(error(exact, grid, ours), moments.double())
        assert abs(ratio - 1) < 0.02, (precision, rows, columns, ratio)
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernel_agrees(device: str) -> None:
    pytest.importorskip("triton")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    subprocess.run([sys.executable, "-c", AGREE, device], env={**os.environ, **interpreted}, check=True, timeout=120)
