"""Two systems' scores on the same questions, compared and judged: `no worse`, `worse` or `can't tell`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, ndtri, xlogy
from scipy.stats import binom

from bench.judge import stats
from bench.judge.stats import CONFIDENCE, RESAMPLES, Clusters, Flips, Floats, Interval
from bench.questions.scoring import RIGHT

__all__ = [
    "MARGIN",
    "Comparison",
    "Judgement",
    "Verdict",
    "accuracy",
    "compare",
    "judge",
    "judge_tasks",
    "judgement",
    "power",
]

#: A loss of accuracy that would not matter, as a fraction of 1: a point.
MARGIN = 0.01
POWER = 0.8

Counts = npt.NDArray[np.int64]
Judgement = Literal["no worse", "worse", "can't tell"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the scores of two systems on the same items say. Scores are fractions of 1.

    Attributes:
        n: items.
        clusters: groups of items that were resampled together (images); n when every item stands alone.
        flips: items right in one and wrong in the other (right: a score of at least 0.5).
        baseline: its mean score; Wilson's interval for right/wrong scores, bootstrap for graded ones.
        candidate: likewise.
        difference: candidate - baseline, with an interval of `stats.CONFIDENCE`.
        method: ``tango`` (right/wrong scores) or ``bootstrap`` (graded; never narrower than `stats.bounded_mean`).
        p_value: `stats.sign_flip`; for right/wrong scores and no clusters, the exact McNemar test.
        design_effect: n items tell as much as n / design_effect independent ones.
        discordance: mean squared difference; for right/wrong scores, the share of items that flipped.
        smallest_detectable: smallest true difference that these items would show with 80% power.
        recovery: candidate / baseline, with its interval; None when the baseline scored next to nothing.
    """

    n: int
    clusters: int
    flips: Flips
    baseline: Interval
    candidate: Interval
    difference: Interval
    method: Literal["tango", "bootstrap"]
    p_value: float
    design_effect: float
    discordance: float
    smallest_detectable: float
    recovery: Interval | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement against a margin.

    Attributes:
        margin: the loss that would not matter, as a fraction of 1.
        p_value: that the judgement rests on, adjusted when there were several tasks.
        items_needed: with ``can't tell``: how many items would settle it with 80% power, going by how many flipped.
    """

    judgement: Judgement
    margin: float
    p_value: float
    items_needed: int | None


def compare(
    before: Sequence[float],
    after: Sequence[float],
    *,
    seed: int,
    clusters: Clusters = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare the scores (each 0 to 1) of the baseline and the candidate on the same items, in the same order.

    Args:
        clusters: each item's cluster, e.g. `tasks.Question.cluster_id`; None: every item stands alone.

    Raises:
        ValueError: there are no items, or the lists differ in length.
    """
    base: Floats = np.asarray(before, dtype=np.float64)
    new: Floats = np.asarray(after, dtype=np.float64)
    if base.size == 0 or base.size != new.size:
        raise ValueError(f"{base.size} and {new.size} scores can't be compared item by item")
    differences = new - base
    if clusters is not None:
        clusters = stats.codes(clusters, base.size)  # once for all that follows
    effect = stats.design_effect(differences, clusters)
    effective = base.size / effect
    flips = stats.flips(base >= RIGHT, new >= RIGHT)
    binary = _binary(base) and _binary(new)
    if binary:
        tango = stats.paired_proportions(flips.lost / effect, flips.won / effect, effective)
        difference = replace(tango, value=(flips.won - flips.lost) / flips.n)
    else:
        score = stats.bounded_mean(differences, effective)
        drawn = stats.mean_interval(list(differences), seed=seed, clusters=clusters, resamples=resamples)
        difference = Interval(score.value, min(score.low, drawn.low), max(score.high, drawn.high))
    discordance = float((differences**2).mean())
    recovery = stats.ratio_of_means(after, before, seed=seed, clusters=clusters, resamples=resamples)
    if recovery:
        # A bootstrap can't draw a loss that it has not seen: no narrower than what the difference leaves open.
        mean = float(base.mean())
        low, high = 1.0 + difference.low / mean, 1.0 + difference.high / mean
        recovery = Interval(recovery.value, max(0.0, min(recovery.low, low)), max(recovery.high, high))
    return Comparison(
        n=base.size,
        clusters=base.size if clusters is None else len(np.unique(clusters)),
        flips=flips,
        baseline=accuracy(before, seed=seed, clusters=clusters, resamples=resamples),
        candidate=accuracy(after, seed=seed, clusters=clusters, resamples=resamples),
        difference=difference,
        method="tango" if binary else "bootstrap",
        p_value=stats.sign_flip(differences, clusters, seed=seed, resamples=resamples),
        design_effect=effect,
        discordance=discordance,
        smallest_detectable=stats.smallest_detectable(effective, discordance),
        recovery=recovery,
    )


