"""A comparison as one page that needs nothing else, in light and dark, on a phone and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.compare import view
from bench.report.compare.changes import Row
from bench.report.compare.comparison import Comparison
from bench.report.render.pages import page

__all__ = ["render"]

#: Flipped questions that are shown; report.html of each report has the others.
FLIPS = 60
#: verdict -> CSS class, sign, heading.
BADGES = {
    "no worse": ("good", "✓", "Accuracy no worse"),
    "worse": ("bad", "✗", "Worse"),
    "can't tell": ("open", "?", "Accuracy: can’t tell"),
    "": ("open", "–", "Accuracy not compared"),
}
TONES = {"better": "good", "worse": "bad", "same": "plain", "can't tell": "open"}


@dataclass(frozen=True, slots=True)
class Bar:
    """A change with its interval on an axis, as percentages of the axis' length.

    Attributes:
        dot: the change.
        low: the interval's ends.
        high: likewise.
        zero: where no change is.
    """

    dot: float
    low: float
    high: float
    zero: float


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Return each row's change on an axis, by metric: one axis for shares (points), one for all else (the logarithm of
    the ratio, so that halving and doubling are equally far). What has no interval has no bar."""
    found: dict[str, Bar] = {}
    for shares in (True, False):
        group = [row for row in rows if row.metric.is_share is shares and row.change.low is not None]
        spans = {}
        for row in group:
            values = [row.change.value, row.change.low or 0.0, row.change.high or 0.0]
            if shares or all(value > -1 for value in values):
                spans[str(row.metric)] = values if shares else [math.log1p(value) for value in values]
        finite = [value for values in spans.values() for value in values if math.isfinite(value)]
        edge = max([abs(value) for value in finite], default=0.0) or 1.0
        for name, values in spans.items():
            dot, low, high = (50.0 + 47.0 * max(-1.0, min(1.0, value / edge)) for value in values)
            found[name] = Bar(dot, low, high, 50.0)
    return found


def render(found: Sequence[Comparison]) -> str:
    """Return the page."""
    return page(
        "compare.html.j2",
        found=found,
        columns=view.columns(found),
        bars=[bars(comparison.rows) for comparison in found],
        headlines=[view.headline(comparison) for comparison in found],
        differences=view.differences(found),
        notes=view.notes(found),
        view=view,
        badges=BADGES,
        tones=TONES,
        most=FLIPS,
    )
