"""The benchmark's plots as PNG files, drawn from results.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.studies.quantizer.results import later_layers, line

__all__ = ["draw"]

_INK, _MUTED, _GRID = "#22272e", "#656d76", "#d8dee4"
_COLOURS = ("#2f6fb3", "#e08a1e", "#3f9c6b", "#8a5fbf", "#c2474b", "#7d8590", "#37a3b5")


def draw(parts: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw a PNG for every part that has one; return the file's name by part."""
    drawn = {}
    for part, plot in (("speed", _speed), ("cost", _cost), ("quality", _quality)):
        if part in parts:
            figure = plot(parts[part])
            figure.savefig(out / f"{part}.png", dpi=144, metadata={"Software": None})
            drawn[part] = f"{part}.png"
    return drawn


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("bottom", "left"):
            axis.spines[side].set_color(_GRID)
        axis.tick_params(colors=_MUTED, labelsize=9)
        axis.grid(color=_GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _speed(part: dict[str, Any]) -> Any:
    """Seconds of a layer, a bar for every system and shape."""
    bars = [
        (f"{shape.upper()}, {name}", later_layers(run), name)
        for shape, found in part["shapes"].items()
        for name, run in found["systems"].items()
        if "failed" not in run
    ]
    figure, (axis,) = _figure(1, 7.2, 0.9 + 0.42 * len(bars))
    colours = {"stock": _COLOURS[5], "ours": _COLOURS[0], "ours, nearest": _COLOURS[6]}
    axis.barh(range(len(bars)), [b[1] for b in bars], color=[colours[b[2]] for b in bars], height=0.62)
    for y, (_, seconds, _) in enumerate(bars):
        axis.annotate(f"{seconds:.2f} s", (seconds, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [b[0] for b in bars])
    axis.invert_yaxis()
    axis.set_xlim(right=max(b[1] for b in bars) * 1.12)
    axis.set_xlabel("seconds a layer, lower is better", color=_MUTED, fontsize=9)
    return figure


def _plain(value: float, _: int | None = None) -> str:
    """Label a tick without a power: 65,536 or 0.25."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _minor(value: float, _: int | None = None) -> str:
    """Label 2 and 5 between the powers of ten of a logarithmic axis."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def _cost(part: dict[str, Any]) -> Any:
    """Seconds of a layer against tokens and against weights, log-log, each with a line to compare with."""
    figure, (left, right) = _figure(2, 8.4, 3.4)
    points = [(point["tokens"], later_layers(point)) for point in part["samples"]]
    fixed, each, _ = line(points)
    left.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[0], label="measured")
    left.plot(
        [x for x, _ in points],
        [fixed + each * x for x, _ in points],
        color=_MUTED,
        linestyle=(0, (4, 2)),
        label=f"{fixed:.2f} s + {each * 1e6:.1f} s a million tokens",
    )
    left.set_xscale("log", base=2)
    left.set_xlabel(f"calibration tokens ({part['shape'].upper()} shape)", color=_MUTED, fontsize=9)
    points = [(point["weights"] / 1e6, later_layers(point)) for point in part["width"]]
    end, top = points[-1]
    right.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[0], label="measured")
    right.plot(
        [x for x, _ in points],
        [top * x / end for x, _ in points],
        color=_MUTED,
        linestyle=(0, (4, 2)),
        label="proportional",
    )
    for (x, y), point in zip(points, part["width"], strict=True):
        right.annotate(point["shape"].upper(), (x, y), (6, -10), textcoords="offset points", fontsize=9)
    right.set_xscale("log")
    right.set_xlabel(f"million weights in a layer ({part['width'][0]['tokens']:,} tokens)", color=_MUTED, fontsize=9)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_ylabel("seconds a layer", color=_MUTED, fontsize=9)
        axis.legend(frameon=False, fontsize=9)
        axis.tick_params(which="minor", colors=_MUTED, labelsize=9)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(_plain)
            ticks.set_minor_formatter(_minor)
    return figure


def _quality(part: dict[str, Any]) -> Any:
    """KL divergence from fp16 of every method, a panel for each group size."""
    groups = sorted({method["group_size"] for method in part["methods"]}, reverse=True)
    figure, axes = _figure(len(groups), 4.6 * len(groups), 3.4)
    for axis, group in zip(axes, groups, strict=True):
        found = [m for m in part["methods"] if m["group_size"] == group and "failed" not in m]
        colours = [_COLOURS[0] if m["name"].startswith("ours") else _COLOURS[5] for m in found]
        axis.barh(range(len(found)), [1000 * m["kl"] for m in found], color=colours, height=0.62)
        axis.set_yticks(range(len(found)), [m["name"] for m in found], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"groups of {group}", color=_INK, fontsize=10)
    figure.supxlabel("KL from fp16, thousandths of a nat a token, lower is better", color=_MUTED, fontsize=9)
    return figure
