"""What per-answer divergences say of two candidates, or of one: means that a few answers don't decide, and intervals.

The mean divergence is mostly that of the worst few answers, so two means are hard to tell apart. Beside it stand the
trimmed mean, without the worst hundredth of the answers of either candidate, and the geometric mean of the ratios,
answer by answer, whose interval is several times as narrow. They answer different questions: the mean weighs what is
worst, the geometric mean what is usual. Intervals are 95% percentile bootstrap intervals; answers are drawn in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Band", "Ratios", "Spread", "by_group", "compare", "summarize"]

Floats = npt.NDArray[np.float64]

#: Resamples, share of answers trimmed, and the divergence (nats a token) below which float32 tells nothing.
_RESAMPLES, _TRIMMED, _FLOOR = 2000, 0.01, 1e-8


@dataclass(frozen=True)
class Band:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Spread:
    """One candidate's divergence, nats a token over ``answers``: all of them, without the worst, and typically."""

    answers: int
    mean: Band
    trimmed: Band
    geometric: Band

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Ratios:
    """One candidate's divergence over another's, on the same answers: of means, of trimmed means, and geometric."""

    answers: int
    mean: Band
    trimmed: Band
    geometric: Band

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def summarize(sums: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Spread:
    """Return a candidate's divergence.

    Args:
        sums: of each answer, the divergence summed over its tokens.
        tokens: of each answer.
        seed: of the resampling.
    """
    total, size = _arrays(sums, tokens)
    ratio = total / size
    kept = _kept(ratio)
    rows = np.stack([total, size, total * kept, size * kept, np.log(np.maximum(ratio, _FLOOR)), np.ones_like(size)])
    bands = _bands(rows, lambda s: np.stack([s[0] / s[1], s[2] / s[3], np.exp(s[4] / s[5])]), seed)
    return Spread(len(size), *bands)


def compare(before: Sequence[float], after: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Ratios:
    """Return the divergence of ``after`` over that of ``before``.

    Args:
        before, after: of each answer, the divergence summed over its tokens.
        tokens: of each answer.
        seed: of the resampling.
    """
    first, size = _arrays(before, tokens)
    second, _ = _arrays(after, tokens)
    a, b = first / size, second / size
    kept = _kept(a) & _kept(b)
    logs = np.log(np.maximum(b, _FLOOR)) - np.log(np.maximum(a, _FLOOR))
    rows = np.stack([first, second, first * kept, second * kept, logs, np.ones_like(size)])
    tiny = np.finfo(np.float64).tiny

    def statistics(s: Floats) -> Floats:
        return np.stack([s[1] / np.maximum(s[0], tiny), s[3] / np.maximum(s[2], tiny), np.exp(s[4] / s[5])])

    return Ratios(len(size), *_bands(rows, statistics, seed))


def by_group(groups: Sequence[str], values: Sequence[Any]) -> Mapping[str, list[Any]]:
    """Return values by their group, such as an answer's task, in the order in which groups come first."""
    found: dict[str, list[Any]] = {}
    for group, value in zip(groups, values, strict=True):
        found.setdefault(group, []).append(value)
    return found


def _kept(values: Floats) -> npt.NDArray[np.bool_]:
    """Return which values stay without the worst hundredth; of fewer than a hundred, all do."""
    found: npt.NDArray[np.bool_] = values <= np.sort(values)[-1 - int(_TRIMMED * len(values))]
    return found


def _arrays(sums: Sequence[float], tokens: Sequence[int]) -> tuple[Floats, Floats]:
    total, size = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if not len(size) or len(total) != len(size):
        raise ValueError("divergences of as many answers as there are token counts are needed, one at least")
    return total, size


def _bands(rows: Floats, statistics: Any, seed: int) -> list[Band]:
    """Return each statistic, a function of the rows' sums [R, resamples], with its interval."""
    count = rows.shape[1]
    rng = np.random.default_rng(seed)
    draws = []
    step = max(1, 4_000_000 // count)
    for done in range(0, _RESAMPLES, step):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(step, _RESAMPLES - done))
        draws.append(statistics(rows @ weights.T))
    low, high = np.quantile(np.concatenate(draws, axis=1), [0.025, 0.975], axis=1)
    values = statistics(rows.sum(1, keepdims=True))[:, 0]
    return [Band(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]
