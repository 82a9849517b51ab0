"""README's chart: milliseconds a token and memory of weights, 16 bits against four, from reports of `qvl bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.render import json_file
from bench.report.schema import Report
from bench.roles import ROLES
from toolkit.errors import BenchError

__all__ = ["REPORTS", "Pair", "draw", "pair"]

#: The reports that README's chart shows, by model, below docs/results.
REPORTS = (
    ("7B", "h100/7b-awq-qvl-against-bf16"),
    ("2B", "h100/2b-awq-qvl-against-bf16"),
)

_COLOURS = {"baseline": "#8a94a0", "candidate": "#0b63c5"}
_NAMES = {"baseline": "bf16", "candidate": "AWQ"}


@dataclass(frozen=True)
class Pair:
    """What a report says of its two systems: TPOT (p50) with one request in flight, in ms; weights, in GiB."""

    name: str
    machine: str
    ms: dict[str, float]
    gib: dict[str, float]


def pair(name: str, report: Report) -> Pair:
    """Take a chart's figures out of a report.

    Args:
        name: what its model is called in the chart.
        report: one with a load of one request in flight, of servers whose memory is known.

    Raises:
        BenchError: the report lacks one of the figures.
    """
    ms: dict[str, float] = {}
    gib: dict[str, float] = {}
    for role in ROLES:
        points = [p for p in report.speed if p.role == role and p.load.concurrency == 1]
        weights = report.systems[role].memory.weights_bytes
        tpot = points[0].figure("tpot") if points else None  # as the report itself quotes it
        if tpot is None or weights is None:
            raise BenchError(f"{name}: no time per token at one request in flight, or no memory of the {role}")
        ms[role], gib[role] = tpot, weights / 2**30
    seen = report.environment
    gpu = (seen.gpus or [seen.cpu])[0].split(",")[0]  # without memory and driver
    return Pair(name, f"{gpu}, vLLM {seen.versions.get('vllm', 'unknown')}", ms, gib)


def draw(reports: Sequence[tuple[str, Path]], out: Path) -> None:
    """Draw a bar for each system of each report, times on the left and memory on the right, as an SVG.

    Args:
        reports: names of models, and the directories of their reports.
        out: file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [pair(name, json_file.read(path)) for name, path in reports]
    units = {"ms": ".2f", "GiB": ".1f"}  # as README quotes them
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "qvl", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.95 * len(pairs) + 1.1), layout="constrained")
        for panel, title, unit in zip(axes, ("Time per token, one request", "Weights on the GPU"), units, strict=True):
            for row, each in enumerate(pairs):
                values = each.ms if unit == "ms" else each.gib
                for place, role in enumerate(ROLES):
                    height = row + 0.4 * place
                    panel.barh(
                        height, values[role], 0.36, color=_COLOURS[role], label=_NAMES[role] if not row else None
                    )
                    panel.text(values[role], height, f" {values[role]:{units[unit]}} {unit}", va="center")
            panel.set_title(title, loc="left", fontweight="bold")
            panel.set_yticks([row + 0.2 for row in range(len(pairs))], [each.name for each in pairs])
            panel.invert_yaxis()
            panel.set_xlim(0, max(max((p.ms if unit == "ms" else p.gib).values()) for p in pairs) * 1.25)
            panel.spines[["top", "right", "bottom"]].set_visible(False)
            panel.tick_params(bottom=False, labelbottom=False, left=False)
        axes[1].legend(frameon=False, loc="lower right")
        figure.supxlabel("; ".join(dict.fromkeys(each.machine for each in pairs)), fontsize=9, color="#5a6675")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})
        pyplot.close(figure)
