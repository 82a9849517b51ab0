"""Rounding that is gone over again: the error of the output falls, and each step is the best of its kind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.unit.toolkit.quantize.search.test_compensate import TOKENS, correlated, damped, error, loss, random_linear
from toolkit.formats.packing import QuantizedLinear
from toolkit.quantize.search.compensate import compensate, factor
from toolkit.quantize.search.descent import Objective, couple, descend, refit_scales, sweep


def problem(rows: int, columns: int, group_size: int, seed: int) -> tuple[Objective, QuantizedLinear]:
    """A weight, its inputs' moments, and what compensated rounding makes of it; float32."""
    weight, grid = random_linear(rows, columns, group_size, seed)
    moments = correlated(columns, seed).float()
    made = factor(moments, TOKENS)
    values = compensate(weight.float(), grid.scales, grid.zeros, made)
    return Objective(weight.float(), moments, made.damping), QuantizedLinear(values, grid.zeros, grid.scales)


def by_columns(weight: torch.Tensor, rounded: QuantizedLinear, moments: torch.Tensor) -> torch.Tensor:
    """Coordinate descent as it is told: one column, all others as they are, the largest moments first; float64."""
    columns = weight.shape[1]
    scales = rounded.scales.double().repeat_interleave(columns // rounded.scales.shape[1], 1)
    zeros = rounded.zeros.double().repeat_interleave(columns // rounded.scales.shape[1], 1)
    values = rounded.values.double()
    for k in moments.diagonal().argsort(stable=True).flip(0).tolist():
        e = weight - (values - zeros) * scales
        e[:, k] = 0
        target = weight[:, k] + e @ moments[:, k] / moments[k, k]
        values[:, k] = (target / scales[:, k] + zeros[:, k]).round().clamp(0, 15)
    return values.to(torch.uint8)


@pytest.mark.parametrize(("columns", "group_size"), [(32, 32), (96, -1), (320, 64)])
def test_a_sweep_is_coordinate_descent(columns: int, group_size: int) -> None:
    objective, rounded = problem(24, columns, group_size, 0)
    found = sweep(objective, rounded, couple(objective.moments, factor(objective.moments, TOKENS)))
    exact = by_columns(objective.weight.double(), rounded, damped(objective.moments.double()))
    assert float((found.values == exact).float().mean()) > 0.99  # a last digit may tip a value
    changed = (found.values != rounded.values).float().mean()
    assert 0.01 < float(changed) < 0.5


def test_no_row_errs_more_and_all_together_much_less() -> None:
    for seed in range(3):
        objective, rounded = problem(48, 256, 64, seed)
        coupling = couple(objective.moments, factor(objective.moments, TOKENS))
        found = descend(objective, rounded, coupling, rounds=2, sweeps=2)
        before, after = objective.losses(rounded), objective.losses(found)
        assert bool((after <= before).all())
        assert float(after.sum()) < 0.93 * float(before.sum())
        exact = loss(error(objective.weight.double(), found, found.values), damped(objective.moments.double()))
        assert float(after.sum()) == pytest.approx(exact, rel=1e-3)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    objective, rounded = problem(6, 128, 32, 1)
    found = refit_scales(objective, rounded)
    assert found.scales.dtype == torch.float16 and torch.equal(found.values, rounded.values)
    root = torch.linalg.cholesky(damped(objective.moments.double()))
    for row in range(6):
        levels = rounded.values[row].double() - rounded.zeros[row].double().repeat_interleave(32)
        parts = torch.zeros(128, 4).double()
        for group in range(4):
            parts[group * 32 : (group + 1) * 32, group] = levels[group * 32 : (group + 1) * 32]
        best = torch.linalg.lstsq(root.t() @ parts, (root.t() @ objective.weight[row].double()).unsqueeze(1)).solution
        torch.testing.assert_close(found.scales[row].double(), best.squeeze(1), rtol=2e-3, atol=0)


def test_groups_that_tell_nothing_keep_their_scales() -> None:
    objective, rounded = problem(8, 96, 32, 2)
    silent = QuantizedLinear(rounded.values.clone(), rounded.zeros, rounded.scales)
    silent.values[:, :32] = rounded.zeros[:, :1]  # all weights of the first group are zero
    found = refit_scales(objective, silent)
    assert torch.equal(found.scales[:, 0], rounded.scales[:, 0])
    assert bool(found.scales.isfinite().all())


def test_rows_can_be_gone_over_in_parts() -> None:
    objective, rounded = problem(40, 96, 32, 3)
    coupling = couple(objective.moments, factor(objective.moments, TOKENS))
    whole = descend(objective, rounded, coupling, rounds=1, sweeps=1)
    half = Objective(objective.weight[:20], objective.moments, objective.damping)
    part = QuantizedLinear(rounded.values[:20], rounded.zeros[:20], rounded.scales[:20])
    found = descend(half, part, coupling, rounds=1, sweeps=1)
    assert float((found.values == whole.values[:20]).float().mean()) > 0.99


AGREE = """
import sys
import torch
from tests.unit.toolkit.quantize.search.test_descent import TOKENS, problem
from toolkit.formats.packing import QuantizedLinear
from toolkit.quantize.search import compensate as module
from toolkit.quantize.search.compensate import factor
from toolkit.quantize.search.descent import Objective, couple, descend
from toolkit.quantize.search.kernels import compensate as kernel

def on(device, width, rounder):
    module._rounder = lambda _: (width, rounder)
    there = Objective(objective.weight.to(device), objective.moments.to(device), objective.damping.to(device))
    begun = QuantizedLinear(*(part.to(device) for part in (rounded.values, rounded.zeros, rounded.scales)))
    found = descend(there, begun, couple(there.moments, factor(there.moments, TOKENS)), rounds=1, sweeps=2)
    return float(there.losses(found).sum())

for rows, columns, group_size in ((70, 320, 64), (5, 96, -1)):
    objective, rounded = problem(rows, columns, group_size, 0)
    ours = on("cpu", module.BLOCK, module.round_block)
    theirs = on(sys.argv[1], kernel.BLOCK, kernel.round_block)
    assert abs(theirs / ours - 1) < 0.01, (rows, columns, theirs / ours)
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernel_descends_as_far(device: str) -> None:
    pytest.importorskip("triton")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    subprocess.run([sys.executable, "-c", AGREE, device], env={**os.environ, **interpreted}, check=True, timeout=240)
