"""The latency-throughput curve of one server: one request at a time, then saturation, then rates between the two.

The first point is the least latency there is, the second the most throughput, and the open-loop points say what latency
costs at a share of it. The server is warm, and inputs are made before each point's clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from bench.load.client import Trace
from bench.load.loops import Block, Send, closed_loop, open_loop, schedule
from bench.load.metrics import Rates, Summary, steady, summarise
from bench.load.objectives import Slo
from bench.load.workload import Arrivals
from toolkit.errors import BenchError

__all__ = ["Point", "Sweep", "SweepPlan", "sweep"]

T = TypeVar("T")
Kind = Literal["single", "saturation", "rate"]

#: The highest rate, as a share of saturation: at 1 a queue grows without end.
TOP = 0.95


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """How much is measured.

    Attributes:
        rates: open-loop points.
        concurrency: requests in flight at saturation, enough to fill the server.
        single_requests: requests of the first point.
        requests: requests of each other point, at least; saturation gets 4 for each in flight.
        duration_s: seconds of an open-loop point, when that makes more requests.
        ramp_s: before each open-loop point, and before saturation.
        arrivals: of the open-loop points; of ``gamma`` its ``burstiness``.
        failed_share: a point with more failed requests than this share, over all rounds, is the last.
        rounds: in which each point is measured.
        failed: requests that failed in earlier rounds, by the point's name.
        seed: of the schedules: equal for two servers that are compared.
        slos: for goodput.
    """

    rates: int = 5
    concurrency: int = 64
    single_requests: int = 20
    requests: int = 100
    duration_s: float = 0.0
    ramp_s: float = 0.0
    arrivals: Arrivals = "poisson"
    burstiness: float = 1.0
    failed_share: float = 0.05
    rounds: int = 1
    failed: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    slos: tuple[Slo, ...] = ()

    def __post_init__(self) -> None:
        least = {"rates": self.rates, "concurrency": self.concurrency, "requests": self.requests}
        for name, value in (least | {"requests of the first point": self.single_requests}).items():
            if value < 1:
                raise BenchError(f"a sweep with {value} {name}: must be at least 1")
        if not 0 <= self.failed_share < 1:
            raise BenchError(f"a sweep that tolerates {self.failed_share:g} failed requests: must be a share below 1")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The open-loop rates as shares of the saturated rate, ascending, evenly spaced up to `TOP`."""
        return tuple(TOP * step / self.rates for step in range(1, self.rates + 1))

    def allowed(self, name: str, count: int) -> int:
        """Return how many of a point's ``count`` requests may fail in this round."""
        return max(0, int(self.failed_share * count * self.rounds) - self.failed.get(name, 0))


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the curve.

    Attributes:
        kind: ``single``, ``saturation`` or ``rate``.
        concurrency: requests kept in flight, in a closed loop.
        offered_per_s: requests that were due each second, in an open loop.
        fraction: that as a share of the saturated rate.
        steady: throughput while the load was full, without the last requests' end.
        stopped: why the point ended early, or why no higher rate was tried after it; its figures are then of a server
            that did not keep up.
    """

    kind: Kind
    block: Block
    summary: Summary
    steady: Rates | None
    concurrency: int | None = None
    offered_per_s: float | None = None
    fraction: float | None = None
    stopped: str | None = None

    @property
    def name(self) -> str:
        """What the point is called in tables."""
        return _named(self.kind, self.fraction)


def _named(kind: Kind, fraction: float | None = None) -> str:
    if kind == "single":
        return "one at a time"
    return "saturation" if fraction is None else f"{fraction:.0%} of saturation"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points in the order measured."""

    points: list[Point]


def _ignore(trace: Trace) -> None:
    pass


async def sweep(
    send: Send[T],
    make: Callable[[str, int], Sequence[T]],
    plan: SweepPlan,
    *,
    on_done: Callable[[Trace], None] = _ignore,
) -> Sweep:
    """Measure the curve; it ends early at a point where too many requests fail or the queue keeps growing.

    Args:
        send: (item, due moment) -> trace.
        make: (name of a point, count) -> so many items, other ones for every name.
        on_done: called after each request.

    Raises:
        QvlError: what ``send`` raised.
    """
    points: list[Point] = []

    def add(point: Point) -> Point:
        points.append(point)
        return point

    count = plan.single_requests
    allowed = plan.allowed(_named("single"), count)
    block = await closed_loop(send, make("single", count), 1, failures=allowed, on_done=on_done)
    if add(_point("single", block, plan, concurrency=1)).stopped:
        return Sweep(points)

    count = max(plan.requests, 4 * plan.concurrency)
    block = await closed_loop(
        send,
        make("saturation", count),
        plan.concurrency,
        ramp_s=plan.ramp_s,
        failures=plan.allowed(_named("saturation"), count),
        on_done=on_done,
    )
    saturation = add(_point("saturation", block, plan, concurrency=plan.concurrency))
    most = saturation.steady.requests_per_s if saturation.steady else saturation.summary.requests_per_s
    if saturation.stopped or not most:
        return Sweep(points)

    for step, fraction in enumerate(plan.fractions):
        rate = fraction * most
        moments = schedule(
            rate,
            count=max(plan.requests, round(rate * plan.duration_s)),
            arrivals=plan.arrivals,
            burstiness=plan.burstiness,
            ramp_s=plan.ramp_s,
            seed=plan.seed + step,
        )
        block = await open_loop(
            send,
            make(f"rate/{step}", len(moments)),
            moments,
            in_flight=2 * plan.concurrency,
            waiting=2 * plan.concurrency,
            failures=plan.allowed(_named("rate", fraction), len(moments)),
            on_done=on_done,
        )
        if add(_point("rate", block, plan, offered_per_s=rate, fraction=fraction)).stopped:
            break
    return Sweep(points)


def _point(
    kind: Kind,
    block: Block,
    plan: SweepPlan,
    *,
    concurrency: int | None = None,
    offered_per_s: float | None = None,
    fraction: float | None = None,
) -> Point:
    every = [*block.ramp, *block.traces]
    last = max((trace.scheduled for trace in block.traces), default=block.begun)
    stopped = block.stopped
    if kind == "rate" and not stopped:
        left = sum(trace.ended > last for trace in every)
        if left > plan.concurrency:
            stopped = (
                f"queueing exploded: {left} requests were unfinished when the last was due, more than the "
                f"{plan.concurrency} that saturated the server"
            )
    return Point(
        kind,
        block,
        summarise(block.traces, block.wall_s, slos=plan.slos, loop_lag=block.loop_lag, unsent=block.unsent),
        steady(every, block.begun, last),
        concurrency,
        offered_per_s,
        fraction,
        stopped,
    )
