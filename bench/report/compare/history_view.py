"""A history as people read it: in the terminal, and as one page with a plot for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.report import words
from bench.report.compare import view
from bench.report.compare.changes import THROUGH
from bench.report.compare.history import Moment, Track
from bench.report.render.pages import page
from bench.report.render.plots import history_plot
from toolkit.tables import table

__all__ = ["cells", "render", "show"]

HEAD = ("report", "figure", "change", "95% interval", "says", "baseline by itself")


def cells(track: Track, moment: Moment) -> list[str]:
    """What is said of a figure in one report: the figure, its change, the interval, what it says, the baseline's."""
    value = "–" if moment.value is None else view.figure(track.metric, moment.value)
    if moment.row is None:
        return [value, "–", "", "the first" if moment is track.moments[0] else "not measured", ""]
    machine = "" if moment.machine is None else words.change(1.0, 1.0 + moment.machine) if moment.machine else "0%"
    change, interval = view.change(moment.row)
    return [value, change, interval, " ".join(view.verdict(moment.row)), machine]


def dated(moment: Moment) -> str:
    """When a report was made, and of whom."""
    return f"{moment.side.report.created:%Y-%m-%d %H:%M}, {moment.side.label}"


def through(tracks: Sequence[Track]) -> bool:
    """Whether changes of speed were told through the baseline."""
    rows = [moment.row for track in tracks for moment in track.moments if moment.row]
    return any(row.change.basis == THROUGH for row in rows)


def show(tracks: Sequence[Track], console: Console) -> None:
    """Print a table for each figure."""
    for track in tracks:
        shown = table(HEAD, range(1, len(HEAD)), title=track.name)
        for moment in track.moments:
            shown.add_row(dated(moment), *cells(track, moment))
        console.print(shown, "")


def render(tracks: Sequence[Track], differences: Sequence[str]) -> str:
    """Return the page."""
    parts: list[dict[str, Any]] = []
    for track in tracks:
        parts.append(
            {
                "name": track.name,
                "plot": history_plot(track.name, _drawn(track), points=track.metric.is_share),
                "rows": [(dated(moment), cells(track, moment)) for moment in track.moments],
            }
        )
    sides = [moment.side for moment in tracks[0].moments] if tracks else []
    return page(
        "history.html.j2", parts=parts, head=HEAD, through=through(tracks), sides=sides, differences=differences
    )


def _drawn(track: Track) -> list[tuple[str, tuple[float, float, float] | None, float | None]]:
    """Of each report its day, the change with its interval, and the baseline's own; in percent or points."""
    drawn: list[tuple[str, tuple[float, float, float] | None, float | None]] = []
    for moment in track.moments:
        change = moment.row.change if moment.row else None
        if change is not None:
            ends = [end if end is not None else change.value for end in (change.low, change.high)]
            spot: tuple[float, float, float] | None = (100 * change.value, 100 * ends[0], 100 * ends[1])
        else:
            spot = (0.0, 0.0, 0.0) if moment is track.moments[0] else None
        machine = None if moment.machine is None else 100 * moment.machine
        drawn.append((f"{moment.side.report.created:%m-%d}", spot, machine))
    return drawn
