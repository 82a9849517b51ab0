"""The default search: scales, clips and values of a decoder layer from second moments.

What AutoAWQ does. For each unit of a layer (q/k/v, o, gate/up, down) it tries 20 scalings. For each it multiplies the
weights, rounds them, runs the whole module on the calibration tokens, measures how far its output moved, and puts the
weights back. Then it clips each group by another grid, on some 512 of the tokens, and rounds to nearest. A candidate
costs a forward pass over all tokens, so tokens are few; inputs of all linears are kept; samples are padded to one
length, and the padding counts.

What is done here. A linear y = W x whose weights become W + D errs by tr(D H D^T), H = X^T X / n. So the samples pass
through the layer once, each alone, and only H and mean |x| are kept, however many tokens there were: [K, K] a unit.
After that a candidate costs N K^2 multiplications and no forward.

- Scales: both of AutoAWQ's families, plain and duo, in steps half as wide, screened on some rows by that trace. The
  best three are held against none at all: q/k/v and gate/up by what attention and the MLP make of held tokens, o and
  down, whose outputs are plain sums, by the trace on all rows. o_proj is scaled in grouped-query models too.
- Clips: AutoAWQ's grid and loss, from the diagonal blocks of H, so over all tokens. q and k are clipped too.
- Rounding: GPTQ's update on the grid that was chosen (:mod:`toolkit.quantize.search.compensate`): the values change,
  the format does not.
- Check: some samples are kept out of H, about a tenth of the tokens, but one sample at least. No linear may err more on
  them than by plain rounding to nearest; a choice that does is taken back, in the end to plain rounding itself. AutoAWQ
  checks nothing.

What it costs in quality and time, against AutoAWQ: docs/quantizing.md and docs/results/quantizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from toolkit.quantize.search.gram import Moments
from toolkit.quantize.search.rounding import RoundedUnit, Rounder, UnitWeights, round_unit
from toolkit.quantize.search.scales import Heads, ScaleSearch, stacked
from toolkit.quantize.search.sensitivity import token_weights
from toolkit.quantize.search.strategy import LayerTask, Searched, SearchSettings, linear
from toolkit.quantize.stream.passing import LayerStream

__all__ = ["LayerSearch", "MomentSearch"]

Result = TypeVar("Result")


class MomentSearch:
    """Gathers moments while the samples pass through a layer, and searches with them."""

    advances = True

    def __init__(self, stream: LayerStream, settings: SearchSettings, balance: Sequence[float] | None = None) -> None:
        """Args: the samples, what holds for all layers, and of each layer what a vision token counts (None: 1)."""
        self.stream = stream
        self.settings = settings
        self.balance = balance

    def search(self, task: LayerTask) -> Searched:
        """Search a layer; the samples stand before the next one afterwards."""
        moments = self._moments(task)
        task.clock("forward")
        return LayerSearch(task, moments, self.settings, self.stream.make_room).run()

    def _moments(self, task: LayerTask) -> dict[str, Moments]:
        """Return the moments of each unit's input, from one pass."""
        stream = self.stream
        moments = {
            unit: Moments(linear(task.layer, names[0]).in_features, stream.device, narrow=stream.narrow)
            for unit, names in stream.units.items()
        }
        weights = None if self.balance is None else token_weights(stream.calibration.vision, self.balance[task.index])

        def take(seen: dict[str, torch.Tensor], tokens: slice) -> None:
            for unit, x in seen.items():
                moments[unit].add(x, None if weights is None else weights[tokens])

        stream.advance(task.layer, take)
        for found in moments.values():
            found.finish()
        return moments


class LayerSearch:
    """The search for one decoder layer."""

    def __init__(
        self,
        task: LayerTask,
        moments: dict[str, Moments],
        settings: SearchSettings,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args.

        task: the layer.
        moments: of each unit's input, by the unit's name; used up one by one.
        settings: what holds for all layers.
        make_room: called when the device is out of memory; returns whether more of it is free now.
        """
        self.task = task
        self.moments = moments
        self.settings = settings
        self.make_room = make_room
        self.units = settings.family.fused
        self.weights = {name: linear(task.layer, name).weight.data for name in settings.family.linears}

    @torch.no_grad()
    def run(self) -> Searched:
        """Search, round and check; see the module."""
        units = [unit for unit, names in self.units.items() if names[0] not in self.task.skip]
        if self.settings.scale:
            scaling = ScaleSearch(self.task, self.moments, self.weights, self.settings)
            scales = {unit: self._persist(partial(scaling.best, unit)) for unit in units}
        else:
            scales = {unit: torch.ones_like(self.moments[unit].sizes) for unit in units}
        self.task.clock("scale")
        norms_and_biases = {
            name: value
            for name, value in self.task.layer.state_dict().items()
            if name.removesuffix(".weight") not in self.weights
        }
        self.found = Searched(others=norms_and_biases)
        # a unit's scales divide the rows of the linear before it, so what comes last is settled first
        for unit in reversed(units):
            self._persist(partial(self._round, unit, scales[unit]))
            del self.moments[unit]
        return self.found

    def _persist(self, step: Callable[[], Result]) -> Result:
        """Do a step, which changes nothing before its end; out of memory, again once there is more room."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return step()
        # here the error is gone, and with it what the failed step had allocated
        return self._persist(step) if self.make_room() else step()

    def _round(self, unit: str, scales: torch.Tensor) -> None:
        """Round a unit's linears, and divide what comes before them by the scales that were taken."""
        names = self.units[unit]
        weight = stacked(self.weights, names)
        rounder = Rounder(self.moments[unit], self.settings)
        self.task.clock("factor")
        sizes = [len(self.weights[name]) for name in names]
        ones = weight.new_ones(1, 1)
        divided = [self.found.rows.get(name, ones).expand(size, 1) for name, size in zip(names, sizes, strict=True)]
        rounded = round_unit(
            UnitWeights(weight, sizes, torch.cat(divided), self.task.held.inputs[unit]), rounder, scales
        )
        self.task.clock("round")
        self._take(unit, rounded)

    def _take(self, unit: str, rounded: RoundedUnit) -> None:
        found, settings = self.found, self.settings
        for name, part, choice in zip(self.units[unit], rounded.linears, rounded.choices, strict=True):
            found.linears[name] = part
            found.choices[name] = choice
        name, scales = settings.family.before[unit], rounded.scales
        found.scales[unit] = scales
        if f"{name}.weight" in found.others:
            old = found.others[f"{name}.weight"]
            found.others[f"{name}.weight"] = (old / scales).to(settings.norm_dtype).float()
            return
        if len(scales) != len(self.weights[name]):  # value heads that several heads share
            scales = Heads.of(self.task.layer).one_each(scales)
        found.rows[name] = scales.unsqueeze(1)
        self.weights[name] = self.weights[name] / found.rows[name]
        if f"{name}.bias" in found.others:
            found.others[f"{name}.bias"] = found.others[f"{name}.bias"] / scales
