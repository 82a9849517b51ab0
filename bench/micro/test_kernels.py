"""Our kernel for 4-bit weights beside vLLM's and bf16: the four products of a decoder layer, on a Hopper card.

`python -m bench.studies kernels-beside` makes the page; this holds one version against the next, in the same units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch

from serve.kernels.product import CAPABILITY

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY
pytestmark = pytest.mark.skipif(
    not _HOPPER, reason="there is no Hopper card (H100, H200) for the kernels of 4-bit weights"
)

_MODELS, _KERNELS, _ROWS = ("7b", "2b"), ("qvl", "humming", "marlin", "machete", "bf16"), (1, 8, 16, 32)


@pytest.fixture(scope="module")
def vllm() -> Iterator[None]:
    """Be one process of vLLM's."""
    from bench.studies.kernels_beside import world

    with world():
        yield


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("rows", _ROWS)
@pytest.mark.parametrize("model", _MODELS)
def test_a_layers_products(benchmark: BenchmarkFixture, vllm: None, model: str, rows: int, kernel: str) -> None:
    """Microseconds of the sum, as CUDA graphs over more copies of the weights than the L2 cache holds take it."""
    from bench.studies.kernels import graph_time, shapes_of
    from bench.studies.kernels_beside import BF16, bf16_calls, kernel_calls, layers_of

    products: list[Sequence[Callable[[], object]]] = []
    for columns, inputs in shapes_of(model).values():
        if kernel == BF16:
            products.append(bf16_calls(columns, inputs, rows))
            continue
        layers: Any = layers_of(kernel, columns, inputs)
        assert layers.error(rows) < 5e-3
        products.append(kernel_calls(layers, rows))
    times = [graph_time(calls) for calls in products]
    benchmark.extra_info |= {"us": round(sum(times), 1), "products": " ".join(f"{each:.1f}" for each in times)}
    benchmark(lambda: [calls[0]() for calls in products])
