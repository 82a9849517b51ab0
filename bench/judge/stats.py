"""Is a difference more than chance? Paired tests and intervals for two systems that answered the same questions.

Questions about one image succeed and fail together. ``clusters`` says which items those are, in the items' order; the
functions that take it count images, not questions, as what was drawn at random. None: every item on its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats
from scipy.special import ndtri, stdtrit

__all__ = [
    "CONFIDENCE",
    "Flips",
    "Interval",
    "bounded_mean",
    "codes",
    "design_effect",
    "flips",
    "holm",
    "mcnemar",
    "mean_interval",
    "paired_proportions",
    "ratio_of_means",
    "sign_flip",
    "smallest_detectable",
    "tango_score",
    "wilson",
]

CONFIDENCE = 0.95
RESAMPLES = 10_000
#: See `design_effect`.
ASSUMED_FLIPS = 4

Floats = npt.NDArray[np.float64]
Truths = npt.NDArray[np.bool_]
Clusters = Sequence[Hashable] | npt.NDArray[np.intp] | None


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


def flips(before: Sequence[bool] | Truths, after: Sequence[bool] | Truths) -> Flips:
    """Count the items that changed between right and wrong; both lists are in the same order."""
    was, now = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if was.shape != now.shape:
        raise ValueError(f"{was.size} and {now.size} answers are not pairs")
    return Flips(lost=int((was & ~now).sum()), won=int((now & ~was).sum()), n=was.size)


def wilson(right: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927), which stays sensible near 0, near 1 and for few items.

    Counts may be fractions: those of clustered items, divided by their `design_effect`.
    """
    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    share = right / n
    middle = (share + z2 / (2.0 * n)) / (1.0 + z2 / n)
    half = math.sqrt(z2 * (share * (1.0 - share) / n + z2 / (4.0 * n * n))) / (1.0 + z2 / n)
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947): p of flips this lopsided if lost and won were equally likely.

    Binomial(lost + won, 1/2); 1.0 when nothing flipped.
    """
    return float(stats.binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


def sign_flip(
    differences: Sequence[float] | Floats, clusters: Clusters = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided sign-flip (randomisation) test of a mean paired difference, cluster by cluster.

    If the systems are equal, each cluster's summed difference might as well have had the other sign. p is the share of
    sign assignments whose total is at least as far from 0 as the observed one. For right/wrong scores it is exact, and
    for items on their own it is the exact McNemar test: this is McNemar for questions that share images, where the
    plain test takes five flips on one image for five pieces of evidence. For graded scores ``resamples`` assignments
    are drawn with ``seed`` and the observed one counts among them, so p never falls below its true level.

    Source: Fisher's randomisation of matched pairs (The Design of Experiments, 1935), with the cluster as the unit as
    in Durkalski et al., "Analysis of clustered matched-pair data", Statistics in Medicine 22 (2003), whose statistic
    (sum D)^2 / sum D^2 is its normal approximation.
    """
    values: Floats = np.asarray(differences, dtype=np.float64)
    sums = np.bincount(codes(clusters, values.size), weights=values)
    sums = sums[np.abs(sums) > 1e-12]
    whole = np.rint(sums)
    if np.allclose(sums, whole, rtol=0.0, atol=1e-9):
        return _exact_sign_flip(whole.astype(np.int64))
    sizes, total = np.abs(sums), abs(float(sums.sum()))
    rng, beyond = np.random.default_rng(seed), 0
    step = max(1, 2_000_000 // sizes.size)
    for done in range(0, resamples, step):
        rows = min(step, resamples - done)
        bits = np.unpackbits(rng.integers(0, 256, (rows, -(-sizes.size // 8)), dtype=np.uint8), axis=1)
        totals = 2.0 * (bits[:, : sizes.size] @ sizes) - sizes.sum()
        beyond += int((np.abs(totals) >= total - 1e-9).sum())
    return (1 + beyond) / (1 + resamples)


def _exact_sign_flip(sums: npt.NDArray[np.int64]) -> float:
    sizes = np.abs(sums)
    if sizes.max(initial=0) <= 1:
        return mcnemar(int((sums < 0).sum()), int((sums > 0).sum()))
    reach = int(sizes.sum())
    chance: Floats = np.zeros(2 * reach + 1)  # of each total from -reach to reach
    chance[reach] = 1.0
    for size in sizes:  # up or down by as much; nothing has reached the ends before the last one
        moved = np.zeros_like(chance)
        moved[size:] = chance[:-size]
        moved[:-size] += chance[size:]
        chance = moved / 2.0
    total = abs(int(sums.sum()))
    return min(1.0, float(chance[np.abs(np.arange(-reach, reach + 1)) >= total].sum()))


def design_effect(differences: Sequence[float] | Floats, clusters: Clusters = None) -> float:
    """Return by how much clustering inflates the variance of a mean paired difference: n items are worth n / this many
    independent ones (Kish 1965; used as in Rao & Scott, "A simple method for the analysis of clustered binary data",
    Biometrics 48, 1992).

    The numerator is the linearised variance over clusters that Obuchowski ("On the comparison of correlated
    proportions for clustered data", Statistics in Medicine 17, 1998) uses, the denominator that of independent items. A
    handful of flips can't show how much they go together, so to what was observed four typical ones are added that took
    their whole cluster along: without flips this is the effect of complete agreement within clusters. (With fewer than
    four, `no worse` was too frequent at the margin in simulations of rare losses.) Few clusters widen it by the square
    of t over normal quantiles. At least 1, and exactly 1 for items on their own.
    """
    values: Floats = np.asarray(differences, dtype=np.float64)
    own = codes(clusters, values.size)
    sizes = np.bincount(own).astype(np.float64)
    groups = sizes.size
    if groups == values.size:
        return 1.0
    if groups == 1:
        return float(values.size)
    centred = values - values.mean()
    between = float((np.bincount(own, weights=centred) ** 2).sum()) * groups / (groups - 1)
    alone = float((centred**2).sum()) * values.size / (values.size - 1)
    whole = float((sizes**2).sum()) / values.size
    tail = 0.5 + CONFIDENCE / 2
    few = float(stdtrit(groups - 1, tail) / ndtri(tail)) ** 2
    changed = values[values != 0.0]
    assumed = ASSUMED_FLIPS * (float((changed**2).mean()) if changed.size else 1.0)
    return max(1.0, (between + assumed * whole) / (alone + assumed)) * few


def paired_proportions(lost: float, won: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval for a difference of paired proportions, (won - lost) / n.

    Unlike a bootstrap it has a width when nothing flipped: no flip among n items still allows +-z^2 / (n + z^2).
    Counts may be fractions: those of clustered items, divided by their `design_effect`.
    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998).
    """
    z = float(ndtri(0.5 + confidence / 2))

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


def tango_score(lost: npt.ArrayLike, won: npt.ArrayLike, n: float, delta: float) -> Floats:
    """Tango's score, z, of many counts at once, that the difference (won - lost) / n is ``delta``: the interval of
    `paired_proportions` lies above delta where it is more than the normal quantile.

    Args:
        delta: -1 to 1, neither of them.
    """
    b_lost, b_won = np.asarray(lost, dtype=np.float64), np.asarray(won, dtype=np.float64)
    a = 2.0 * n
    b = -b_won - b_lost + (2.0 * n - b_won + b_lost) * delta
    c = -b_lost * delta * (1.0 - delta)
    q = (np.sqrt(np.maximum(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a)
    variance = n * (2.0 * q + delta * (1.0 - delta))
    gap = b_won - b_lost - n * delta
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(variance > 0.0, gap / np.sqrt(np.maximum(variance, 1e-300)), np.where(gap, np.inf * gap, 0.0))
    return np.asarray(score, dtype=np.float64)


def bounded_mean(
    differences: Sequence[float] | Floats, n: float | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """Score interval of a mean difference of graded scores: Tango's interval for values between -1 and 1.

    A mean is rejected when the observed one is z standard errors away, the variance being that of the likeliest
    distribution *with that mean* over the observed values and the two extremes (the empirical likelihood: Owen 1988).
    The extremes matter: hundreds of equal answers do not rule out a rare total loss, which no bootstrap can draw. For
    right/wrong scores it equals `paired_proportions`.

    Args:
        differences: candidate - baseline, each -1 to 1.
        n: effective number of items (see `design_effect`); None: as many as there are differences.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    shares: Floats = counts / counts.sum()
    items = float(counts.sum()) if n is None else n
    mean = float(values @ shares)
    z = float(ndtri(0.5 + confidence / 2))

    def score(assumed: float) -> float:
        gaps = values - assumed

        def pull(tilt: float) -> float:
            return float((shares * gaps / np.maximum(1.0 + tilt * gaps, 1e-300)).sum())

        # The tilt at which an extreme that was never seen begins to get mass, on the side where it is needed.
        end = 1.0 / (1.0 + assumed) if mean > assumed else -1.0 / (1.0 - assumed)
        inside = end * (1.0 - 1e-12)
        beyond = pull(inside) > 0.0 if end > 0.0 else pull(inside) < 0.0
        tilt = end if beyond else float(optimize.brentq(pull, 0.0, inside, xtol=1e-14)) if mean != assumed else 0.0
        chances = shares / np.maximum(1.0 + tilt * gaps, 1e-300)
        extreme = -1.0 - assumed if end > 0.0 else 1.0 - assumed
        variance = float((chances * gaps**2).sum() + max(0.0, 1.0 - float(chances.sum())) * extreme**2)
        return (mean - assumed) * math.sqrt(items / variance) if variance > 0.0 else math.copysign(1e9, mean - assumed)

    edge = 1.0 - 1e-9

    def root(target: float, towards: float) -> float:
        def distance(assumed: float) -> float:
            return score(assumed) - target if assumed != mean else -target

        if abs(mean - towards) < 1e-9 or distance(towards) * -target > 0.0:
            return towards
        return float(optimize.brentq(distance, mean, towards, xtol=1e-9))

    return Interval(mean, min(mean, root(z, -edge)), max(mean, root(-z, edge)))


def mean_interval(
    values: Sequence[float],
    *,
    seed: int,
    clusters: Clusters = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Expanded percentile bootstrap interval of a mean over items (Efron & Tibshirani 1993; expanded for few items as
    in Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69, 2015).

    Of paired differences, pairs stay together. With ``clusters``, whole clusters are drawn (Davison & Hinkley 1997,
    section 3.8) and the mean stays one over items.
    A single or constant sample has no spread to resample: its interval is the value.
    """
    array: Floats = np.asarray(values, dtype=np.float64)
    own = codes(clusters, array.size)
    sums, sizes = np.bincount(own, weights=array), np.bincount(own).astype(np.float64)
    mean = float(array.mean())
    if sizes.size < 2 or np.ptp(array) == 0.0:
        return Interval(mean, mean, mean)
    totals = _resampled(np.column_stack([sums, sizes]), np.random.default_rng(seed), resamples)
    low, high = _ends(totals[:, 0] / totals[:, 1], sizes.size, confidence)
    return Interval(mean, min(mean, low), max(mean, high))


def ratio_of_means(
    candidate: Sequence[float],
    baseline: Sequence[float],
    *,
    seed: int,
    clusters: Clusters = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """mean(candidate) / mean(baseline) of paired scores, with an expanded percentile bootstrap interval: items,
    or whole clusters, are resampled with both their scores.

    None when the baseline's scores add up to less than 10: a ratio to next to nothing says nothing.
    """
    above: Floats = np.asarray(candidate, dtype=np.float64)
    below: Floats = np.asarray(baseline, dtype=np.float64)
    if above.size != below.size:
        raise ValueError(f"{above.size} and {below.size} scores are not pairs")
    if float(below.sum()) < 10.0:
        return None
    own = codes(clusters, above.size)
    pairs: Floats = np.column_stack([np.bincount(own, weights=above), np.bincount(own, weights=below)])
    value = float(above.sum() / below.sum())
    if len(pairs) < 2:
        return Interval(value, value, value)
    totals = _resampled(pairs, np.random.default_rng(seed), resamples)
    low, high = _ends(totals[:, 0] / np.maximum(totals[:, 1], 1e-9), len(pairs), confidence)
    return Interval(value, min(value, low), max(value, high))


def codes(clusters: Clusters, n: int) -> npt.NDArray[np.intp]:
    """Number the clusters from 0 in their order and return each item's, shape [n]; numbers stay what they are."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} items")
    if isinstance(clusters, np.ndarray):
        return clusters
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(cluster, len(numbers)) for cluster in clusters), dtype=np.intp, count=n)


def _resampled(rows: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """Draw as many rows as there are, with replacement, ``resamples`` times; return the column sums [resamples, 2]."""
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    if len(kinds) <= max(32, len(rows) // 64):
        # Rows of one kind are interchangeable: draw how many of each. The same distribution, without the indices.
        return rng.multinomial(len(rows), counts / len(rows), size=resamples) @ kinds
    totals: Floats = np.empty((resamples, rows.shape[1]))
    columns = [np.ascontiguousarray(column) for column in rows.T]
    index_type = np.uint16 if len(rows) <= 2**16 else np.uint32
    step = max(1, 250_000 // len(rows))  # so that a block stays in the cache
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        picks = rng.integers(0, len(rows), (stop - start, len(rows)), dtype=index_type)
        for at, column in enumerate(columns):
            constant = column[0] == column[-1] and np.ptp(column) == 0.0
            totals[start:stop, at] = column[0] * len(rows) if constant else column[picks].sum(axis=1)
    return totals


def _ends(draws: Floats, units: int, confidence: float) -> tuple[float, float]:
    """Return the percentiles between which ``confidence`` lies, moved out as t and the factor n - 1 would do it."""
    t = float(stdtrit(units - 1, (1.0 - confidence) / 2.0))
    tail = float(stats.norm.cdf(math.sqrt(units / (units - 1)) * t))
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def smallest_detectable(n: float, flip_rate: float, *, alpha: float = 1.0 - CONFIDENCE, power: float = 0.8) -> float:
    """Smallest true difference of paired proportions that McNemar's test on n items would show with the given power.

    Solves n = (z_a sqrt(r) + z_b sqrt(r - d^2))^2 / d^2 for d, where r is the share of items that flip (Connor, "Sample
    size for testing differences in proportions for the paired-sample design", Biometrics 43, 1987). A difference needs
    at least as many flips, so r is taken as max(flip_rate, d). Never below what the exact test could show at all: with
    all flips one way, the fewest that reach alpha.

    Args:
        n: questions; of clustered ones, their number divided by the `design_effect`.
        flip_rate: share of questions whose answer changed between right and wrong, as observed.

    Returns:
        A fraction of 1 (0.04 = 4 points); 1.0 when n is too small to show anything.
    """
    fewest = math.ceil(math.log2(2.0 / alpha))  # 2 * 0.5**k <= alpha
    z_a, z_b = float(ndtri(1.0 - alpha / 2.0)), float(ndtri(power))

    def missing(d: float) -> float:
        rate = max(flip_rate, d)
        return (z_a * math.sqrt(rate) + z_b * math.sqrt(rate - d * d)) ** 2 / (d * d) - n

    if n <= fewest or missing(1.0) > 0.0:
        return 1.0
    return max(float(optimize.brentq(missing, 1e-6, 1.0)), fewest / n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for there being several, in their order: the chance of even one false alarm among
    them stays below the level that they are held against (Holm 1979, step-down Bonferroni)."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = floor
    return adjusted
