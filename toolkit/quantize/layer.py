"""One decoder layer, searched in one way, or for a report in three side by side, and checked on held tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from toolkit.quantize.search.strategy import LayerTask, Searched, Strategy, linear

if TYPE_CHECKING:
    from toolkit.models.family import Family
    from toolkit.quantize.stream.passing import LayerStream

__all__ = ["Clock", "LayerQuantizer", "LayerResult"]


@dataclass
class LayerResult:
    """One quantized decoder layer.

    ``found``: what the search decided. ``error``: relative squared error of the layer's output on the held tokens,
    where what the layer adds to its input counts as the signal: |y_q - y|^2 / |y - x|^2. ``errors``: the same by way of
    quantizing ("rtn", "autoawq", "moments"), for the whole layer and for each unit alone; filled for a report.
    """

    index: int
    found: Searched
    error: float
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class LayerQuantizer:
    """Searches the layers of a stream."""

    def __init__(
        self, stream: LayerStream, family: Family, strategies: Mapping[str, Strategy], chosen: str, report: bool
    ) -> None:
        """Args.

        stream: the samples.
        family: of the model.
        strategies: ways of searching, by their names in a report; all are done.
        chosen: whose result counts.
        report: fill in ``errors`` by all of them.
        """
        self.stream = stream
        self.family = family
        self.strategies = strategies
        self.chosen = chosen
        self.report = report

    def quantize(self, task: LayerTask) -> LayerResult:
        """Search a layer and say how far its output then is from the true one; the samples go on to the next."""
        ways = {name: strategy.search(task) for name, strategy in self.strategies.items()}
        if not any(strategy.advances for strategy in self.strategies.values()):
            self.stream.advance(task.layer)
        found = ways[self.chosen]
        errors: dict[str, dict[str, float]] = {}
        if self.report:
            errors = {name: self._errors(task, searched) for name, searched in ways.items()}
            error = errors[self.chosen]["layer"]
        else:
            error = self._output_error(task, found, self._units(found))
        task.clock("check")
        return LayerResult(task.index, found, error, errors)

    def _units(self, found: Searched) -> list[str]:
        return [unit for unit in self.family.fused if unit in found.scales]

    def _errors(self, task: LayerTask, found: Searched) -> dict[str, float]:
        """Return the error of the layer with all its units quantized ("layer"), and with each alone, by unit."""
        units = self._units(found)
        alone = {unit: self._output_error(task, found, [unit]) for unit in units}
        return {"layer": self._output_error(task, found, units), **alone}

    def _output_error(self, task: LayerTask, found: Searched, units: Sequence[str]) -> float:
        """Relative squared error of the layer's output with these units quantized; see :class:`LayerResult`."""
        layer, held, device = task.layer, task.held, self.stream.device
        names = [(unit, name) for unit in units for name in self.family.fused[unit]]
        kept = {name: linear(layer, name).weight.data for _, name in names}
        for unit, name in names:
            linear(layer, name).weight.data = found.effective(unit, name)
        wrong = signal = 0.0
        for batch in held.states.batches(self.stream.chunk_tokens):
            arguments = held.states.inputs(batch, device)
            true = held.output[:, batch.start : batch.stop].to(device)
            wrong += (layer(**arguments) - true).double().pow(2).sum().item()
            signal += (true - arguments["hidden_states"]).double().pow(2).sum().item()
        for name, weight in kept.items():
            linear(layer, name).weight.data = weight
        return wrong / max(signal, 1e-30)


class Clock:
    """Adds up seconds by step; waits for the device so that a step is charged its own work."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __call__(self, step: str) -> None:
        """Charge a step with the time since the last."""
        now = self._now()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now
