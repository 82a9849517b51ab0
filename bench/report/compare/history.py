"""How a system changed from report to report: each candidate against the first one, told through the baseline.

Reports of many days hold what the machine did on each. Where they measured the same baseline, its own change is known,
and the candidate's is told without it (`bench.report.compare.changes`); both are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.compare import view
from bench.report.compare.changes import Row, relative, same_baseline
from bench.report.compare.comparison import compare_all
from bench.report.compare.figures import Metric, Side, figures
from bench.report.render import json_file
from bench.report.schema import Report
from toolkit.errors import BenchError, UnmeasuredError

__all__ = ["Moment", "Track", "found_in", "tracks"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A figure in one report.

    Attributes:
        side: the candidate.
        row: its change from the first report's; None: it lacks the figure, or is the first.
        value: the figure; None where it lacks it.
        machine: by how much the baseline, the same in both, changed by itself, (B - A) / A; None: not the same
            baseline, or a figure that machines don't change.
    """

    side: Side
    row: Row | None
    value: float | None
    machine: float | None


@dataclass(frozen=True, slots=True)
class Track:
    """A figure over all reports, the oldest first."""

    metric: Metric
    name: str
    moments: list[Moment]


def found_in(paths: Sequence[Path]) -> list[tuple[Path, Report]]:
    """Read reports, and those in directories of reports; the oldest first.

    Raises:
        BenchError: there are fewer than two, or one can't be read.
        UnmeasuredError: one is marked failed.
    """
    files: list[Path] = []
    for path in paths:
        inside = [] if (path / json_file.FILE).exists() else sorted(path.glob(f"*/{json_file.FILE}"))
        files += [file.parent for file in inside] or [path]
    known = {file.resolve(): file for file in files}
    reports = sorted(((file, json_file.read(file)) for file in known.values()), key=lambda each: each[1].created)
    for file, report in reports:
        if report.status == "failed":
            raise UnmeasuredError(f"{file}: the report is marked failed and has no figures")
    if len(reports) < 2:
        raise BenchError("a history takes two reports or more: give their directories, or one that holds them")
    return reports


def tracks(sides: Sequence[Side], *, anyway: bool = False) -> list[Track]:
    """Return the figures that matter most, over all reports.

    Args:
        sides: the candidates, the oldest first.
        anyway: compare although what was asked, or the machine, differs.

    Raises:
        BenchError: they can't be compared.
    """
    compared = compare_all(sides, anyway=anyway)
    first = figures(sides[0])
    found = []
    for row in dict.fromkeys(row.metric for comparison in compared for row in view.leading(comparison)):
        moments = [Moment(sides[0], None, first[row].value if row in first else None, 0.0)]
        for comparison in compared:
            rows = {each.metric: each for each in comparison.rows}
            value = rows[row].after.value if row in rows else None
            moments.append(Moment(comparison.b, rows.get(row), value, _machine(row, sides[0], comparison.b)))
        found.append(Track(row, view.name(row), moments))
    return found


def _machine(metric: Metric, a: Side, b: Side) -> float | None:
    """The change of the baseline that both measured."""
    if metric.at is None or not same_baseline(a.report, b.report):
        return None
    before, after = (figures(Side(side.report, "baseline")).get(metric) for side in (a, b))
    return relative(before.value, after.value) if before and after else None
