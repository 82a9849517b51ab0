"""Latency and throughput by load, candidate / baseline, and what servers and GPUs counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.report import words
from bench.report.schema import Distribution, Report, ServerCounters, SpeedFigure, SpeedPoint
from bench.report.view.cells import NOTHING, Cell
from bench.roles import Role

__all__ = ["FIGURES", "Counted", "Ratios", "SpeedRow", "Spread", "counted", "ratios", "speed_row"]

#: What is compared under a load, as it is called at the head of a column.
FIGURES: dict[SpeedFigure, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "goodput_per_s": "goodput",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a latency, ms; p95 is empty where the report does not say."""

    p50: str
    p90: str
    p95: str
    p99: str


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One system under one load.

    Attributes:
        latencies: TTFT, TPOT, ITL and E2E; None where there is none.
        completed: requests.
        marks: what is wrong with the point; empty when nothing is.
    """

    load: str
    system: str
    role: Role
    latencies: list[Spread | None]
    tokens_per_s: str
    requests_per_s: str
    completed: int
    marks: str


def _spread(found: Distribution | None) -> Spread | None:
    if found is None:
        return None
    p95 = "" if found.p95 is None else words.number(found.p95)
    return Spread(words.number(found.p50), words.number(found.p90), p95, words.number(found.p99))


def speed_row(point: SpeedPoint, report: Report) -> SpeedRow:
    """Return the row of a point."""
    tokens = point.output_tokens_per_s
    return SpeedRow(
        load=point.load.name,
        system=report.systems[point.role].label,
        role=point.role,
        latencies=[_spread(each) for each in (point.ttft_ms, point.tpot_ms, point.itl_ms, point.e2e_ms)],
        tokens_per_s=NOTHING if tokens is None else words.number(tokens),
        requests_per_s=words.number(point.requests_per_s),
        completed=point.completed,
        marks=words.marks(point),
    )


@dataclass(frozen=True, slots=True)
class Ratios:
    """Candidate / baseline: a column a figure of `FIGURES` that some load has, a row a load."""

    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def ratios(report: Report) -> Ratios:
    """Return candidate / baseline of every figure under every load that both were under."""
    metrics = [name for name in FIGURES if any(ratio.metric == name for ratio in report.speed_ratios)]
    rows = []
    for load in dict.fromkeys(ratio.load for ratio in report.speed_ratios):
        found = [report.ratio(metric, load) for metric in metrics]
        cells = [Cell(words.ratio(r.ratio), words.ratio_interval(r.low, r.high)) if r else Cell(NOTHING) for r in found]
        rows.append((load, cells))
    return Ratios([FIGURES[metric] for metric in metrics], rows)


@dataclass(frozen=True, slots=True)
class Counted:
    """Goodput, and what the servers and the GPUs counted: the columns that some point has, and each point's cells."""

    head: list[str]
    rows: list[tuple[SpeedRow, list[str]]]


def counted(report: Report) -> Counted:
    """Return the columns that some point has; neither columns nor rows where nothing was counted."""
    slos = f" under {', '.join(report.workload.slos)}" if report.workload.slos else ""
    columns: dict[str, Callable[[SpeedPoint, ServerCounters], str]] = {
        f"Goodput{slos}, requests/s": lambda point, _: (
            f"{words.number(point.goodput.per_s)} ({words.percent(point.goodput.share)})" if point.goodput else NOTHING
        ),
        "Cached tokens": lambda _, server: words.percent(server.prefix_cache_share),
        "Cached images": lambda _, server: words.percent(server.image_cache_share),
        "Preemptions": lambda _, server: words.count(server.preemptions),
        "Queue, mean": lambda _, server: words.milliseconds(server.queue_mean_ms),
        "Energy a token": lambda point, _: (
            NOTHING if point.energy_j_per_token is None else f"{words.number(point.energy_j_per_token)} J"
        ),
    }
    cells = {
        name: [of(point, point.server or ServerCounters()) for point in report.speed] for name, of in columns.items()
    }
    shown = [name for name, column in cells.items() if set(column) != {NOTHING}]
    if not shown:
        return Counted([], [])
    rows = [(speed_row(point, report), [cells[name][at] for name in shown]) for at, point in enumerate(report.speed)]
    return Counted(shown, rows)
