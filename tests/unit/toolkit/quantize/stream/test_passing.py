"""Samples through a layer: in micro-batches that back off, each counted once, some of them held back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.compat import patch_torchvision
from toolkit.errors import ResourceError
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.gram import Moments
from toolkit.quantize.stream.passing import LayerStream, held_samples
from toolkit.quantize.stream.sizes import HELD_TOKENS
from toolkit.quantize.stream.states import ATTENTION, States, register_attention

HIDDEN, INNER, HEADS = 64, 128, 4
CPU = torch.device("cpu")


def layer_of() -> Any:
    patch_torchvision()
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

    register_attention()
    config = Qwen2VLTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=32,
        use_sliding_window=False,
    )
    config._attn_implementation = ATTENTION
    return Qwen2VLDecoderLayer(config, 0).eval().requires_grad_(False)


def states_of(lengths: list[int]) -> States:
    tokens = sum(lengths)
    rope = torch.randn(1, tokens, HIDDEN // HEADS)
    vision = torch.zeros(tokens, dtype=torch.bool)
    return States(torch.randn(1, tokens, HIDDEN), (rope.cos(), rope.sin()), lengths, vision)


def test_out_of_memory_in_a_pass_counts_no_token_twice() -> None:
    torch.manual_seed(0)
    layer, states = layer_of(), states_of([100] * 6)
    whole = layer(**states.inputs(states.batch(0, 10**6), CPU))
    notes: list[str] = []
    stream = LayerStream(QWEN2_VL.fused, (HIDDEN, INNER), CPU, CPU, on_note=notes.append)
    stream.chunk_tokens, stream.calibration = 512, states
    original = layer.mlp.forward

    def hungry(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(x)

    layer.mlp.forward = hungry
    moments = Moments(HIDDEN, CPU)
    taken: list[slice] = []

    def take(seen: dict[str, torch.Tensor], tokens: slice) -> None:
        taken.append(tokens)
        moments.add(seen["self_attn.qkv_proj"])

    stream.advance(layer, take)
    assert torch.allclose(states.hidden, whole, atol=1e-5)
    assert moments.weight == 600 and [s.stop for s in taken] == [200, 400, 600]
    assert len(notes) == 1 and "256 tokens at a time" in notes[-1]


def test_a_sample_that_does_not_fit_alone_is_named() -> None:
    stream = LayerStream(QWEN2_VL.fused, (HIDDEN, INNER), CPU, CPU)
    with pytest.raises(ResourceError, match=r"one sample of 300 tokens does not fit.*--max-tokens 150"):
        stream.back_off(300)


def test_looking_leaves_the_samples_where_they_are() -> None:
    layer, states = layer_of(), states_of([50, 30])
    before = states.hidden.clone()
    stream = LayerStream(QWEN2_VL.fused, (HIDDEN, INNER), CPU, CPU)
    stream.calibration, stream.held = states, states_of([20, 5])
    seen: dict[str, int] = {}

    def take(found: dict[str, torch.Tensor], tokens: slice) -> None:
        for unit, x in found.items():
            seen[unit] = seen.get(unit, 0) + len(x)

    stream.peek(layer, take)
    assert torch.equal(states.hidden, before)
    assert seen == dict.fromkeys(QWEN2_VL.fused, 80)

    given = stream.held.hidden.clone()
    held = stream.hold(layer)
    assert torch.equal(held.states.hidden, given) and torch.equal(held.output, stream.held.hidden)
    assert {unit: len(x) for unit, x in held.inputs.items()} == dict.fromkeys(QWEN2_VL.fused, 25)
    assert not torch.equal(held.output, given)


@pytest.mark.parametrize("lengths", [[7], [100] * 3, [50] * 40, [5000] * 30])
def test_few_samples_are_held_back(lengths: list[int]) -> None:
    held = held_samples(lengths)
    assert 1 <= len(held) <= max(1, round(len(lengths) / 10))
    assert len(held) * lengths[0] <= max(lengths[0], HELD_TOKENS * 1.5)
    assert held <= set(range(len(lengths)))


@pytest.mark.parametrize(
    ("lengths", "held"),
    [
        ([7], {0}),  # has to do for both
        ([100] * 2, {0}),  # half: one is held back at least
        ([100] * 9, {0}),
        ([100] * 10, {0}),  # a tenth
        ([100] * 40, {0, 10, 20, 30}),
        ([4096] * 30, {0}),  # 4,096 tokens at most
        ([1024] * 128, {0, 32, 64, 96}),
    ],
)
def test_which_samples_are_held_back(lengths: list[int], held: set[int]) -> None:
    """As docs/quantizing.md says."""
    assert held_samples(lengths) == held
