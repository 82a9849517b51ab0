"""What quantizing costs, as KL divergence on answers: of the whole checkpoint, and of each unit alone.

Finished layers wait on the disk; the source's layers are streamed once more, and samples pass through them on two ways,
or on as many as there are units. A unit's way is the source's up to its layer, through its layer with the unit's packed
weights, and through the source's layers behind it: all ways share one load of a layer, and no way runs what is before
its own layer. What comes out is compared on the tokens of the answers (`toolkit.fidelity.answers`). In float32
throughout: a unit's cost is smaller than the noise of bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.checkpoint.left_out import Linear
from toolkit.errors import FormatError
from toolkit.fidelity.answers import kl_by_answer, predictions
from toolkit.fidelity.turns import Turns
from toolkit.formats.packing import PackedLinear, dequantize, slice_outputs, unpack_as
from toolkit.quantize.head import HEAD, head_number
from toolkit.quantize.parts import Parts, read_scales
from toolkit.quantize.replay import written_layer
from toolkit.quantize.search.sizes import HEAD_ROWS
from toolkit.quantize.stream.layers import StreamedLayers
from toolkit.quantize.stream.passing import LayerStream, held_samples
from toolkit.quantize.stream.shell import embed, load_shell
from toolkit.quantize.stream.states import States
from toolkit.quantize.tower import stage_numbers

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe

__all__ = ["Cost", "UnitCosts", "Written", "cost_of_all", "cost_of_units", "held_out", "spread"]

#: Bytes of hidden states on their ways at once; what does not fit goes in a further round through the layers.
_WAYS_BYTES = {"cpu": 2**30, "cuda": 2**32}
#: Samples and tokens that units are told apart by, at most.
UNIT_SAMPLES, UNIT_TOKENS = 64, 16384


@dataclass(frozen=True)
class Cost:
    """KL(source || candidate) of each answer, summed over its tokens (nats), and how many tokens it has."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.sums) / max(1, sum(self.tokens))


@dataclass(frozen=True)
class UnitCosts:
    """What each (layer, unit) costs alone, nats a token, and over how many answers and tokens that was measured."""

    units: dict[tuple[int, str], float]
    answers: int
    tokens: int


