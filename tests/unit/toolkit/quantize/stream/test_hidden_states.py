"""What reaches each streamed layer is what transformers' whole model gives it, for all that a model is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import chats, reference
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.models.families import FAMILIES
from toolkit.quantize.search.sensitivity import _Pass
from toolkit.quantize.stream.layers import StreamedLayers
from toolkit.quantize.stream.paired import PairedStream
from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.shell import embed, load_shell
from toolkit.quantize.stream.states import States
from toolkit.sources.random_model import write_random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.model_type)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of a family."""
    out = tmp_path_factory.mktemp("random") / request.param.model_type
    return write_random_model(f"{request.param.title.lower()}-tiny", out)


@pytest.fixture(scope="module")
def samples(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return chats.inputs(model, tmp_path_factory.mktemp("chats"))


def rows(states: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[0] for state in states])


@pytest.mark.slow
def test_hidden_states_of_each_layer_are_those_of_transformers(model: Path, samples: list[Any]) -> None:
    checkpoint = Checkpoint.open(model)
    shell, text = load_shell(checkpoint, CPU)
    layers = StreamedLayers(checkpoint, text, CPU)
    stream = LayerStream(checkpoint.family.fused, layers.widths, CPU, CPU)
    stream.capture(shell, samples)
    kept = [sample for sample in samples if sample is not samples[0]]  # the first is held back
    whole = reference.load(model).model
    inner = whole.language_model
    given: list[torch.Tensor] = []
    for layer in inner.layers:
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    expected = []
    for sample in [*kept, samples[0]]:
        given.clear()
        last = whole(**sample.inputs, use_cache=False).last_hidden_state
        expected.append([*given, last])
    assert len(expected[0]) == checkpoint.num_layers + 1
    for index in range(checkpoint.num_layers + 1):
        found = [stream.calibration.hidden, stream.held.hidden]
        if index == checkpoint.num_layers:
            found = [inner.norm(hidden) for hidden in found]
        torch.testing.assert_close(rows(found), rows([each[index] for each in expected]), rtol=1e-4, atol=1e-4)
        if index < checkpoint.num_layers:
            stream.skip(layers.load(index))


@pytest.mark.slow
def test_other_ways_through_the_layers_are_the_same(model: Path, samples: list[Any]) -> None:
    """Behind quantized layers, were they exact; and where the sensitivity to layers is measured."""
    checkpoint = Checkpoint.open(model)
    shell, text = load_shell(checkpoint, CPU)
    layers = StreamedLayers(checkpoint, text, CPU)
    stream = LayerStream(checkpoint.family.fused, layers.widths, CPU, CPU)
    stream.capture(shell, samples)
    paired = PairedStream(stream, {})
    alone = _Pass(layers, States.join(embed(shell, samples[1:], CPU, CPU)), CPU, None)
    for index in range(checkpoint.num_layers):
        layer = layers.load(index)
        before = stream.held.hidden.clone()
        held = stream.hold(layer)
        stream.advance(layer)
        paired.advance(layer)
        alone._forward(index)
        for found in (paired.calibration, alone.states):
            torch.testing.assert_close(found.hidden, stream.calibration.hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(paired.held.hidden, stream.held.hidden, rtol=1e-4, atol=1e-4)
        # what a search is judged by is the layer's own output
        assert torch.equal(held.states.hidden, before)
        batch = held.states.batch(0, 10**6)
        torch.testing.assert_close(held.output, layer(**held.states.inputs(batch, CPU)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_videos_rate_is_seen_where_the_family_sees_it(model: Path, samples: list[Any]) -> None:
    """Qwen2-VL counts frames; Qwen2.5-VL has their seconds in its positions."""
    slow, fast = samples[3], samples[4]
    shell, _ = load_shell(Checkpoint.open(model), CPU)
    told = {name: value for name, value in slow.inputs.items() if name not in ("input_ids", "pixel_values_videos")}
    if model.name == "qwen2_vl":
        assert all(torch.equal(value, fast.inputs[name]) for name, value in told.items())
    elif model.name == "qwen2_5_vl":
        assert [float(each.inputs["second_per_grid_ts"][0]) for each in (slow, fast)] == [4.0, 0.5]
    assert shell.config.model_type == model.name
