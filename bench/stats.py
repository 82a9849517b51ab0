"""Is a difference more than chance? Paired tests and intervals for two systems that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

__all__ = [
    "CONFIDENCE",
    "Flips",
    "Interval",
    "flips",
    "mcnemar",
    "mean_interval",
    "paired_bootstrap",
    "paired_proportions",
    "ratio_of_medians",
    "smallest_detectable",
    "wilson",
]

CONFIDENCE = 0.95
RESAMPLES = 5000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Flips:
    """How right and wrong changed from baseline to candidate, item by item.

    Attributes:
        lost: right before, wrong now.
        won: wrong before, right now.
        n: items.
    """

    lost: int
    won: int
    n: int


def flips(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """Count the items that changed between right and wrong; both lists are in the same order."""
    pairs = list(zip(before, after, strict=True))
    return Flips(lost=sum(b and not a for b, a in pairs), won=sum(a and not b for b, a in pairs), n=len(pairs))


def wilson(right: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927), which stays sensible near 0, near 1 and for few items."""
    interval = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    return Interval(right / n, float(interval.low), float(interval.high))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947): p of flips this lopsided if lost and won were equally likely.

    Binomial(lost + won, 1/2); 1.0 when nothing flipped.
    """
    return float(stats.binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


def paired_proportions(lost: int, won: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval for a difference of paired proportions, (won - lost) / n.

    Unlike a bootstrap it has a width when nothing flipped: no flip among n items still allows +-z^2 / (n + z^2).
    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998).
    """
    z = float(stats.norm.ppf(0.5 + confidence / 2))

    def score(delta: float) -> float:
        # The restricted maximum-likelihood estimate of P(lost) when the true difference is delta.
        a = 2.0 * n
        b = -won - lost + (2.0 * n - won + lost) * delta
        c = -lost * delta * (1.0 - delta)
        q = (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a)
        variance = n * (2.0 * q + delta * (1.0 - delta))
        gap = won - lost - n * delta
        if variance <= 0.0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / math.sqrt(variance)

    value = (won - lost) / n

    def root(target: float, low: float, high: float) -> float:
        # score falls as delta grows; clip the infinities that mark the ends of the range.
        def distance(delta: float) -> float:
            return max(-1e9, min(1e9, score(delta) - target))

        if distance(low) <= 0.0:
            return low
        if distance(high) >= 0.0:
            return high
        return float(optimize.brentq(distance, low, high, xtol=1e-9))

    edge = 1.0 - 1e-12
    return Interval(value, min(value, root(z, -edge, value)), max(value, root(-z, value, edge)))


def paired_bootstrap(
    differences: Sequence[float], *, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of the mean paired difference (Efron & Tibshirani 1993): items are resampled, pairs
    stay together."""
    return mean_interval(differences, seed=seed, confidence=confidence, resamples=resamples)


def mean_interval(
    values: Sequence[float], *, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of a mean. A single or constant sample has no spread to resample: its interval is
    the value."""
    array: Floats = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2 or np.ptp(array) == 0.0:
        return Interval(mean, mean, mean)
    result = stats.bootstrap(
        (array,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // array.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def ratio_of_medians(
    candidate: Sequence[float],
    baseline: Sequence[float],
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
) -> Interval | None:
    """median(candidate) / median(baseline) with a percentile bootstrap interval; both sides resampled on their own.
    None without samples."""
    above: Floats = np.asarray(candidate, dtype=np.float64)
    below: Floats = np.asarray(baseline, dtype=np.float64)
    if above.size == 0 or below.size == 0 or float(np.median(below)) <= 0.0:
        return None
    rng = np.random.default_rng(seed)
    ratios: list[Floats] = []
    step = max(1, 2_000_000 // max(above.size, below.size))
    for done in range(0, resamples, step):
        rows = min(step, resamples - done)
        top = np.median(above[rng.integers(0, above.size, (rows, above.size))], axis=1)
        bottom = np.median(below[rng.integers(0, below.size, (rows, below.size))], axis=1)
        ratios.append(top / np.maximum(bottom, 1e-12))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(ratios), [tail, 1.0 - tail])
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high))


def smallest_detectable(n: int, flip_rate: float, *, alpha: float = 1.0 - CONFIDENCE, power: float = 0.8) -> float:
    """Smallest true difference of paired proportions that McNemar's test on n items would show with the given power.

    Solves n = (z_a sqrt(r) + z_b sqrt(r - d^2))^2 / d^2 for d, where r is the share of items that flip (Connor, "Sample
    size for testing differences in proportions for the paired-sample design", Biometrics 43, 1987). A difference needs
    at least as many flips, so r is taken as max(flip_rate, d). Never below what the exact test could show at all: with
    all flips one way, the fewest that reach alpha.

    Args:
        n: questions.
        flip_rate: share of questions whose answer changed between right and wrong, as observed.

    Returns:
        A fraction of 1 (0.04 = 4 points); 1.0 when n is too small to show anything.
    """
    fewest = math.ceil(math.log2(2.0 / alpha))  # 2 * 0.5**k <= alpha
    z_a, z_b = float(stats.norm.ppf(1.0 - alpha / 2.0)), float(stats.norm.ppf(power))

    def missing(d: float) -> float:
        rate = max(flip_rate, d)
        return (z_a * math.sqrt(rate) + z_b * math.sqrt(rate - d * d)) ** 2 / (d * d) - n

    if n <= fewest or missing(1.0) > 0.0:
        return 1.0
    return max(float(optimize.brentq(missing, 1e-6, 1.0)), fewest / n)
