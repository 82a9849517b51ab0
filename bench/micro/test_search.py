"""What quantizing a layer costs: moments, scales, clips, rounding, packing, on random weights of the embedded model's
shape and of a larger one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from toolkit.formats.packing import gemm_to_gemv, pack_gemm
from toolkit.quantize.search.clips import best_clip
from toolkit.quantize.search.gram import Moments, group_moments
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.scales import scale_candidates, screen

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

GROUP = 128


@pytest.fixture(params=[(256, 512), (2048, 2048)], ids=["embedded", "2048 wide"])
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """Weights [N, K] of down_proj's shape in the embedded model, and of a larger one."""
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0))


def test_rounding(benchmark: BenchmarkFixture, weight: torch.Tensor) -> None:
    """Round to the grid."""
    benchmark(round_to_grid, weight, GROUP)


def test_packing(benchmark: BenchmarkFixture, weight: torch.Tensor) -> None:
    """Pack rounded values in the GEMM layout."""
    benchmark(pack_gemm, round_to_grid(weight, GROUP))


def test_repacking(benchmark: BenchmarkFixture, weight: torch.Tensor) -> None:
    """GEMM to GEMV."""
    benchmark(gemm_to_gemv, pack_gemm(round_to_grid(weight, GROUP)))


def test_summing_moments(benchmark: BenchmarkFixture, weight: torch.Tensor) -> None:
    """The second moments of a linear's inputs over 4,096 tokens, in batches of 512."""
    tokens = torch.randn(8, 512, weight.shape[1], generator=torch.Generator().manual_seed(1))

    def add() -> Moments:
        moments = Moments(weight.shape[1], torch.device("cpu"))
        for batch in tokens:
            moments.add(batch)
        moments.finish()
        return moments

    assert benchmark(add).tokens == 4096


def test_scale_search(benchmark: BenchmarkFixture, weight: torch.Tensor) -> None:
    """Ten of AWQ's scales, held against the moments."""
    tokens = torch.randn(4096, weight.shape[1], generator=torch.Generator().manual_seed(1))
    moments = Moments(weight.shape[1], torch.device("cpu"))
    moments.add(tokens)
    moments.finish()
    candidates = scale_candidates(moments.sizes, None, torch.arange(10) / 10)
    assert benchmark(screen, weight, moments.second, candidates, GROUP).shape == (10,)


def test_clip_search(benchmark: BenchmarkFixture, weight: torch.Tensor) -> None:
    """AutoAWQ's clip grid by second moments, 4,096 tokens."""
    tokens = torch.randn(4096, weight.shape[1], generator=torch.Generator().manual_seed(1))
    benchmark(lambda: best_clip(weight, group_moments(tokens, GROUP)))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
    ids=["7B qkv", "7B o", "7B gate+up", "7B down"],
)
def test_clip_search_on_a_gpu(benchmark: BenchmarkFixture, rows: int, columns: int) -> None:
    """The same on a GPU, for what makes up a layer of the 7B."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rng = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(rows, columns, generator=rng, device="cuda")
    moments = group_moments(torch.randn(4096, columns, generator=rng, device="cuda"), GROUP)

    def call() -> None:
        best_clip(weight, moments)
        torch.cuda.synchronize()

    call()  # compiles
    benchmark(call)


def test_clip_search_of_autoawq(benchmark: BenchmarkFixture) -> None:
    """The same grid as AutoAWQ searches it, on the 512 of 4,096 tokens that it takes; the embedded shape only."""
    from toolkit.quantize.search.autoawq import AwqQuantizer

    stock = AwqQuantizer.__new__(AwqQuantizer)
    stock.group_size, stock.w_bit, stock.zero_point = GROUP, 4, True
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(4096, 512, generator=torch.Generator().manual_seed(1))
    benchmark(stock._compute_best_clip, weight, tokens)
