"""How a figure changed from one system to another, with the interval of the change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.report.compare.figures import COUNTED, Figure, Metric, Side
from bench.report.schema import Report, TaskAccuracy

__all__ = ["Change", "Row", "change", "relative", "same_baseline"]


@dataclass(frozen=True, slots=True)
class Change:
    """B - A of a share, a fraction of 1; (B - A) / A of anything else. With its 95% interval, if there is one.

    Attributes:
        basis: how the interval was found; empty where there is none.
        p_value: of the paired test, for accuracies.
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
    found = _within(metric, a, b) or _between(before, after) or _through_baseline(metric, a, b)
    return found or Change(value)


def _ratio(report: Report, metric: Metric) -> Figure | None:
    """Candidate / baseline in a report, with its interval; None when it holds none of this metric."""
    name = metric.name.removesuffix("_p50")
    found = next((r for r in report.speed_ratios if (r.metric, r.load) == (name, metric.at)), None)
    return Figure(found.ratio, found.low, found.high) if found else None


def _within(metric: Metric, a: Side, b: Side) -> Change | None:
    """Baseline and candidate of one report, measured in turns."""
    if a.report is not b.report or (a.role, b.role) != ("baseline", "candidate"):
        return None
    ratio = _ratio(a.report, metric)
    if ratio is None or ratio.low is None or ratio.high is None:
        return None
    return Change(ratio.value - 1, ratio.low - 1, ratio.high - 1, "measured in turns")


def _mover(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """b - a of two independent estimates (value, low, high) with its interval, recovered from theirs: MOVER, Zou &
    Donner, Statistics in Medicine 27 (2008) 1693."""
    value = b[0] - a[0]
    return value, value - math.hypot(b[0] - b[1], a[2] - a[0]), value + math.hypot(b[2] - b[0], a[0] - a[1])


def _between(before: Figure, after: Figure, basis: str = "both reports' intervals") -> Change | None:
    """The relative change between two figures that each have an interval: on the logarithm, where ratios add up."""
    ends = [end for figure in (before, after) for end in (figure.value, figure.low, figure.high)]
    if not all(ends) or None in ends or min(end for end in ends if end is not None) <= 0:
        return None
    logs = [math.log(end) for end in ends if end is not None]
    value, low, high = _mover((logs[0], logs[1], logs[2]), (logs[3], logs[4], logs[5]))
    return Change(math.expm1(value), math.expm1(low), math.expm1(high), basis)


def _apart(before: Figure, after: Figure) -> Change:
    """The difference of two shares."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Change(after.value - before.value)
    one, two = (before.value, before.low, before.high), (after.value, after.low, after.high)
    return Change(*_mover(one, two), "both reports' intervals")


def _through_baseline(metric: Metric, a: Side, b: Side) -> Change | None:
    """Candidates of two reports that measured the same baseline: (B / baseline) / (A / baseline), in which what the
    machine did on either day is left out."""
    if (a.role, b.role) != ("candidate", "candidate") or not same_baseline(a.report, b.report):
        return None
    one, two = _ratio(a.report, metric), _ratio(b.report, metric)
    return _between(one, two, "against the same baseline") if one and two else None


def same_baseline(a: Report, b: Report) -> bool:
    """Whether the baselines of two reports are one system, served alike."""
    one, two = a.systems["baseline"], b.systems["baseline"]
    keys = ("label", "quantization", "disk_bytes", "server_version", "serve_arguments")
    return all(getattr(one, key) == getattr(two, key) for key in keys)
