"""The report's plots as inline SVG whose colours are the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from bench.report.model import Accuracy, Judgement, Report, Role, SpeedPoint, TaskAccuracy

__all__ = ["accuracy_plot", "difference_plot", "speed_plots"]

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
ROLES: tuple[Role, ...] = ("baseline", "candidate")


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
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
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


_Pick = Callable[[SpeedPoint], tuple[float, float | None] | None]


def _ttft(point: SpeedPoint) -> tuple[float, float | None] | None:
    return point.ttft_ms.p50, point.ttft_ms.p90


def _tpot(point: SpeedPoint) -> tuple[float, float | None] | None:
    return (point.tpot_ms.p50, point.tpot_ms.p90) if point.tpot_ms else None


def _e2e(point: SpeedPoint) -> tuple[float, float | None] | None:
    return point.e2e_ms.p50, point.e2e_ms.p90


def _throughput(point: SpeedPoint) -> tuple[float, float | None] | None:
    return None if point.output_tokens_per_s is None else (point.output_tokens_per_s, None)


#: title, what is drawn, how to read it.
PANELS: tuple[tuple[str, str, _Pick], ...] = (
    ("Time to first token", "ms, lower is better; line p50, whisker to p90", _ttft),
    ("Time per output token", "ms, lower is better; line p50, whisker to p90", _tpot),
    ("End-to-end latency", "ms, lower is better; line p50, whisker to p90", _e2e),
    ("Throughput", "output tokens/s, higher is better", _throughput),
)


def speed_plots(report: Report) -> list[tuple[str, str, str]]:
    """Return (title, how to read it, SVG) for each metric against requests in flight; metrics nobody reported are left
    out."""
    plots = []
    for title, reading, pick in PANELS:
        drawn = False
        figure, axes = _figure(4.3, 2.7)
        concurrencies = report.workload.concurrencies
        for role, shift in (("baseline", -0.06), ("candidate", 0.06)):
            look = LOOKS["baseline" if role == "baseline" else "candidate"]
            points = [
                (i, report.point("baseline" if role == "baseline" else "candidate", c))
                for i, c in enumerate(concurrencies)
            ]
            values = [(i + shift, found) for i, point in points if point and (found := pick(point))]
            if not values:
                continue
            drawn = True
            xs = [x for x, _ in values]
            ys = [value for _, (value, _) in values]
            for x, (value, upper) in values:
                if upper is not None:
                    axes.plot([x, x], [value, upper], color=look["color"], linewidth=1.4, alpha=0.7)
                    axes.plot([x], [upper], marker="_", markersize=7, color=look["color"], alpha=0.7)
            axes.plot(xs, ys, markersize=6, linewidth=1.8, **look)
        if not drawn:
            continue
        axes.set_xticks(range(len(concurrencies)), [str(c) for c in concurrencies])
        axes.set_xlim(-0.35, len(concurrencies) - 0.65)
        axes.set_ylim(0, 1.06 * axes.dataLim.ymax)
        axes.set_xlabel("requests in flight", color=MUTED, fontsize=9)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        plots.append((title, reading, _svg(figure, f"{title} against requests in flight")))
    return plots
