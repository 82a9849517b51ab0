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
    "steady_requests_per_s": "requests/s",
    "steady_output_tokens_per_s": "output tokens/s",
    "requests_per_s": "requests/s, to the last",
    "output_tokens_per_s": "output tokens/s, to the last",
    "total_tokens_per_s": "total tokens/s",
    "goodput_per_s": "goodput",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a latency, ms; p50 is the median of the rounds'. Empty where the report does not say, and where
    fewer requests than it takes lie beyond it: a p99 takes a hundred."""

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
        kept: ``rate kept`` for a rate that the server kept up with; else empty.
        shapes: the p50 of each latency by shape of request; empty where all have the same.
    """

    load: str
    system: str
    role: Role
    latencies: list[Spread | None]
    tokens_per_s: str
    requests_per_s: str
    completed: int
    marks: str
    kept: str
    shapes: list[tuple[str, list[str]]]


def _spread(found: Distribution | None, middle: float | None) -> Spread | None:
    if found is None or middle is None:
        return None

    def of(share: int, value: float | None) -> str:
        # Of 9 requests the 99th percentile is the slowest one.
        return "" if value is None or found.n * (100 - share) < 100 else words.number(value)

    return Spread(words.number(middle), of(90, found.p90), of(95, found.p95), of(99, found.p99))


def speed_row(point: SpeedPoint, report: Report) -> SpeedRow:
    """Return the row of a point."""
    tokens = point.throughput("output_tokens_per_s")
    requests = point.throughput("requests_per_s")
    latencies: list[SpeedFigure] = ["ttft", "tpot", "itl", "e2e"]
    return SpeedRow(
        load=point.load.name,
        system=report.systems[point.role].label,
        role=point.role,
        latencies=[_spread(getattr(point, f"{name}_ms"), point.figure(name)) for name in latencies],
        tokens_per_s=NOTHING if tokens is None else words.number(tokens),
        requests_per_s=NOTHING if requests is None else words.number(requests),
        completed=point.completed,
        marks=words.marks(point),
        kept="rate kept" if point.kept and point.load.has_rate else "",
        shapes=[
            (shape, [words.number(found[name].value) if name in found else NOTHING for name in latencies])
            for shape, found in point.by_shape.items()
        ],
    )


@dataclass(frozen=True, slots=True)
class Ratios:
    """Candidate / baseline: a column a figure of `FIGURES` that some load has, a row a load."""

    head: list[str]
    rows: list[tuple[str, list[Cell]]]


#: Where throughput is known without a round's end, that with it is left to report.json.
_LESS = {"requests_per_s": "steady_requests_per_s", "output_tokens_per_s": "steady_output_tokens_per_s"}


def ratios(report: Report) -> Ratios:
    """Return candidate / baseline of every figure under every load that both were under, and by shape of request."""
    known = {ratio.metric for ratio in report.speed_ratios}
    open_ = {load.name for load in report.loads if load.has_rate}
    late = {r.metric for r in report.speed_ratios if r.load in open_}
    metrics = [name for name in FIGURES if name in known and (name in late or _LESS.get(name) not in known)]
    rows = []
    for load, shape in dict.fromkeys((ratio.load, ratio.shape) for ratio in report.speed_ratios):
        found = [report.ratio(metric, load, shape) for metric in metrics]
        cells = [Cell(words.ratio(r.ratio), words.ratio_interval(r.low, r.high)) if r else Cell(NOTHING) for r in found]
        rows.append((f"{load}, {shape}" if shape else load, cells))
    return Ratios([FIGURES[metric] for metric in metrics], rows)


@dataclass(frozen=True, slots=True)
class Counted:
    """Goodput, and what the servers and the GPUs counted: the columns that some point has, and each point's cells."""

    head: list[str]
    rows: list[tuple[SpeedRow, list[str]]]


def cost(point: SpeedPoint, price: float | None) -> str:
    """What a million output tokens cost under a load, of a machine that costs so much an hour."""
    rate = point.throughput("output_tokens_per_s")
    return words.number(1e6 * price / 3600.0 / rate) if price and rate else NOTHING


def _kind(point: SpeedPoint, *, images: bool) -> str:
    """Mean tokens of a request's prompt that are of its images, or of its text."""
    if point.image_tokens is None or point.prompt_tokens is None or not point.completed:
        return NOTHING
    tokens = point.image_tokens if images else point.prompt_tokens - point.image_tokens
    return words.number(tokens / point.completed)


def counted(report: Report) -> Counted:
    """Return the columns that some point has; neither columns nor rows where nothing was counted."""
    slos = f" under {', '.join(report.workload.slos)}" if report.workload.slos else ""
    columns: dict[str, Callable[[SpeedPoint, ServerCounters], str]] = {
        f"Goodput{slos}, requests/s": lambda point, _: (
            f"{words.number(point.goodput.per_s)} ({words.percent(point.goodput.share)})" if point.goodput else NOTHING
        ),
        "Text tokens a prompt": lambda point, _: _kind(point, images=False),
        "Image tokens a prompt": lambda point, _: _kind(point, images=True),
        "Settled after": lambda point, _: NOTHING if point.settled_s is None else f"{words.number(point.settled_s)} s",
        "Cached tokens": lambda _, server: words.percent(server.prefix_cache_share),
        "Cached images": lambda _, server: words.percent(server.image_cache_share),
        "Preemptions": lambda _, server: words.count(server.preemptions),
        "Guessed tokens taken": lambda _, server: (
            NOTHING
            if server.accepted_share is None or server.tokens_per_step is None
            else f"{words.percent(server.accepted_share)}, {words.number(server.tokens_per_step)} a step"
        ),
        "Queue, mean": lambda _, server: words.milliseconds(server.queue_mean_ms),
        "Cost of a million output tokens": lambda point, _: cost(point, report.workload.price),
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