def accuracy(scores: Sequence[float], *, seed: int, clusters: Clusters = None, resamples: int = RESAMPLES) -> Interval:
    """Return the mean score with its interval: Wilson's for right/wrong scores (on n / design effect items), bootstrap
    over items or clusters for graded ones."""
    array: Floats = np.asarray(scores, dtype=np.float64)
    if not _binary(array):
        return stats.mean_interval(scores, seed=seed, clusters=clusters, resamples=resamples)
    effect = stats.design_effect(array, clusters)
    return replace(stats.wilson(float(array.sum()) / effect, array.size / effect), value=float(array.mean()))


def judge(found: Comparison, margin: float = MARGIN, *, p_value: float | None = None) -> Verdict:
    """Judge a comparison against ``margin``, the loss that would not matter (a fraction of 1, above 0).

    - ``no worse``: the 95% interval of the difference lies above -margin (non-inferiority, one-sided at 2.5%). A loss
      smaller than the margin may well be there.
    - ``worse``: not so, the interval lies below 0, and the exact test agrees (p below 5%).
    - ``can't tell``: anything else; `Verdict.items_needed` says how many items it would take.

    Args:
        p_value: in place of the comparison's own, when it is one of several (see `judge_tasks`).
    """
    p = found.p_value if p_value is None else p_value
    said = judgement(found, margin, p)
    return Verdict(said, margin, p, _items_needed(found, margin) if said == "can't tell" else None)


def judgement(found: Comparison, margin: float, p_value: float) -> Judgement:
    """Return what `judge` says, without how many items it would take, which is most of its work."""
    if not 0.0 < margin < 1.0:
        raise ValueError(f"a margin is a fraction between 0 and 1, not {margin}")
    if found.difference.low > -margin:
        return "no worse"
    if found.difference.high < 0.0 and p_value < 1.0 - CONFIDENCE:
        return "worse"
    return "can't tell"


def judge_tasks(found: Mapping[str, Comparison], margin: float = MARGIN) -> dict[str, Verdict]:
    """Judge several tasks, the p-values adjusted by Holm: one ``worse`` among equal systems stays a 5% event however
    many tasks there are. ``no worse`` needs no adjustment: all tasks at once are no worse only if each is."""
    adjusted = stats.holm([comparison.p_value for comparison in found.values()])
    return {
        task: judge(comparison, margin, p_value=p)
        for (task, comparison), p in zip(found.items(), adjusted, strict=True)
    }


#: From so many expected flips on, the normal approximation is as good as the exact rule, and much faster.
_MANY_FLIPS = 400


