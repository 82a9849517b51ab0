"""The report's plots as inline SVG whose colours are the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.schema import Accuracy, Distribution, Judgement, Load, Report, SpeedPoint, TaskAccuracy
from bench.roles import ROLES, Role

__all__ = ["accuracy_plot", "cdf_plots", "difference_plot", "history_plot", "speed_curve", "speed_curves"]

# Colours that stand for CSS variables; matplotlib only takes real ones.
INK, MUTED, GRID, BASELINE, CANDIDATE, PAPER = (f"#0a0b0{n}" for n in range(1, 7))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    BASELINE: "--baseline",
    CANDIDATE: "--candidate",
    PAPER: "--card",
}
#: Shape and dash tell the systems apart without colour.
LOOKS: dict[Role, dict[str, Any]] = {
    "baseline": {"color": BASELINE, "marker": "s", "linestyle": (0, (4, 2))},
    "candidate": {"color": CANDIDATE, "marker": "o", "linestyle": "-"},
}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, in the page's style, without touching global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0.0)
    axes.patch.set_alpha(0.0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", colors=MUTED, length=0, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """Return the figure as an SVG element that scales, is named for screen readers and has text as text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Ids must stay unique when several plots share a page.
    prefix = re.sub(r"\W+", "-", label.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


#: verdict -> marker: the shape tells, not a colour.
MARKERS: dict[Judgement, dict[str, Any]] = {
    "no worse": {"marker": "o"},
    "worse": {"marker": "x", "markeredgewidth": 2.2, "markersize": 7},
    "can't tell": {"marker": "o", "markerfacecolor": PAPER, "markeredgewidth": 1.6},
}


def accuracy_plot(rows: Sequence[TaskAccuracy]) -> str:
    """Accuracy by task: a marker for each system with its 95% interval."""
    figure, axes = _figure(5.6, 0.5 + 0.36 * len(rows))
    lowest = 1.0
    for index, row in enumerate(rows):
        for role, offset in (("baseline", -0.15), ("candidate", 0.15)):
            share = row.baseline if role == "baseline" else row.candidate
            lowest = min(lowest, share.low)
            look = LOOKS["baseline" if role == "baseline" else "candidate"]
            y = index + offset
            axes.plot(
                [100 * share.low, 100 * share.high], [y, y], color=look["color"], linewidth=1.6, solid_capstyle="round"
            )
            axes.plot(
                [100 * share.value], [y], marker=look["marker"], markersize=5.5, color=look["color"], linestyle="none"
            )
    axes.set_yticks(range(len(rows)), [row.task for row in rows])
    axes.tick_params(axis="y", labelsize=10, colors=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(max(0.0, 10 * (100 * lowest // 10)) - 1.0, 101.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    return _svg(figure, "Accuracy by task with 95% intervals")


def difference_plot(accuracy: Accuracy, margin: float) -> str:
    """Candidate - baseline by task and over all with 95% intervals, 0 and the margin as lines."""
    rows = [*accuracy.tasks, accuracy.overall]
    figure, axes = _figure(5.6, 0.5 + 0.36 * len(rows))
    axes.axvline(0.0, color=MUTED, linewidth=1.0)
    axes.axvline(-100 * margin, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    for index, row in enumerate(rows):
        d = row.difference
        axes.plot(
            [100 * d.low, 100 * d.high], [index] * 2, color=CANDIDATE, linewidth=1.6, solid_capstyle="round", zorder=2
        )
        look = {"markersize": 5.5, "color": CANDIDATE, "linestyle": "none"} | MARKERS[row.verdict]
        axes.plot([100 * d.value], [index], zorder=3, **look)
    axes.set_yticks(range(len(rows)), [row.task for row in rows])
    axes.tick_params(axis="y", labelsize=10, colors=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "\u2212") if value else "0")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    return _svg(figure, "Difference by task with 95% intervals")


#: title, y label, the latency drawn.
CURVES: tuple[tuple[str, str, Callable[[SpeedPoint], Distribution | None]], ...] = (
    ("Time to first token against throughput", "TTFT, ms", lambda point: point.ttft_ms),
    ("Time per output token against throughput", "TPOT, ms", lambda point: point.tpot_ms),
)


def speed_curves(report: Report) -> list[tuple[str, str, str]]:
    """Return (title, how to read it, SVG) for the latencies against throughput, a point a load: those of the sweep
    where there is one."""
    plots = []
    for title, label, pick in CURVES:
        found = speed_curve(report, label, pick)
        if found:
            figure, reading = found
            plots.append((title, reading, _svg(figure, title)))
    return plots


def speed_curve(
    report: Report, label: str, pick: Callable[[SpeedPoint], Distribution | None]
) -> tuple[Any, str] | None:
    """Draw a latency against throughput; return the figure and how to read it, None where nothing is to be drawn.

    Args:
        label: of the latency's axis.
        pick: the latency of a point.
    """
    swept = [point for point in report.speed if point.load.kind in ("single", "saturation", "rate")]
    points = swept or report.speed
    counted = all(point.output_tokens_per_s is not None for point in points)
    figure, axes = _figure(4.3, 2.9)
    labels: list[_Label] = []
    for role in ROLES:
        known = [(point, latency) for point in points if point.role == role and (latency := pick(point))]
        spots = [
            (point.throughput("output_tokens_per_s" if counted else "requests_per_s") or 0.0, latency, point)
            for point, latency in known
        ]
        spots.sort(key=lambda spot: spot[0])
        good = [(x, latency, point.load) for x, latency, point in spots if not point.invalid]
        look = LOOKS[role]
        for x, latency, _ in good:
            axes.plot([x, x], [latency.p50, latency.p90], color=look["color"], linewidth=1.4, alpha=0.7)
            axes.plot([x], [latency.p90], marker="_", markersize=7, color=look["color"], alpha=0.7)
        # A rate is no step between two numbers in flight: the line joins loads of one kind.
        for rates in (False, True):
            line = [(x, latency.p50) for x, latency, load in good if load.has_rate == rates]
            if line:
                inside = {"markerfacecolor": PAPER, "linewidth": 1.0} if rates else {"linewidth": 1.8}
                axes.plot(*zip(*line, strict=True), markersize=6, **look, **inside)
        for x, latency, point in spots:
            if point.invalid:
                axes.plot([x], [latency.p50], marker="x", markersize=6, color=look["color"], linestyle="none")
            labels.append(_Label(_short(point.load), x, latency.p50, _outer(report, point)))
    if not labels:
        return None
    wide = [name for name, which, room in _AXES if _scale(axes, which, room)]
    axes.set_xlabel("output tokens/s" if counted else "requests/s", color=MUTED, fontsize=9)
    axes.set_ylabel(label, color=MUTED, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    _annotate(figure, axes, labels)
    reading = "down and right is better; p50, whisker to p90; numbers: the load"
    reading += ", hollow: a rate" if any(point.load.has_rate for point in points) else ""
    reading += f"; logarithmic: {' and '.join(wide)}" if wide else ""
    return figure, reading


@dataclass(frozen=True, slots=True)
class _Label:
    """What is written beside a point; ``outer``: to its upper left, if there is room."""

    text: str
    x: float
    y: float
    outer: bool


#: Where a label may stand, in points from its own: the side that is wanted first, then around, then farther away.
_PLACES = [
    (reach * across, reach * up)
    for reach in (5, 12, 19, 27, 36)
    for across, up in ((1, -1), (-1, 1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
]
#: Half of a marker's side, in points.
_MARK = 4.0


def _annotate(figure: Any, axes: Any, labels: Sequence[_Label]) -> None:
    """Write labels so that none lies on another or on a marker. One for which no place is free is left out: what it
    says is in the table."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout moves the axes
    figure.set_layout_engine("none")  # and is not to move them under the labels
    scale = figure.dpi / 72.0
    spots = [axes.transData.transform((label.x, label.y)) for label in labels]
    mark = _MARK * scale
    taken = [Bbox([(x - mark, y - mark), (x + mark, y + mark)]) for x, y in spots]
    room = figure.bbox
    for label in sorted(labels, key=lambda each: (each.x, each.y)):
        # The slower system's to the upper left, the other's to the lower right.
        places = sorted(_PLACES, key=lambda place: (max(map(abs, place)), (place[1] - place[0] > 0) != label.outer))
        for across, up in places:
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                xytext=(across, up),
                textcoords="offset points",
                ha="right" if across < 0 else "left" if across else "center",
                va="bottom" if up > 0 else "top" if up else "center",
                fontsize=8,
                color=MUTED,
            )
            box = text.get_window_extent().padded(scale)  # a browser's letters may be a bit wider
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _outer(report: Report, point: SpeedPoint) -> bool:
    """Whether a point's label goes to the upper left: that of the slower system, to keep two of a load apart."""
    other = report.point("candidate" if point.role == "baseline" else "baseline", point.load.name)
    if other is None or other.requests_per_s == point.requests_per_s:
        return point.role == "baseline"
    return (point.requests_per_s or 0) < (other.requests_per_s or 0)


#: Data that spans more than this factor is drawn on a logarithmic axis: what is small would lie on one spot.
_WIDE = 10


#: What is drawn, on which axis, and how much room, as a factor, is left beyond it.
_AXES = (("throughput", "x", 1.3), ("latency", "y", 1.15))


def _scale(axes: Any, which: str, room: float) -> bool:
    """Set an axis's limits, from 0 on where that leaves the points apart; returns whether it is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    limits = axes.dataLim
    least, most = (limits.xmin, limits.xmax) if which == "x" else (limits.ymin, limits.ymax)
    wide = bool(0 < _WIDE * least < most)
    getattr(axes, f"set_{which}lim")(least / room if wide else 0, room * most)
    if wide:
        axis = getattr(axes, f"{which}axis")
        getattr(axes, f"set_{which}scale")("log")
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    return wide


def _short(load: Load) -> str:
    """A load beside its point: so many in flight, a rate, how fast a replay is, or a share of saturation."""
    if load.share is not None:
        return f"{load.share:.0%}"
    if load.speed is not None:
        return f"{load.speed:g}x"
    return f"{load.rate_per_s:g}/s" if load.rate_per_s is not None else f"{load.concurrency}"


#: What is drawn as a cumulative distribution.
CDFS: tuple[tuple[str, Callable[[SpeedPoint], Distribution | None]], ...] = (
    ("Time to first token", lambda point: point.ttft_ms),
    ("Time per output token", lambda point: point.tpot_ms),
)


def cdf_plots(report: Report) -> list[tuple[str, str, str]]:
    """Return (title, how to read it, SVG) for the distributions of latencies under the first and the last load that
    both systems were under; those of a sweep only where there are no others."""
    both = [load for load in report.loads if all(report.point(role, load.name) for role in ROLES)]
    loads = [load for load in both if load.kind in ("closed", "open", "replay")]
    loads = loads or [load for load in both if load.kind != "rate"]
    plots = []
    for name, pick in CDFS:
        for load in dict.fromkeys([*loads[:1], *loads[-1:]]):
            figure, axes = _figure(4.3, 2.4)
            curves: list[tuple[Role, list[float]]] = []
            for role in ROLES:
                point = report.point(role, load.name)
                latency = pick(point) if point else None
                if latency and latency.cdf:
                    curves.append((role, latency.cdf))
            if not curves:
                continue
            for role, curve in curves:
                look = LOOKS[role]
                axes.plot(curve, range(101), color=look["color"], linestyle=look["linestyle"], linewidth=1.8)
                axes.plot([curve[50]], [50], marker=look["marker"], markersize=6, color=look["color"], linestyle="none")
            axes.set_xlim(0, 1.02 * max(curve[100] for _, curve in curves))
            axes.set_ylim(0, 102)
            axes.set_yticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
            axes.set_xlabel("ms", color=MUTED, fontsize=9)
            axes.grid(color=GRID, linewidth=0.8)
            title = f"{name}, {load.name}"
            plots.append((title, "share of requests that took at most so long; mark: the median", _svg(figure, title)))
    return plots


def history_plot(
    name: str, moments: Sequence[tuple[str, tuple[float, float, float] | None, float | None]], *, points: bool
) -> str:
    """Draw how a figure changed from report to report.

    Args:
        name: of the figure.
        moments: of each report, the oldest first: its day; the change from the first with the ends of its interval, in
            percent or points; the baseline's own change, where that is known.
        points: whether changes are in percentage points.
    """
    figure, axes = _figure(7.4, 2.4)
    axes.axhline(0.0, color=MUTED, linewidth=1.0)
    machine = [(at, own) for at, (_, _, own) in enumerate(moments) if own is not None]
    if len(machine) > 1:
        look = LOOKS["baseline"] | {"markerfacecolor": PAPER, "markersize": 5, "linewidth": 1.0}
        axes.plot(*zip(*machine, strict=True), **look)
    known = [(at, spot) for at, (_, spot, _) in enumerate(moments) if spot is not None]
    for at, (_, low, high) in known:
        axes.plot([at, at], [low, high], color=CANDIDATE, linewidth=1.6, solid_capstyle="round")
    line = [(at, spot[0]) for at, spot in known]
    axes.plot(*zip(*line, strict=True), markersize=6, linewidth=1.2, **LOOKS["candidate"])
    # As many days as can be read side by side.
    step = max(1, -(-len(moments) // 12))
    axes.set_xticks(range(0, len(moments), step), [day for day, _, _ in moments][::step])
    axes.set_xlim(-0.5, len(moments) - 0.5)
    unit = " pt" if points else "%"
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}{unit}".replace("-", "\u2212") if value else f"0{unit}")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    return _svg(figure, f"{name}, change by report")
