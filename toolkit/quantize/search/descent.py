"""Rounding that is gone over again: one value at a time, then the scales, while the error of the output falls.

Compensated rounding decides each column once, and can't come back to it. With E = W - Q the error of a weight [N, K]
and H the damped moments of its inputs, what a row errs by is E H E^T; as a function of one column's value alone, all
others as they are, it is least at

    W_k + sum over i != k of E_i H_ik / H_kk

rounded to the grid. Going through the columns that way is coordinate descent, and has the very shape of compensated
rounding: the errors of columns that were gone over in this sweep come in by feedback, those of the others are known
before it. So a sweep is one product and one call of :func:`toolkit.quantize.search.compensate.round_by_columns`.

With the values given, the best scales of a row's groups are a least-squares problem of K/g unknowns, its matrix made of
sums of H over pairs of groups. Zero points stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.formats.packing import QuantizedLinear, dequantize
from toolkit.quantize.search.compensate import Factor, round_by_columns
from toolkit.quantize.search.gram import exact_products
from toolkit.quantize.search.kernels.rounding import Rounding
from toolkit.quantize.search.sizes import REFIT_NUMBERS, REFIT_WEIGHTS

__all__ = ["Coupling", "Objective", "couple", "descend", "refit_scales", "sweep"]

#: Columns whose rows of a matrix are worked on at a time.
_BLOCK = 1024
#: Refitted scales beyond this factor of what they were are not taken: the group has next to nothing to tell.
_FAR = 3.0
#: What is added to the diagonal of the scales' equations, as a share of its mean: for groups whose values are all zero.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Objective:
    """What is to fall: for each row E (H + damping I) E^T, E what rounding changes.

    ``weight``: float32 [N, K], what is to be come close to. ``moments``: H, float32 [K, K], without damping.
    ``damping``: scalar. ``bits``: width of a value.
    """

    weight: Tensor
    moments: Tensor
    damping: Tensor
    bits: int = 4

    def losses(self, rounded: QuantizedLinear) -> Tensor:
        """Return it, [N]."""
        error = dequantize(rounded, torch.float32).sub_(self.weight)
        return (error @ self.moments).mul_(error).sum(1) + self.damping * error.square().sum(1)


@dataclass(frozen=True)
class Coupling:
    """How the columns of a weight depend on each other's error.

    ``feedback``: [K, K], entry (k, i) is H_ik / H_kk, H damped, in ``order``: int64 [K].
    """

    feedback: Tensor
    order: Tensor


@torch.no_grad()
def couple(moments: Tensor, factor: Factor) -> Coupling:
    """Return how columns depend on each other; takes over the factor's memory, which is of no use afterwards.

    Args:
        moments: H, float32 [K, K], without damping; not changed.
        factor: of these moments.
    """
    order, feedback = factor.order, factor.feedback
    for start in range(0, len(order), _BLOCK):
        part = order[start : start + _BLOCK]
        feedback[start : start + _BLOCK] = moments[part][:, order]
    feedback.diagonal().add_(factor.damping)
    return Coupling(feedback.div_(feedback.diagonal().clone().unsqueeze(1)), order)


@torch.no_grad()
def sweep(objective: Objective, rounded: QuantizedLinear, coupling: Coupling) -> QuantizedLinear:
    """Go over the values once, column by column; a row's error falls, or stays.

    Args:
        objective: what is to fall.
        rounded: values so far, on a grid that stays.
        coupling: of the columns.
    """
    weight, order = objective.weight, coupling.order
    errors = (weight - dequantize(rounded, torch.float32)).t()[order]
    targets = weight.t()[order]
    for start in range(0, len(order), _BLOCK):
        rows = slice(start, start + _BLOCK)
        targets[rows].addmm_(coupling.feedback[rows, :start], errors[:start])
        targets[rows].addmm_(coupling.feedback[rows, rows].tril(-1), errors[rows])
    del errors
    rounding = Rounding.of(weight, rounded.scales, rounded.zeros, order, objective.bits)
    round_by_columns(rounding, targets, coupling.feedback)
    return QuantizedLinear(rounding.values.t().contiguous(), rounded.zeros, rounded.scales)


@torch.no_grad()
@exact_products()
def refit_scales(objective: Objective, rounded: QuantizedLinear) -> QuantizedLinear:
    """Fit the scales of a row's groups to its values, all at once, by least squares; values and zeros stay."""
    weight = objective.weight
    count = max(1, min(REFIT_WEIGHTS // weight.shape[1], REFIT_NUMBERS // rounded.scales.shape[1] ** 2))
    parts = zip(*(t.split(count) for t in (weight, rounded.values, rounded.zeros, rounded.scales)), strict=True)
    scales = [_refitted(objective, w, QuantizedLinear(*grid)) for w, *grid in parts]
    return QuantizedLinear(rounded.values, rounded.zeros, torch.cat(scales))


def _refitted(objective: Objective, weight: Tensor, rounded: QuantizedLinear) -> Tensor:
    """Return the scales [n, K/g] of some rows."""
    moments, damping = objective.moments, objective.damping
    rows, columns = weight.shape
    groups = rounded.scales.shape[1]
    size = columns // groups
    levels = rounded.values.view(rows, groups, size).float().sub_(rounded.zeros.unsqueeze(-1)).view(rows, columns)
    scales = rounded.scales.float()
    error = weight - (levels.view(rows, groups, size) * scales.unsqueeze(-1)).view(rows, columns)
    # what the scales are to move by: the normal equations of the error that is left
    wanted = (error @ moments).add_(error.mul_(damping)).mul_(levels).view(rows, groups, size).sum(-1)
    matrix = levels.new_empty(rows, groups, groups)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        matrix[:, group] = (levels[:, part] @ moments[part]).mul_(levels).view(rows, groups, size).sum(-1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.add_(damping * levels.square().view(rows, groups, size).sum(-1))
    diagonal.add_((_RIDGE * diagonal.mean(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny))
    lower, info = torch.linalg.cholesky_ex(matrix)
    moved = torch.cholesky_solve(wanted.unsqueeze(-1), lower).squeeze(-1).add_(scales)
    fits = (info == 0).unsqueeze(1) & (moved > scales / _FAR) & (moved < scales * _FAR)
    return torch.where(fits, moved.half(), rounded.scales)


@torch.no_grad()
def descend(
    objective: Objective, rounded: QuantizedLinear, coupling: Coupling, rounds: int, sweeps: int
) -> QuantizedLinear:
    """Sweep, refit the scales, and sweep again; rows that err less as they were stay as they were.

    Args:
        objective: what is to fall.
        rounded: where to begin.
        coupling: of the columns.
        rounds: how often the scales are refitted. sweeps: before each time, and at the end.
    """
    best, least = rounded, objective.losses(rounded)
    for turn in range(rounds + 1):
        found = best
        for _ in range(sweeps):
            found = sweep(objective, found, coupling)
        best, least = _better(objective, best, least, found)
        if turn < rounds:
            best, least = _better(objective, best, least, refit_scales(objective, best))
    return best


def _better(
    objective: Objective, best: QuantizedLinear, least: Tensor, found: QuantizedLinear
) -> tuple[QuantizedLinear, Tensor]:
    """Return of each row what errs less, and by how much."""
    loss = objective.losses(found)
    falls = (loss < least).unsqueeze(1)
    parts = zip((found.values, found.zeros, found.scales), (best.values, best.zeros, best.scales), strict=True)
    return QuantizedLinear(*(torch.where(falls, new, old) for new, old in parts)), torch.minimum(loss, least)
