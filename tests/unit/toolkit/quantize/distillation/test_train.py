"""The loop: what was held back decides, the same twice, and less at a time where memory is short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.short import short_demo
from tests.unit.toolkit.quantize.distillation.test_layers import CPU, RECIPE, write_nearest
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ResourceError
from toolkit.quantize.distillation.divergence import Head
from toolkit.quantize.distillation.layers import Student, learning_layer
from toolkit.quantize.distillation.lessons import Lessons, apart
from toolkit.quantize.distillation.train import Distilled, Rates, distill
from toolkit.quantize.parts import Parts
from toolkit.quantize.stream.layers import StreamedLayers
from toolkit.quantize.stream.shell import bare_model
from toolkit.quantize.stream.states import States


def test_samples_that_checked_the_search_are_not_learnt_from() -> None:
    from toolkit.quantize.stream.passing import held_samples

    for lengths in ([7], [5, 9], [100] * 30, [500] * 512):
        rest, held = apart(lengths)
        assert sorted([*rest, *held]) == list(range(len(lengths)))
        assert held_samples(lengths) <= set(held)
    assert apart([7]) == ([], [0])
    assert 512 // 20 <= len(apart([500] * 512)[1]) <= 512 // 10


def test_rates_rise_and_fall() -> None:
    paces = [Rates(warmup=0.1).pace(step, 40) for step in range(1, 41)]
    assert paces[:4] == [0.25, 0.5, 0.75, 1.0]
    assert paces[3:] == sorted(paces[3:], reverse=True) and 0 < paces[-1] < 0.01
    assert Rates().pace(1, 1) == 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    directory = tmp_path_factory.mktemp("distillation")
    checkpoint = Checkpoint.open(short_demo(directory / "short", layers=2))
    write_nearest(checkpoint, directory)
    return checkpoint, directory


def made(parts: tuple[Checkpoint, Path]) -> tuple[Student, Head, Lessons]:
    """Samples of random hidden states, which every sequence of tokens could be."""
    checkpoint, directory = parts
    torch.manual_seed(0)
    model, config = bare_model(checkpoint)
    layers = StreamedLayers(checkpoint, config, CPU)
    table = checkpoint.get(f"{checkpoint.language_prefix}embed_tokens.weight").float()
    norm = checkpoint.get(f"{checkpoint.language_prefix}norm.weight").float()
    head = Head(norm, 1e-6, table)
    states, true = [], []
    for length in [24, 40, 32, 16, 48, 24, 40, 32]:
        hidden = table[torch.randint(len(table), (1, length))]
        positions = torch.arange(length).expand(3, 1, -1)
        rope = model.model.language_model.rotary_emb(hidden, positions)
        vision = torch.zeros(length, dtype=torch.bool)
        vision[:3] = True
        states.append(States(hidden, rope, [length], vision))
    source = Student([layers.load(i) for i in range(len(layers))], CPU, narrow=False)
    for state in states:
        true.append(head.normed(source.forward(state)))
    file = Parts(directory).layer_file
    learning = [
        learning_layer(layers.load(i), checkpoint, RECIPE, i, file(i), torch.float32) for i in range(len(layers))
    ]
    return Student(learning, CPU, narrow=False), head, Lessons(states, true)


def run(parts: tuple[Checkpoint, Path], rates: Rates) -> tuple[Distilled, list[torch.Tensor]]:
    model, head, lessons = made(parts)
    found = distill(model, head, lessons, rates)
    return found, [module.value() for layer in model.learned() for module in layer.values()]


QUICK = Rates(scales=1e-3, norms=1e-3, biases=1e-3, epochs=4, steps=4)


def test_it_learns_what_the_source_says(parts: tuple[Checkpoint, Path]) -> None:
    found, _ = run(parts, QUICK)
    assert found.steps >= 16 and len(found.looks) == 5
    assert found.taken > 0 and found.looks[found.taken] == min(found.looks) < 0.98 * found.looks[0]


def test_the_same_again_is_the_same_to_the_bit(parts: tuple[Checkpoint, Path]) -> None:
    (one, values), (two, again) = run(parts, QUICK), run(parts, QUICK)
    assert one == two and all(torch.equal(a, b) for a, b in zip(values, again, strict=True))


def test_what_does_no_good_to_samples_held_back_is_not_kept(parts: tuple[Checkpoint, Path]) -> None:
    model, _, _ = made(parts)
    begun = [module.value() for layer in model.learned() for module in layer.values()]
    found, values = run(parts, Rates(scales=0.5, norms=0.5, biases=0.5, steps=4))
    assert found.taken == 0 and min(found.looks[1:]) > found.looks[0]
    assert all(torch.equal(a, b) for a, b in zip(values, begun, strict=True))


def test_short_of_memory_it_takes_less_at_a_time(
    parts: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = replace(QUICK, steps=2)
    whole, _ = run(parts, rates)
    backward = Student.backward
    sizes: list[int] = []

    def short(self: Student, states: States, kept: list[torch.Tensor], gradient: torch.Tensor) -> None:
        sizes.append(len(gradient))
        backward(self, states, kept, gradient)
        if len(gradient) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Student, "backward", short)
    model, head, lessons = made(parts)
    notes: list[str] = []
    found = distill(model, head, lessons, rates, on_note=notes.append)
    assert max(sizes) > 64 and len(notes) == 6 and "distillation goes on with 64 tokens at a time" in notes[-1]
    assert found.looks == pytest.approx(whole.looks, rel=1e-3)  # sums in another order, nothing else

    def never(self: Student, states: States, keep: list[torch.Tensor] | None = None) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Student, "forward", never)
    with pytest.raises(ResourceError, match="in distillation, even with 64 tokens at a time: free memory there"):
        distill(model, head, lessons, rates)
