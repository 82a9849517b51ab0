"""Rounding the linears that share an input: scaled or not, clipped or not, checked on tokens kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from toolkit.formats.packing import QuantizedLinear, dequantize
from toolkit.quantize.search.clips import best_clip
from toolkit.quantize.search.compensate import Factor, compensate, factor
from toolkit.quantize.search.gram import Moments
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.scales import stride_of
from toolkit.quantize.search.strategy import SearchSettings

__all__ = ["RoundedUnit", "Rounder", "UnitWeights", "round_unit"]


@dataclass(frozen=True)
class UnitWeights:
    """The weights of linears that share an input, one above the other, in the source's coordinates.

    ``weight``: float32 [N, K]. ``sizes``: rows of each linear. ``divided``: [N, 1], what later units' scales have
    divided its rows by. ``inputs``: held tokens [n, K], which tell an error.
    """

    weight: torch.Tensor
    sizes: list[int]
    divided: torch.Tensor
    inputs: torch.Tensor

    def errors(self, rounded: QuantizedLinear, scales: torch.Tensor, rows: slice = slice(None)) -> list[float]:
        """Return the mean squared error of each linear's output; ``rounded`` has these rows, under scales [K]."""
        wrong = dequantize(rounded, torch.float32).div_(scales).sub_(self.weight[rows]).mul_(self.divided[rows])
        squares = torch.linalg.vector_norm(self.inputs @ wrong.t(), dim=0).square_().div_(len(self.inputs))
        whole = squares.new_zeros(len(self.weight))
        whole[rows] = squares
        return [float(part.sum()) for part in whole.split(self.sizes)]


@dataclass(frozen=True)
class RoundedUnit:
    """What was chosen: ``scales`` [K], and for each linear its values and, in words, how it was rounded."""

    scales: torch.Tensor
    linears: list[QuantizedLinear]
    choices: list[str]


class Rounder:
    """Rounds rows of a unit's weight, given in the source's coordinates, under the scales that are set."""

    def __init__(self, moments: Moments, settings: SearchSettings) -> None:
        self.moments = moments
        self.settings = settings
        compensated = settings.rounding == "compensated"
        self.factor: Factor | None = factor(moments.second, moments.tokens) if compensated else None
        self.scales = torch.ones_like(moments.sizes)
        self.blocks: torch.Tensor | None = None

    def scale(self, scales: torch.Tensor) -> None:
        """Set the scales [K]. The factor of the moments is scaled with them, which costs 0.4% against a new one."""
        if self.factor is not None and not torch.equal(scales, self.scales):
            ratio = (scales / self.scales)[self.factor.order]
            self.factor.feedback.mul_(ratio.unsqueeze(1)).div_(ratio)
        self.scales = scales
        self.blocks = None

    def __call__(self, rows: torch.Tensor, clips: Iterable[bool], sizes: list[int]) -> QuantizedLinear:
        """Round rows [N, K]; ``clips`` says for each part, of ``sizes`` rows, whether it is clipped."""
        weight = rows * self.scales
        grids = [self._grid(part, clip) for part, clip in zip(weight.split(sizes), clips, strict=True)]
        grid = grids[0] if len(grids) == 1 else QuantizedLinear(
            *(torch.cat(parts) for parts in zip(*((g.values, g.zeros, g.scales) for g in grids), strict=True))
        )  # fmt: skip
        if self.factor is None:
            return grid
        values = compensate(weight, grid.scales, grid.zeros, self.factor, self.settings.bits)
        return QuantizedLinear(values, grid.zeros, grid.scales)

    def nearest(self, weight: torch.Tensor) -> QuantizedLinear:
        """Round a weight to nearest, whatever the settings and the scales."""
        return round_to_grid(weight, self.settings.group_size, self.settings.bits)

    def _grid(self, weight: torch.Tensor, clip: bool) -> QuantizedLinear:
        if clip:
            if self.blocks is None:
                self.blocks = self.moments.blocks(self.settings.group_size, self.scales)
            bound = best_clip(weight, self.blocks, self.settings.bits)
            weight = weight.view(*bound.shape[:2], -1).clamp(-bound, bound).view(weight.shape)
        return self.nearest(weight)


def round_unit(unit: UnitWeights, rounder: Rounder, scales: torch.Tensor) -> RoundedUnit:
    """Round a unit's linears, scaled or not and clipped or not: whatever errs less on the held tokens.

    Which it is is told by some of the rows, since rows do not depend on each other. Scales [K] with which any of the
    linears then errs more than by plain rounding are not taken; a linear that still does is rounded plainly.
    """
    ones = torch.ones_like(scales)
    plain = rounder.nearest(unit.weight)
    limits = unit.errors(plain, rounder.scales)
    trials = []
    for candidate in [ones] if torch.equal(scales, ones) else [ones, scales]:
        rounder.scale(candidate)
        clips, error = _best_clips(unit, rounder)
        trials.append((candidate, clips, error))
    for candidate, clips, _ in sorted(trials, key=lambda trial: trial[2]):
        rounder.scale(candidate)
        rounded = rounder(unit.weight, clips, unit.sizes)
        reached = unit.errors(rounded, candidate)
        worse = [error > limit for error, limit in zip(reached, limits, strict=True)]
        if not any(worse) or candidate is ones:
            break
    scaled = "unscaled" if candidate is ones else "scaled"
    parts, safe = _split(rounded, unit.sizes), _split(plain, unit.sizes)
    return RoundedUnit(
        candidate,
        [plainly if bad else part for part, plainly, bad in zip(parts, safe, worse, strict=True)],
        [
            "plain rounding" if bad else f"{scaled}, clipped" if clip else scaled
            for clip, bad in zip(clips, worse, strict=True)
        ],
    )


def _best_clips(unit: UnitWeights, rounder: Rounder) -> tuple[list[bool], float]:
    """Return which of the linears err less clipped, and the error of the better ones, both on some of the rows."""
    some = slice(None, None, stride_of(unit.weight))
    rows, ways = unit.weight[some], (False, True) if rounder.settings.clip else (False,)
    sizes = [len(rows)] * len(ways)
    # unclipped and clipped in one go: compensation takes as long for few rows as for more
    tried = _split(rounder(rows.repeat(len(ways), 1), ways, sizes), sizes)
    by_clip = [unit.errors(part, rounder.scales, some) for part in tried]
    best = [min(zip(told, ways, strict=True)) for told in zip(*by_clip, strict=True)]
    return [clip for _, clip in best], sum(error for error, _ in best)


def _split(unit: QuantizedLinear, sizes: Sequence[int]) -> list[QuantizedLinear]:
    """Return the linears of a unit."""
    parts = zip(*(part.split(list(sizes)) for part in (unit.values, unit.zeros, unit.scales)), strict=True)
    return [QuantizedLinear(*part) for part in parts]
