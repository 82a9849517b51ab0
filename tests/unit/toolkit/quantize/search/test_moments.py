"""The search for a decoder layer: never worse than rounding, and what it writes is what it measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from toolkit.compat import patch_torchvision
from toolkit.formats.packing import dequantize
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.gram import Moments
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.moments import LayerSearch
from toolkit.quantize.search.strategy import LayerTask, Searched, SearchSettings, linear
from toolkit.quantize.stream.states import Held, States, register_attention

HIDDEN, INNER, HEADS = 64, 128, 4


def layer_of(kv_heads: int, seed: int, spread: float) -> Any:
    """Return a decoder layer with channels that differ in size, as trained ones do."""
    patch_torchvision()
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

    register_attention()
    torch.manual_seed(seed)
    config = Qwen2VLTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        vocab_size=32,
        use_sliding_window=False,
    )
    config._attn_implementation = "qvl_packed"
    layer = Qwen2VLDecoderLayer(config, 0).eval().requires_grad_(False)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(torch.randn(HIDDEN).mul(spread).exp().half())
    for rows in (layer.mlp.up_proj.weight, layer.self_attn.v_proj.weight):
        rows.mul_(torch.randn(len(rows), 1).mul(spread).exp())
    return layer


def states_of(tokens: int, lengths: list[int]) -> States:
    rope = torch.randn(1, tokens, HIDDEN // HEADS)
    return States(
        torch.randn(1, tokens, HIDDEN), (rope.cos(), rope.sin()), lengths, torch.zeros(tokens, dtype=torch.bool)
    )


def run(layer: Any, states: States) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a layer's output and its units' inputs."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer.get_submodule(names[0]).register_forward_pre_hook(lambda _, a, u=unit: seen.__setitem__(u, a[0][0]))
        for unit, names in QWEN2_VL.fused.items()
    ]
    output = layer(**states.inputs(states.batch(0, 10**6), torch.device("cpu")))
    for handle in handles:
        handle.remove()
    return output, seen


def search(
    layer: Any,
    *,
    group_size: int = 32,
    rounding: str = "nearest",
    skip: Iterable[str] = (),
    make_room: Callable[[], bool] = lambda: False,
) -> tuple[Searched, Held]:
    seen = run(layer, states_of(600, [300, 200, 100]))[1]
    moments = {}
    for unit, x in seen.items():
        moments[unit] = Moments(x.shape[1], x.device)
        moments[unit].add(x.clone())
        moments[unit].finish()
    held_states = states_of(90, [60, 30])
    output, inputs = run(layer, held_states)
    held = Held(held_states, output, inputs)
    settings = SearchSettings(QWEN2_VL, group_size, 4, torch.float16, rounding=rounding)
    task = LayerTask(0, layer, held, frozenset(skip))
    return LayerSearch(task, moments, settings, make_room).run(), held


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("group_size", [32, -1])
def test_no_linear_errs_more_than_by_rounding_to_nearest(rounding: str, kv_heads: int, group_size: int) -> None:
    scaled = 0
    for seed, spread in ((0, 0.0), (1, 1.0), (2, 3.0)):
        layer = layer_of(kv_heads, seed, spread)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        found, held = search(layer, rounding=rounding, group_size=group_size)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        for unit, names in QWEN2_VL.fused.items():
            for name in names:
                weight, x = linear(layer, name).weight, held.inputs[unit]
                nearest = dequantize(round_to_grid(weight, group_size), torch.float32)
                allowed = (x @ (nearest - weight).t()).square().sum()
                error = (x @ (found.effective(unit, name) - weight).t()).square().sum()
                # rows that a later unit's scales divide are rounded to other fp16 steps: a thousandth at most
                assert error <= allowed * 1.001, (seed, name, found.choices[name])
                scaled += found.choices[name].startswith("scaled")
    assert scaled  # scales do get chosen


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_the_file_computes_what_the_search_measured(kv_heads: int) -> None:
    """Norms, biases and scaled weights together are the source's layer with its effective weights."""
    layer = layer_of(kv_heads, 3, 1.5)
    found, held = search(layer)
    assert any(choice.startswith("scaled") for choice in found.choices.values())
    as_measured, as_written = copy.deepcopy(layer), copy.deepcopy(layer)
    for unit, names in QWEN2_VL.fused.items():
        for name in names:
            linear(as_measured, name).weight.data = found.effective(unit, name)
    state = {f"{name}.weight": dequantize(rounded, torch.float32) for name, rounded in found.linears.items()}
    as_written.load_state_dict({**found.others, **state})
    expected, got = run(as_measured, held.states)[0], run(as_written, held.states)[0]
    assert (got - expected).norm() < 1e-3 * (expected - held.states.hidden).norm()


def test_units_that_are_skipped_are_not_touched() -> None:
    layer = layer_of(2, 4, 1.5)
    found, _ = search(layer, skip=(*QWEN2_VL.fused["self_attn.qkv_proj"], "mlp.down_proj"))
    assert set(found.linears) == {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"}
    assert torch.equal(found.others["input_layernorm.weight"], layer.input_layernorm.weight)
    assert bool((found.scales["self_attn.o_proj"] == 1).all()), "v would have to be divided"
    assert "mlp.up_proj" not in found.rows and bool((found.rows["self_attn.v_proj"] == 1).all())


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_zeros_and_extremes_stay_finite(rounding: str) -> None:
    """All-zero groups, dead inputs and weights near fp16's ends."""
    layer = layer_of(2, 5, 0.5)
    layer.mlp.down_proj.weight[:, :32] = 0
    layer.mlp.up_proj.weight[:4] = 0
    layer.mlp.gate_proj.weight[7] *= 1e5
    layer.self_attn.o_proj.weight[3] *= 1e-6
    layer.input_layernorm.weight[5] = 0
    found, _ = search(layer, rounding=rounding)
    for name, rounded in found.linears.items():
        assert bool(rounded.scales.isfinite().all()) and bool((rounded.scales > 0).all()), name
    assert all(bool(value.isfinite().all()) for value in found.others.values())


@pytest.mark.parametrize("place", ["screen", "round_to_grid", "dequantize", "factor", "compensate"])
def test_out_of_memory_in_the_search_makes_room_and_changes_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.quantize.search import rounding, scales

    module = scales if place == "screen" else rounding

    expected, _ = search(layer_of(2, 3, 1.0), rounding="compensated")
    original = getattr(module, place)
    calls = rooms = 0

    def hungry(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 and rooms < 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **kwargs)

    def make_room() -> bool:
        nonlocal rooms
        rooms += 1  # the second time helps
        return True

    monkeypatch.setattr(module, place, hungry)
    layer = layer_of(2, 3, 1.0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found, _ = search(layer, rounding="compensated", make_room=make_room)
    assert rooms == 2
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert found.choices == expected.choices
    for name, linear_found in expected.linears.items():
        assert torch.equal(found.linears[name].values, linear_found.values), name

    rooms = 0
    with pytest.raises(torch.OutOfMemoryError):
        search(layer_of(2, 3, 1.0), rounding="compensated", make_room=lambda: False)