class Written:
    """The finished layers of a run, read back."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, directory: Path, left: frozenset[Linear]) -> None:
        """Args: the source, what was asked, the journal's directory, linears that are in 16 bits."""
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.parts = Parts(directory)
        self.left = left

    def units(self, index: int, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
        """Return the weights [N, K] of a layer's packed units, by unit and linear, in the source's coordinates."""
        family, prefix = self.checkpoint.family, self.checkpoint.layer_prefix(index)
        packed = [unit for unit in family.units if (index, unit.linears[0]) not in self.left]
        scales = {name: s.to(device) for name, s in read_scales(self.parts.directory, index).items()}
        found: dict[str, dict[str, torch.Tensor]] = {}
        rows: dict[str, torch.Tensor] = {}
        with self._open(self.parts.layer_file(index)) as tensors:
            for unit in reversed(packed):
                found[unit.name] = {}
                divided = scales.get(unit.name)
                for name in unit.linears:
                    weight = self._weight(tensors, prefix + name, device)
                    if divided is not None:
                        weight /= divided
                    if name in rows:
                        weight *= rows[name].unsqueeze(1)
                    found[unit.name][name] = weight
                if divided is not None and unit.before in family.linears:
                    rows[unit.before] = self._one_each(divided, unit.before)
        return found

    def whole(self, layer: nn.Module, index: int) -> nn.Module:
        """Return a copy of the source's layer with all that the file holds of it."""
        return written_layer(layer, self.checkpoint, self.recipe, index, self.parts.layer_file(index))

    def tower(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the vision tower that the run wrote anew, by their names behind `Names.visual`."""
        prefix, layout, found = self.checkpoint.visual_prefix, LAYOUTS[self.recipe.format], {}
        for number in stage_numbers(self.checkpoint, self.recipe):
            with self._open(self.parts.layer_file(number)) as tensors:
                for name in list(tensors.keys()):
                    module, _, kind = name.rpartition(".")
                    if kind == layout.qweight:
                        weight = self._weight(tensors, module, torch.device("cpu"))
                        found[f"{module.removeprefix(prefix)}.weight"] = weight
                    elif kind not in layout.parts:
                        found[name.removeprefix(prefix)] = tensors.get_tensor(name)
        return found

    def head(self, device: torch.device) -> torch.Tensor | None:
        """Return the weight [V, D] float32 that the packed output head stands for; None where it is not packed."""
        number = head_number(self.checkpoint, self.recipe)
        if number is None:
            return None
        layout, size = LAYOUTS[self.recipe.format], self.recipe.group_size
        with self._open(self.parts.layer_file(number)) as tensors:
            packed = PackedLinear(*(tensors.get_tensor(f"{HEAD}.{part}").to(device) for part in layout.packed))
        rows = int(self.checkpoint.text_config["vocab_size"])
        found = torch.empty(rows, int(self.checkpoint.text_config["hidden_size"]), device=device)
        for start in range(0, rows, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, rows)
            part = unpack_as(self.recipe.format, slice_outputs(self.recipe.format, packed, start, stop), size)
            found[start:stop] = dequantize(part, torch.float32)
        return found

    def _open(self, file: Path) -> Any:
        from safetensors import safe_open

        return safe_open(file, framework="pt")

    def _weight(self, tensors: Any, module: str, device: torch.device) -> torch.Tensor:
        parts = (tensors.get_tensor(f"{module}.{part}").to(device) for part in LAYOUTS[self.recipe.format].packed)
        unpacked = unpack_as(self.recipe.format, PackedLinear(*parts), self.recipe.group_size)
        return dequantize(unpacked, torch.float32)

    def _one_each(self, scales: torch.Tensor, name: str) -> torch.Tensor:
        """Return the scales of a linear's rows; of query heads that share a value head, once."""
        rows = self.checkpoint.linear_shapes()[name][1]
        if len(scales) == rows:
            return scales
        head = self.checkpoint.family.widths(self.checkpoint.text_config)["head"]
        return scales.view(rows // head, -1, head)[:, 0].flatten()


def held_out(samples: Sequence[PreparedSample]) -> list[PreparedSample]:
    """Return the samples that a search was checked on and not made from; of a single one, that."""
    held = held_samples([sample.tokens for sample in samples])
    return [samples[i] for i in sorted(held)]


def spread(
    samples: Sequence[PreparedSample], most: int = UNIT_SAMPLES, tokens: int = UNIT_TOKENS
) -> list[PreparedSample]:
    """Return samples spread evenly over the whole, within bounds on their number and tokens; one at least."""
    count = min(most, len(samples), max(1, tokens * len(samples) // sum(sample.tokens for sample in samples)))
    return [samples[i * len(samples) // count] for i in range(count)]


class _Ways:
    """Samples at the first decoder layer, the source's layers, and what is compared at the end."""

    def __init__(self, written: Written, samples: Sequence[PreparedSample], turns: Turns, device: torch.device) -> None:
        self.checkpoint = checkpoint = written.checkpoint
        self.written = written
        self.device = device
        self.positions = [predictions(sample, turns) for sample in samples]
        self.tokens = [len(where) for where in self.positions]
        shell, self.config = load_shell(checkpoint, device)
        host = torch.device("cpu")
        self.states = States.join(embed(shell, samples, device, host))
        if self.states.added:
            raise FormatError("what images add behind the first layers (DeepStack) is not passed on here yet")
        self.states.exact = True
        self.begun = self.states.hidden
        self.quantized = self.begun
        if written.recipe.vision == "awq":
            shell, _ = load_shell(checkpoint, device, written.tower())
            self.quantized = States.join(embed(shell, samples, device, host)).hidden
        del shell
        self.layers = StreamedLayers(checkpoint, self.config, device)
        self.stream = LayerStream({}, self.layers.widths, device, host)
        starts = [sum(self.states.lengths[:i]) for i in range(len(samples))]
        self._rows = torch.cat([where + start for where, start in zip(self.positions, starts, strict=True)])
        self._norm = checkpoint.get(f"{checkpoint.language_prefix}norm.weight").to(device, torch.float32)
        self._head = checkpoint.get(checkpoint.head_name).to(device)

    def through(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a layer makes of hidden states [1, T, D]; these stay as they are."""
        states = copy.copy(self.states)
        states.hidden = hidden.clone()
        return self.stream.pass_through(layer, states)

    def outcome(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Return what comes out behind the last norm at each answer's tokens, [n, D] by sample."""
        rows = hidden[0, self._rows.to(hidden.device)].to(self.device)
        normed = nn.functional.rms_norm(
            rows, self._norm.shape, self._norm, float(self.checkpoint.text_config["rms_norm_eps"])
        )
        return list(normed.cpu().split(self.tokens))

    def kl(self, reference: list[torch.Tensor], hidden: torch.Tensor, own: torch.Tensor | None = None) -> list[float]:
        """Return each answer's divergence from the reference's outcome, over its tokens; with a head of its own."""
        return [float(kl.sum()) for kl in kl_by_answer(reference, self.outcome(hidden), self._head, own)]


@torch.no_grad()
def cost_of_all(
    written: Written,
    samples: Sequence[PreparedSample],
    turns: Turns,
    device: torch.device,
    on_layer: Callable[[int], None] = lambda done: None,
) -> Cost:
    """Return what the whole checkpoint costs on the answers of some samples.

    Args:
        written: its finished layers.
        samples: model inputs; of a chat without answers all text counts.
        turns: how the chat template marks answers.
        device: where layers run.
        on_layer: called with the number of layers done.
    """
    ways = _Ways(written, samples, turns, device)
    source, quantized = ways.begun, ways.quantized
    try:
        for index in range(len(ways.layers)):
            layer = ways.layers.load(index)
            source = ways.through(layer, source)
            quantized = ways.through(written.whole(layer, index), quantized)
            on_layer(index + 1)
    finally:
        ways.layers.close()
    return Cost(ways.kl(ways.outcome(source), quantized, written.head(device)), ways.tokens)


@torch.no_grad()
def cost_of_units(
    written: Written,
    samples: Sequence[PreparedSample],
    turns: Turns,
    device: torch.device,
    on_layer: Callable[[int], None] = lambda done: None,
) -> UnitCosts:
    """Return what each packed unit of the decoder costs alone; the arguments are `cost_of_all`'s."""
    ways = _Ways(written, samples, turns, device)
    family, layers = written.checkpoint.family, len(ways.layers)
    each = ways.begun.nbytes * len(family.units)
    at_once = max(1, _WAYS_BYTES[device.type] // each)
    found: dict[tuple[int, str], float] = {}
    before, done = ways.begun, 0
    total = sum(ways.tokens)
    try:
        for first in range(0, layers, at_once):
            source = before
            running: dict[tuple[int, str], torch.Tensor] = {}
            for index in range(first, layers):
                layer = ways.layers.load(index, then=index + 1 if index + 1 < layers else first + at_once)
                for unit, hidden in running.items():
                    running[unit] = ways.through(layer, hidden)
                if index < first + at_once:
                    for name, weights in written.units(index, device).items():
                        running[index, name] = _with(ways, layer, weights, source)
                    done += 1
                    on_layer(done)
                source = ways.through(layer, source)
                if index + 1 == first + at_once:
                    before = source
            reference = ways.outcome(source)
            found |= {unit: sum(ways.kl(reference, hidden)) / total for unit, hidden in running.items()}
    finally:
        ways.layers.close()
    return UnitCosts(dict(sorted(found.items())), len(samples), total)


def _with(ways: _Ways, layer: nn.Module, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Return what a layer with other weights makes of hidden states."""
    modules = {name: layer.get_submodule(name) for name in weights}
    kept = {name: module.weight for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight = nn.Parameter(weights[name], requires_grad=False)
        return ways.through(layer, hidden)
    finally:
        for name, module in modules.items():
            module.weight = kept[name]
