"""The thorough search (``--effort best``): every unit is rounded on what reaches it once all before it is rounded.

What the default does. A layer's inputs come from the source's layers, so its weight W is rounded to Q with Q x close to
W x, x the source's input. But what Q will be given is x', behind layers that are quantized, and what has been lost on
the way adds up.

What is done here. The samples pass on two ways, through the source's layers and through those that are quantized
already, unit by unit: q/k/v, then o behind quantized q/k/v, then gate/up, then down. Q x' is to be close to W x, which
GPTAQ (arXiv 2504.02692) calls asymmetric calibration. Of both ways only moments are kept: H of x', and the drift
D = mean (x - x') x'^T. With H damped, the real weight that comes closest to W x from x' is

    W* = W + W D H^-1

and what Q errs by beside that is tr((W* - Q) H (W* - Q)^T), as always: W* is rounded in place of W, by compensated
rounding, then by coordinate descent with scales that are refitted (:mod:`toolkit.quantize.search.descent`). Norms and
biases stay the source's: AWQ's scales are not searched for (in the default search most of them lose their check under
compensation; what they would bring here was not measured).

So a layer follows from the source and from the layers before it as they were written; a run that goes on passes its
samples through those (:mod:`toolkit.quantize.replay`), and several devices can't share the layers out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from toolkit.formats.packing import QuantizedLinear, dequantize
from toolkit.quantize.search.clips import best_clip
from toolkit.quantize.search.compensate import Factor, compensate, factor
from toolkit.quantize.search.descent import Objective, couple, descend
from toolkit.quantize.search.gram import PairedMoments, exact_products
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.scales import stacked
from toolkit.quantize.search.sensitivity import token_weights
from toolkit.quantize.search.strategy import LayerTask, Searched, SearchSettings, linear
from toolkit.quantize.stream.paired import PairedStream
from toolkit.quantize.stream.states import Inputs

if TYPE_CHECKING:
    from toolkit.models.family import Family

__all__ = ["RESIDUAL", "ChainedSearch", "UnitRounding", "asymmetric_target", "residuals_of"]

Result = TypeVar("Result")
#: How a layer's tensor stands in the file, by layer and local name: float32 again.
Written = Callable[[int, str, torch.Tensor], torch.Tensor]

#: Whether units that end a branch make up for what the hidden states have lost too.
RESIDUAL = False
#: How often scales are refitted, and sweeps before each time and at the end.
_ROUNDS, _SWEEPS = 2, 2


def residuals_of(family: Family) -> dict[str, str]:
    """Return, by the units whose outputs are added to the hidden states, the norm that is given those states.

    A unit behind a linear ends a branch that began with the norm before it.
    """
    found, norm = {}, ""
    for unit in family.units:
        if unit.before in family.norms:
            norm = unit.before
        else:
            found[unit.name] = norm
    return found


@torch.no_grad()
@exact_products()
def asymmetric_target(weight: torch.Tensor, moments: PairedMoments, factor: Factor) -> torch.Tensor:
    """Return W + (W D + R) H^-1: what comes closest to the source's output on inputs behind quantized layers.

    Args:
        weight: W, [N, K] float32.
        moments: of its inputs, with their drift D and R, what is lacking of what the outputs are added to.
        factor: of H, damped: L_ik / L_kk above the diagonal, and L_kk.
    """
    moved = weight @ moments.drift
    if len(moments.lack):
        moved += moments.lack
    moved = moved.t()[factor.order]
    # H = U^T P^2 U with U the feedback, unit upper triangular, and P the pivots
    moved = torch.linalg.solve_triangular(factor.feedback.mT, moved, upper=False, unitriangular=True)
    moved.div_(factor.pivots.square().unsqueeze(1))
    moved = torch.linalg.solve_triangular(factor.feedback, moved, upper=True, unitriangular=True)
    target = weight.clone()
    target[:, factor.order] += moved.t()
    return target


class ChainedSearch:
    """Searches layers in their order, each on what those before it have become."""

    advances = True

    def __init__(
        self,
        paired: PairedStream,
        settings: SearchSettings,
        written: Written,
        balance: Sequence[float] | None = None,
    ) -> None:
        """Args: the samples, what holds for all layers, how tensors stand in the file, and of each layer what a vision
        token counts (None: 1).
        """
        self.paired = paired
        self.settings = settings
        self.written = written
        self.balance = balance

    @torch.no_grad()
    def search(self, task: LayerTask) -> Searched:
        """Search a layer; the samples stand before the next one afterwards, on both ways."""
        quantized = copy.deepcopy(task.layer)
        for name, value in quantized.state_dict().items():
            value.copy_(self.written(task.index, name, value))
        linears = {f"{name}.weight" for name in self.settings.family.linears}
        others = {name: value for name, value in task.layer.state_dict().items() if name not in linears}
        found = Searched(others=others)
        for unit, names in self.settings.family.fused.items():
            if names[0] not in task.skip:
                self._round(unit, task, quantized, found)
        self.paired.source.advance(task.layer)
        self.paired.advance(quantized)
        task.clock("forward")
        return found

    def _round(self, unit: str, task: LayerTask, quantized: nn.Module, found: Searched) -> None:
        """Round a unit's linears, and put them into the quantized layer."""
        names = self.settings.family.fused[unit]
        weights = {name: linear(task.layer, name).weight.data for name in names}
        weight = stacked(weights, names)
        moments = self._persist(partial(self._moments, unit, task, quantized))
        held = self._persist(partial(self.paired.compare_held, task.layer, task.held.states, quantized, unit))
        task.clock("forward")
        rounding = UnitRounding(weight, [len(weights[name]) for name in names], moments, held, self.settings)
        for name, (part, choice) in zip(names, self._persist(rounding.run), strict=True):
            found.linears[name] = part
            found.choices[name] = choice
            linear(quantized, name).weight.data = dequantize(part, torch.float32)
        found.scales[unit] = weight.new_ones(weight.shape[1])
        task.clock("round")

    def _moments(self, unit: str, task: LayerTask, quantized: nn.Module) -> PairedMoments:
        """Return the moments of a unit's input on both ways, from one pass to it."""
        stream = self.paired.source
        first = linear(task.layer, self.settings.family.fused[unit][0])
        residual = first.out_features if unit in self.paired.residuals else 0
        moments = PairedMoments(first.in_features, residual, stream.device, narrow=stream.narrow)
        weights = None if self.balance is None else token_weights(stream.calibration.vision, self.balance[task.index])

        def take(source: Inputs, behind: Inputs, tokens: slice) -> None:
            moments.add_pair(source, behind, None if weights is None else weights[tokens])

        self.paired.compare(task.layer, quantized, unit, take)
        moments.finish()
        return moments

    def _persist(self, step: Callable[[], Result]) -> Result:
        """Do a step, which changes nothing before its end; out of memory, again once there is more room."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return step()
        return self._persist(step) if self.paired.make_room() else step()


class UnitRounding:
    """Rounds the linears that share an input."""

    def __init__(
        self,
        weight: torch.Tensor,
        sizes: list[int],
        moments: PairedMoments,
        held: tuple[Inputs, Inputs],
        settings: SearchSettings,
    ) -> None:
        """Args.

        weight: the source's, one above the other: float32 [N, K]. sizes: rows of each linear.
        moments: of the inputs behind quantized layers.
        held: what samples kept apart give it, in the source and behind quantized layers.
        settings: what holds for all layers.
        """
        self.weight = weight
        self.sizes = sizes
        self.moments = moments
        self.settings = settings
        source, behind = held
        self.held = behind.x
        self.true = source.x @ weight.t()
        if source.residual is not None and behind.residual is not None:
            self.true += source.residual - behind.residual

    def run(self) -> list[tuple[QuantizedLinear, str]]:
        """Return each linear rounded and, in words, how.

        No linear may err more on the held samples than by plain rounding to nearest: one that does is rounded without
        regard to what was lost before it, in the end plainly.
        """
        plain = round_to_grid(self.weight, self.settings.group_size, self.settings.bits)
        limits = self._errors(plain)
        taken: list[tuple[QuantizedLinear, str] | None] = [None] * len(self.sizes)
        for asymmetric in (True, False):
            rounded = self._rounded(asymmetric)
            for i, (part, error) in enumerate(zip(self._split(rounded), self._errors(rounded), strict=True)):
                if taken[i] is None and error <= limits[i]:
                    taken[i] = part, "asymmetric" if asymmetric else "symmetric"
            if all(taken):
                break
        return [found or (part, "plain rounding") for found, part in zip(taken, self._split(plain), strict=True)]

    def _rounded(self, asymmetric: bool) -> QuantizedLinear:
        moments, bits = self.moments, self.settings.bits
        made = factor(moments.second, moments.tokens)
        target = asymmetric_target(self.weight, moments, made) if asymmetric else self.weight
        grid = self._grid(target)
        values = compensate(target, grid.scales, grid.zeros, made, bits)
        begun = QuantizedLinear(values, grid.zeros, grid.scales)
        objective = Objective(target, moments.second, made.damping, bits)
        return descend(objective, begun, couple(moments.second, made), _ROUNDS, _SWEEPS)

    def _grid(self, weight: torch.Tensor) -> QuantizedLinear:
        if self.settings.clip:
            bound = best_clip(weight, self.moments.blocks(self.settings.group_size), self.settings.bits)
            weight = weight.view(*bound.shape[:2], -1).clamp(-bound, bound).view(weight.shape)
        return round_to_grid(weight, self.settings.group_size, self.settings.bits)

    def _errors(self, rounded: QuantizedLinear) -> list[float]:
        """Return the squared error of each linear's output on the held samples."""
        wrong = (self.held @ dequantize(rounded, torch.float32).t()).sub_(self.true)
        return [float(part.square().sum()) for part in wrong.split(self.sizes, dim=1)]

    def _split(self, unit: QuantizedLinear) -> list[QuantizedLinear]:
        parts = (part.split(self.sizes) for part in (unit.values, unit.zeros, unit.scales))
        return [QuantizedLinear(*each) for each in zip(*parts, strict=True)]
