"""What compensated rounding costs: the factor of the moments and the walk over the columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.quantize.search.compensate import compensate, factor
from toolkit.quantize.search.grid import round_to_grid

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

GROUP, TOKENS = 128, 8192
#: Device and shape [N, K]: gate+up and down of the embedded model, gate+up of the 2B; what of the 7B shares an input.
SHAPES = {
    "embedded gate+up": ("cpu", 1024, 256),
    "embedded down": ("cpu", 256, 512),
    "2B gate+up": ("cpu", 17920, 1536),
    "7B qkv": ("cuda", 4608, 3584),
    "7B o": ("cuda", 3584, 3584),
    "7B gate+up": ("cuda", 37888, 3584),
    "7B down": ("cuda", 3584, 18944),
}


def _timed(benchmark: BenchmarkFixture, device: str, function: Callable[..., Any], *args: Any) -> None:
    """Time some calls after a first one that compiles; a call ends when the device is done."""

    def call() -> None:
        function(*args)
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark(call)


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Device, weight [N, K] and moments [K, K]; products in TF32, as the quantizer has them."""
    device, rows, columns = request.param
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    rng = torch.Generator(device).manual_seed(0)
    x = torch.randn(TOKENS, columns, generator=rng, device=device)
    return device, torch.randn(rows, columns, generator=rng, device=device), x.t() @ x / TOKENS


def test_factor(benchmark: BenchmarkFixture, case: tuple[str, torch.Tensor, torch.Tensor]) -> None:
    """Factor the moments."""
    device, _, moments = case
    _timed(benchmark, device, factor, moments, TOKENS)


def test_compensate(benchmark: BenchmarkFixture, case: tuple[str, torch.Tensor, torch.Tensor]) -> None:
    """Round with the factor."""
    device, weight, moments = case
    grid = round_to_grid(weight, GROUP)
    _timed(benchmark, device, compensate, weight, grid.scales, grid.zeros, factor(moments, TOKENS))
