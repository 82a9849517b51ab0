"""AutoAWQ's search on our stream: it backs off, and leaves the weights as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.errors import ResourceError
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.strategy import SearchSettings
from toolkit.quantize.stream.passing import LayerStream

if TYPE_CHECKING:
    from toolkit.quantize.search.autoawq import Qwen2VLAwqQuantizer


class Hungry(torch.nn.Linear):
    """A module that runs out of memory above a number of tokens."""

    limit = 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def quantizer_of(notes: list[str], **settings: Any) -> Qwen2VLAwqQuantizer:
    from toolkit.quantize.search.autoawq import Qwen2VLAwqQuantizer  # some seconds of imports

    cpu = torch.device("cpu")
    stream = LayerStream(QWEN2_VL.fused, (8, 16), cpu, cpu, on_note=notes.append)
    stream.chunk_tokens = 512
    return Qwen2VLAwqQuantizer(stream, SearchSettings(QWEN2_VL, 32, 4, torch.float16), **settings)


def test_out_of_memory_halves_the_chunk_and_goes_on() -> None:
    notes: list[str] = []
    quantizer, module, x = quantizer_of(notes), Hungry(8, 4), torch.randn(1, 1000, 8)
    out = quantizer._module_forward(x, module, {})
    assert torch.allclose(out, torch.nn.functional.linear(x, module.weight, module.bias))
    assert quantizer.stream.chunk_tokens == 64 and len(notes) == 3 and "64 tokens at a time" in notes[-1]


def test_out_of_memory_at_any_chunk_says_what_to_do() -> None:
    module = Hungry(8, 4)
    module.limit = 0
    with pytest.raises(ResourceError, match="even with 64 tokens at a time: free memory"):
        quantizer_of([])._module_forward(torch.randn(1, 1000, 8), module, {})


@pytest.mark.parametrize("duo", [True, False])
def test_the_scale_search_leaves_the_weights_as_they_were(duo: bool) -> None:
    """AutoAWQ's own search keeps the first candidate's scaling in the weights when they are on a CPU."""
    torch.manual_seed(0)
    quantizer = quantizer_of([], duo_scaling=duo)
    linear = torch.nn.Linear(64, 16, bias=False).requires_grad_(False)
    before = linear.weight.clone()
    x = torch.randn(1, 200, 64) * torch.linspace(0.1, 4, 64)
    scales = quantizer._compute_best_scale(
        x, linear.weight.abs().mean(0), x.abs().mean((0, 1)), linear, [linear], linear(x), {}
    )
    assert torch.equal(linear.weight, before)
    assert bool(torch.isfinite(scales).all()) and not hasattr(linear.state_dict, "__wrapped__")
    from toolkit.quantize.search.autoawq import _copied_state

    with _copied_state(linear):
        linear.state_dict()["weight"].zero_()
    assert torch.equal(linear.weight, before)