def power(n: int, flip_rate: float, difference: float, margin: float = MARGIN) -> float:
    """Return how often ``n`` questions get a verdict by the rule of `judge` (``no worse`` or ``worse``; where the
    systems are equal, ``no worse`` alone), exactly: over all counts of lost and won.

    Args:
        flip_rate: share of questions that flip, lost and won together; at least as much as the difference.
        difference: true difference, candidate - baseline.
    """
    rate = min(1.0, max(flip_rate, abs(difference)))
    lose, win = (rate - difference) / 2.0, (rate + difference) / 2.0
    lost = np.arange(int(binom.ppf(1e-7, n, lose)), int(binom.ppf(1.0 - 1e-7, n, lose)) + 1)[:, None]
    won = np.arange(int(binom.ppf(1e-7, n, win)), int(binom.ppf(1.0 - 1e-7, n, win)) + 1)[None, :]
    chance = _multinomial(n, (lost, lose), (won, win))
    z = float(ndtri(0.5 + CONFIDENCE / 2))
    fine = stats.tango_score(lost, won, n, -margin) > z
    settled = fine
    if difference < 0.0:
        p = np.minimum(1.0, 2.0 * binom.cdf(np.minimum(lost, won), lost + won, 0.5))
        settled = fine | ((stats.tango_score(lost, won, n, 0.0) < -z) & (p < 1.0 - CONFIDENCE))
    return float(chance[settled].sum())


def _multinomial(n: int, first: tuple[Counts, float], second: tuple[Counts, float]) -> Floats:
    """Return how likely each pair of counts is among ``n`` items, shape [first, second]."""
    (a, p), (b, q) = first, second
    rest = np.maximum(n - a - b, 0)
    gone = gammaln(np.arange(n - int(rest.min()) + 1) * -1.0 + n + 1.0)  # log (n - k)! by k
    logs = gammaln(n + 1.0) - gammaln(a + 1.0) - gammaln(b + 1.0) - gone[n - rest]
    logs = logs + xlogy(a, p) + xlogy(b, q) + xlogy(rest, max(0.0, 1.0 - p - q))
    return np.where(a + b <= n, np.exp(logs), 0.0)


def _items_needed(found: Comparison, margin: float) -> int:
    """How many items of this kind would give a verdict with 80% power.

    The rule that gives the verdict is inverted: the fewest items with which `power` is 80% for equal systems that flip
    as often as observed (half a flip where there was none), times the design effect. Where there are that many already,
    the observed difference is taken for the true one. Where flips are many the normal approximation stands for it:
    n = (z_a + z_b)^2 r / margin^2 (r: discordance, z_a: one-sided 2.5%, z_b: 80%), and with no fewer than Tango's
    interval asks for when nothing flips. Graded scores count as flips with the same mean square.
    """
    rate = found.discordance or 0.5 / (found.n + 1)
    z_a, z_b = float(ndtri(0.5 + CONFIDENCE / 2)), float(ndtri(POWER))
    floor = z_a * z_a * (1.0 - margin) / margin

    def needed(shown: float, mean: float) -> float:
        return (z_a + z_b) ** 2 * max(rate - mean * mean, 0.0) / (shown * shown)

    def settling(guess: float, mean: float) -> int:
        guess = max(floor, guess)
        return math.ceil(guess) if rate * guess > _MANY_FLIPS else _fewest(guess, rate, mean, margin)

    items = settling(needed(margin, 0.0), 0.0) * found.design_effect
    if items <= found.n:
        mean = found.difference.value
        distances = [distance for distance in (margin + mean, -mean) if distance > 0.0]
        items = settling(min(needed(distance, mean) for distance in distances), mean) * found.design_effect
    return max(found.n + 1, math.ceil(items))


def _fewest(guess: float, rate: float, mean: float, margin: float) -> int:
    """Return the fewest items with 80% power; power goes up in steps with small dips, and a dip is passed over."""

    def enough(n: int) -> bool:
        return power(n, rate, mean, margin) >= POWER

    low, high = max(2, int(guess / 4)), max(4, math.ceil(guess))
    while not enough(high):
        low, high = high, math.ceil(1.3 * high)
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _binary(scores: Floats) -> bool:
    return bool(((scores == 0.0) | (scores == 1.0)).all())
