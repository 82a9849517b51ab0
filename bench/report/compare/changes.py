"""How a figure changed from one system to another, with the interval of the change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from bench.report.compare.figures import COUNTED, SPEED, THROUGHPUT, Figure, Metric, Side
from bench.report.schema import Report, SpeedRatio, TaskAccuracy
from bench.roles import ROLES

__all__ = ["KEPT", "THROUGH", "Change", "Row", "change", "relative", "same_baseline"]


@dataclass(frozen=True, slots=True)
class Change:
    """B - A of a share, a fraction of 1; (B - A) / A of anything else. With its 95% interval, if there is one.

    Attributes:
        basis: how the interval was found; empty where there is none.
        p_value: of the paired test, for accuracies; of Student's, for speed over rounds.
    """

    value: float
    low: float | None = None
    high: float | None = None
    basis: str = ""
    p_value: float | None = None

    @property
    def beyond_chance(self) -> bool | None:
        """Whether the interval leaves out no change; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return (self.low > 0 or self.high < 0) and (self.p_value is None or self.p_value < 0.05)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of A and of B, and the change from A to B."""

    metric: Metric
    before: Figure
    after: Figure
    change: Change

    @property
    def says(self) -> str:
        """``better``, ``worse``, ``same`` (to the last digit), or ``can't tell``."""
        if self.change.value == 0 and self.change.low == self.change.high == 0:
            return "same"
        if not self.change.beyond_chance:
            return "can't tell"
        return "better" if (self.change.value > 0) == self.metric.more_is_better else "worse"


def relative(before: float, after: float) -> float:
    """(after - before) / before; from 0 to anything is infinitely much."""
    if before:
        return (after - before) / before
    return 0.0 if after == before else math.copysign(math.inf, after - before)


def change(metric: Metric, a: Side, b: Side, before: Figure, after: Figure, paired: dict[str, TaskAccuracy]) -> Change:
    """Return how a figure changed from A to B, with the narrowest interval that the reports allow.

    Args:
        before: the figure in A.
        after: the figure in B.
        paired: accuracies of B against A by question, by the metric's name.
    """
    if metric.is_accuracy:
        row = paired.get(metric.name)
        if row is None:
            return Change(after.value - before.value)
        d = row.difference
        return Change(d.value, d.low, d.high, "paired by question", row.p_adjusted)
    if metric.is_share:
        return _apart(before, after)
    value = relative(before.value, after.value)
    if metric.name in COUNTED:
        return Change(value, value, value, "counted")
    if metric.name not in SPEED:
        return _between(before, after) or Change(value)
    if metric.name in THROUGHPUT and _kept(metric, a) and _kept(metric, b):
        return Change(0.0, 0.0, 0.0, KEPT)
    if a.report is b.report:
        return _within(metric, a, b) or Change(value)
    if same_baseline(a.report, b.report):
        # What the machine did on either day is in both baselines, and only there is it known.
        return _through_baseline(metric, a, b) or Change(value)
    return _between(before, after, degrees=_degrees(a, b)) or Change(value)


#: The basis of a change of throughput under a rate that both keep.
KEPT = "both keep the rate"


def _kept(metric: Metric, side: Side) -> bool:
    point = side.report.point(side.role, metric.at) if metric.at else None
    return bool(point and point.kept)


def _degrees(a: Side, b: Side) -> int:
    """Degrees of freedom that the shorter of two measurements has."""
    return max(1, min(a.report.workload.rounds, b.report.workload.rounds) - 1)


def _ratio(side: Side, metric: Metric) -> SpeedRatio | None:
    """The system / its report's baseline; None when the report holds none of this metric."""
    if metric.at is None:
        return None
    name = metric.name.removesuffix("_p50")
    known = [r for r in side.report.speed_ratios if (r.metric, r.load, r.shape) == (name, metric.at, metric.shape)]
    return known[0] if known else None


def _within(metric: Metric, a: Side, b: Side) -> Change | None:
    """Baseline and candidate of one report, measured in turns."""
    ratio = _ratio(b, metric)
    if (a.role, b.role) != ("baseline", "candidate") or ratio is None or ratio.low is None or ratio.high is None:
        return None
    return Change(ratio.ratio - 1, ratio.low - 1, ratio.high - 1, "measured in turns", ratio.p_value)


def _mover(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """b - a of two independent estimates (value, low, high) with its interval, recovered from theirs: MOVER, Zou &
    Donner, Statistics in Medicine 27 (2008) 1693."""
    value = b[0] - a[0]
    return value, value - math.hypot(b[0] - b[1], a[2] - a[0]), value + math.hypot(b[2] - b[0], a[0] - a[1])


def _between(
    before: Figure, after: Figure, basis: str = "both reports' intervals", degrees: int | None = None
) -> Change | None:
    """The relative change between two figures that each have an interval: on the logarithm, where ratios add up.

    Args:
        degrees: of freedom, for a p-value that is below 5% where the interval leaves out no change.
    """
    ends = [end for figure in (before, after) for end in (figure.value, figure.low, figure.high)]
    if not all(ends) or None in ends or min(end for end in ends if end is not None) <= 0:
        return None
    logs = [math.log(end) for end in ends if end is not None]
    value, low, high = _mover((logs[0], logs[1], logs[2]), (logs[3], logs[4], logs[5]))
    p_value = None
    if degrees is not None and value != 0.0:
        reach = value - low if value > 0 else high - value
        edge = float(stats.t.ppf(0.975, degrees))
        p_value = float(2.0 * stats.t.sf(edge * abs(value) / reach, degrees)) if reach > 0 else 0.0
    return Change(math.expm1(value), math.expm1(low), math.expm1(high), basis, p_value)


def _apart(before: Figure, after: Figure) -> Change:
    """The difference of two shares."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Change(after.value - before.value)
    one, two = (before.value, before.low, before.high), (after.value, after.low, after.high)
    return Change(*_mover(one, two), "both reports' intervals")


def _through_baseline(metric: Metric, a: Side, b: Side) -> Change | None:
    """Systems of two reports that measured the same baseline: (B / baseline) / (A / baseline), in which what the
    machine did on either day is left out. The baselines themselves are one: no change."""
    ratios = []
    for side in (a, b):
        ratio = _ratio(side, metric)
        kept = metric.name in THROUGHPUT and all(_kept(metric, Side(side.report, role)) for role in ROLES)
        if side.role == "baseline" or kept:
            ratios.append(Figure(1.0, 1.0, 1.0))
        elif ratio is None:
            return None
        else:
            ratios.append(Figure(ratio.ratio, ratio.low, ratio.high))
    one, two = ratios
    return _between(one, two, THROUGH, _degrees(a, b)) or Change(relative(one.value, two.value), basis=THROUGH)


#: The basis of a change that goes through the baseline of both reports.
THROUGH = "through the same baseline"


def same_baseline(a: Report, b: Report) -> bool:
    """Whether the baselines of two reports are one system, served alike."""
    one, two = a.systems["baseline"], b.systems["baseline"]
    keys = ("label", "quantization", "disk_bytes", "server_version", "serve_arguments")
    return all(getattr(one, key) == getattr(two, key) for key in keys)
