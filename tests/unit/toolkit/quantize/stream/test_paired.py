"""The samples on two ways: what a unit is given on both, token by token, and nothing behind it is run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.unit.toolkit.quantize.stream.test_passing import CPU, HIDDEN, INNER, layer_of, states_of
from toolkit.errors import ResourceError
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.stream.paired import PairedStream
from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.states import Inputs, States

RESIDUALS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def paired_of(lengths: list[int], notes: list[str]) -> PairedStream:
    stream = LayerStream(QWEN2_VL.fused, (HIDDEN, INNER), CPU, CPU, on_note=notes.append)
    stream.calibration, stream.held = states_of(lengths), states_of([20, 5])
    return PairedStream(stream, RESIDUALS)


def quantized(layer: Any) -> Any:
    """A layer that is a little off."""
    found = copy.deepcopy(layer)
    for parameter in found.parameters():
        parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return found


def given(layer: Any, states: States, name: str) -> torch.Tensor:
    """What a module of a layer is given of all samples, from a whole pass."""
    seen: list[torch.Tensor] = []
    handle = layer.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    layer(**states.inputs(states.batch(0, 10**6), CPU))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("unit", list(QWEN2_VL.fused))
def test_a_units_inputs_are_those_of_a_whole_pass(unit: str) -> None:
    torch.manual_seed(0)
    layer, paired = layer_of(), paired_of([100] * 6, [])
    other, name = quantized(layer), QWEN2_VL.fused[unit][0]
    paired.advance(other)  # so that the samples differ on the two ways
    paired.source.chunk_tokens = 256
    source, behind = paired.source.calibration, paired.calibration
    before = source.hidden.clone(), behind.hidden.clone()
    found: list[tuple[Inputs, Inputs]] = []
    tokens: list[slice] = []

    def take(a: Inputs, b: Inputs, part: slice) -> None:
        found.append((a, b))
        tokens.append(part)

    paired.compare(layer, other, unit, take)
    assert [(part.start, part.stop) for part in tokens] == [(0, 200), (200, 400), (400, 600)]
    for way, (module, states) in enumerate(((layer, source), (other, behind))):
        x = torch.cat([pair[way].x for pair in found])
        torch.testing.assert_close(x, given(module, states, name), rtol=1e-4, atol=1e-5)
        residuals = [pair[way].residual for pair in found]
        if unit in RESIDUALS:
            whole = given(module, states, RESIDUALS[unit])
            torch.testing.assert_close(torch.cat([r for r in residuals if r is not None]), whole, rtol=1e-4, atol=1e-5)
        else:
            assert residuals == [None] * 3
    assert torch.equal(source.hidden, before[0]) and torch.equal(behind.hidden, before[1])


def test_the_held_samples_are_compared_and_go_on() -> None:
    torch.manual_seed(1)
    layer, paired = layer_of(), paired_of([30], [])
    other, states = quantized(layer), paired.source.held
    before = states.hidden.clone()
    paired.advance(other)
    assert not torch.equal(paired.held.hidden, before) and torch.equal(states.hidden, before)
    source, behind = paired.compare_held(layer, states, other, "mlp.down_proj")
    torch.testing.assert_close(source.x, given(layer, states, "mlp.down_proj"))
    torch.testing.assert_close(behind.x, given(other, paired.held, "mlp.down_proj"))
    assert source.residual is not None and source.residual.shape == (25, HIDDEN)


def test_nothing_behind_a_unit_is_run() -> None:
    layer, paired = layer_of(), paired_of([30], [])

    def never(*_: Any) -> None:
        raise AssertionError("the MLP was run")

    layer.mlp.register_forward_pre_hook(never)
    for unit in ("self_attn.qkv_proj", "self_attn.o_proj"):
        paired.compare(layer, layer, unit, lambda *_: None)
    with pytest.raises(AssertionError, match="the MLP was run"):
        paired.compare(layer, layer, "mlp.gate_up_proj", lambda *_: None)


def test_out_of_memory_counts_no_token_twice() -> None:
    layer, notes = layer_of(), []  # type: Any, list[str]
    paired = paired_of([100] * 6, notes)
    paired.source.chunk_tokens = 512
    original = layer.self_attn.forward

    def hungry(**arguments: Any) -> Any:
        if arguments["hidden_states"].shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(**arguments)

    layer.self_attn.forward = hungry
    taken: list[int] = []
    paired.compare(layer, quantized(layer_of()), "self_attn.o_proj", lambda a, b, part: taken.append(part.stop))
    assert taken == [200, 400, 600]
    assert len(notes) == 1 and "256 tokens at a time" in notes[0]
    paired.source.chunk_tokens = 100
    layer.self_attn.forward = lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ResourceError, match="one sample of 100 tokens does not fit"):
        paired.compare(layer, layer, "self_attn.o_proj", lambda *_: None)


def test_there_is_no_room_to_make_on_a_cpu() -> None:
    assert not paired_of([10], []).make_room()
