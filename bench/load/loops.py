"""When requests are sent. A request carries the moment at which it was due, and its latency counts from there.

In a closed loop a request is due when its worker is free; in an open loop it is due when the schedule says so, whatever
the server is doing. Either way `Send` takes the due moment, so a client or server that falls behind can't hide it
(coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from bench.load.client import Clock, Trace
from bench.load.workload import Arrivals
from toolkit.errors import BenchError, QvlError

__all__ = ["Block", "Schedule", "Send", "closed_loop", "open_loop", "replay", "schedule", "sleep_until"]

#: What is sent: an encoded body, or something a body is made of.
T = TypeVar("T")
#: (item, due moment) -> what became of it. A failed request is a trace, not an exception.
Send = Callable[[T, float], Awaitable[Trace]]

#: Seconds between two looks at how late the event loop is.
PROBE_S = 0.1
#: Seconds by which a timer of asyncio may be late: epoll counts whole milliseconds.
TIMER_S = 0.001


@dataclass(frozen=True, slots=True)
class Block:
    """The requests of one stretch of load on one server.

    Attributes:
        traces: the measured ones, in the order in which they ended.
        wall_s: seconds from the start of what is measured (the end of the ramp) to its last end.
        begun: that start, on the client's clock.
        ramp: requests that were due during the ramp; no figure is made of them.
        unsent: requests that were due but never sent, because the block was stopped.
        stopped: why the block ended before all of it was sent; None when it did not.
        loop_lag: seconds by which the client's event loop was late, at regular moments.
        full_until: of a closed loop whose requests ran out, when the first worker found none: from then on fewer and
            fewer are in flight.
    """

    traces: tuple[Trace, ...]
    wall_s: float
    begun: float = 0.0
    ramp: tuple[Trace, ...] = ()
    unsent: int = 0
    stopped: str | None = None
    loop_lag: tuple[float, ...] = ()
    full_until: float | None = None

    @property
    def failed(self) -> list[Trace]:
        """The requests that failed, on the ramp too."""
        return [trace for trace in (*self.ramp, *self.traces) if trace.failure]

    @property
    def held(self) -> int:
        """How many requests were due while as many as allowed were in flight: the load was more than was let through,
        and their latencies say so."""
        return sum(trace.held_s > 0 for trace in self.traces)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the requests of an open loop are due.

    Attributes:
        due: seconds from the start, ascending.
        rate: requests a second after the ramp.
        ramp_s: the rate grows linearly from 0 for so long; what is due before counts for no figure.
    """

    due: tuple[float, ...]
    rate: float
    ramp_s: float = 0.0

    def __len__(self) -> int:
        return len(self.due)


def schedule(
    rate: float,
    *,
    count: int | None = None,
    duration_s: float | None = None,
    arrivals: Arrivals = "poisson",
    burstiness: float = 1.0,
    ramp_s: float = 0.0,
    seed: int = 0,
) -> Schedule:
    """Return the due moments of ``count`` requests or of ``duration_s`` seconds, after the ramp's.

    Unit-rate arrivals (Poisson: cumulated exponential gaps; gamma: cumulated gaps of a gamma distribution of mean 1;
    constant: 0, 1, 2, ...) are put through the inverse of the cumulated rate, r t^2 / (2 ramp) on the ramp and
    r (t - ramp / 2) after it. Equal arguments give equal schedules.

    Args:
        burstiness: shape of the gamma distribution, as `vllm bench serve` names it: the squared coefficient of
            variation of the gaps is 1 / burstiness. Below 1 requests come in bursts, at 1 it is Poisson.

    Raises:
        BenchError: no positive rate; not exactly one of count and duration; a negative ramp; no positive burstiness.
    """
    if not (rate > 0 and math.isfinite(rate)):
        raise BenchError(f"a rate of {rate:g} requests/s: must be more than 0")
    if (count is None) == (duration_s is None):
        raise BenchError("an open loop is bounded by a number of requests or by a duration: give one of the two")
    if (count is not None and count < 1) or (duration_s is not None and duration_s <= 0) or ramp_s < 0:
        raise BenchError("an open loop needs at least one request or some time, and a ramp of 0 s or more")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise BenchError(f"a burstiness of {burstiness:g}: must be more than 0")
    on_ramp = rate * ramp_s / 2
    expected = on_ramp + (count if count is not None else rate * (duration_s or 0.0))
    # Ten standard deviations of how many come in that time, which for gamma is as many times sqrt(1 / burstiness).
    draws = math.ceil(expected + 10 * math.sqrt(expected / min(1.0, burstiness)) + 20 / min(1.0, burstiness))
    if arrivals == "poisson":
        units = np.cumsum(np.random.default_rng(seed).exponential(size=draws))
    elif arrivals == "gamma":
        units = np.cumsum(np.random.default_rng(seed).gamma(burstiness, 1.0 / burstiness, size=draws))
    else:
        units = np.arange(draws, dtype=np.float64)
    units = units[units < expected] if count is None else units[: int(np.searchsorted(units, on_ramp)) + count]
    due = np.where(units < on_ramp, np.sqrt(2 * ramp_s * units / rate), ramp_s + (units - on_ramp) / rate)
    return Schedule(tuple(due.tolist()), rate, ramp_s)


def replay(due: Sequence[float]) -> Schedule:
    """Return the schedule of requests that are due at these moments, ascending; its rate is their mean one.

    Raises:
        BenchError: there are none, or they are not in order.
    """
    if not due or list(due) != sorted(due):
        raise BenchError("a replay needs at least one moment, and the moments in order")
    span = due[-1] - due[0]
    return Schedule(tuple(due), (len(due) - 1) / span if span > 0 else float(len(due)))


async def sleep_until(moment: float) -> None:
    """Return at ``moment`` on `time.perf_counter`, later only by as much as other tasks keep the event loop.

    asyncio's own timers are up to a millisecond late, 5% of a TTFT of 20 ms; the last one is spent letting other tasks
    run in turn.
    """
    delay = moment - time.perf_counter() - TIMER_S
    await asyncio.sleep(max(0.0, delay))
    while time.perf_counter() < moment:
        await asyncio.sleep(0)


@contextmanager
def _frozen() -> Iterator[None]:
    """Keep what is in memory already out of garbage collections: one of all bodies would stop the clock's thread."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@asynccontextmanager
async def _watched() -> AsyncIterator[list[float]]:
    """Yield a list that fills with the event loop's lateness in seconds."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + PROBE_S
            await sleep_until(due)
            late.append(time.perf_counter() - due)

    task = asyncio.create_task(watch())
    try:
        yield late
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Tally:
    """What has ended so far, and whether to go on."""

    def __init__(self, measured_from: float, failures: int, on_done: Callable[[Trace], None]) -> None:
        self.measured_from, self.failures, self.on_done = measured_from, failures, on_done
        self.ramp: list[Trace] = []
        self.traces: list[Trace] = []
        self.failed: Counter[str] = Counter()
        self.stopped: str | None = None

    def add(self, trace: Trace) -> None:
        (self.traces if trace.scheduled >= self.measured_from else self.ramp).append(trace)
        if trace.failure:
            self.failed[trace.failure.kind] += 1
            if self.failed.total() > self.failures and not self.stopped:
                kinds = ", ".join(f"{count} {kind}" for kind, count in self.failed.most_common())
                self.stopped = f"requests failed ({kinds})"
        self.on_done(trace)

    def block(self, *, total: int, late: Sequence[float]) -> Block:
        ended = max((trace.ended for trace in self.traces), default=self.measured_from)
        return Block(
            tuple(self.traces),
            ended - self.measured_from,
            begun=self.measured_from,
            ramp=tuple(self.ramp),
            unsent=total - len(self.traces) - len(self.ramp),
            stopped=self.stopped,
            loop_lag=tuple(late),
        )


def _ignore(trace: Trace) -> None:
    pass


def _chains(items: Sequence[T], follows: Callable[[T], bool] | None) -> list[Sequence[T]]:
    """Return the items in groups, each with those that follow its first."""
    if follows is None:
        return [[item] for item in items]
    found: list[list[T]] = []
    for item in items:
        if found and follows(item):
            found[-1].append(item)
        else:
            found.append([item])
    return list(found)


async def closed_loop(
    send: Send[T],
    items: Sequence[T],
    concurrency: int,
    *,
    duration_s: float | None = None,
    at_least: int = 0,
    ramp_s: float = 0.0,
    failures: int = 0,
    follows: Callable[[T], bool] | None = None,
    on_done: Callable[[Trace], None] = _ignore,
    clock: Clock | None = None,
) -> Block:
    """Keep ``concurrency`` requests in flight until all items are sent; each worker sends its next when its last has
    ended.

    After more than ``failures`` failures nothing more is sent, and requests in flight are awaited to see what they say.

    Args:
        items: the ramp's requests come from them too.
        duration_s: send none later than so long after the ramp, but for ``at_least``; items that remain are no loss,
            but when they run out before, the block says so.
        at_least: go on beyond the duration until so many were sent after the ramp.
        ramp_s: the workers start one after the other over so long, and what they send meanwhile is not measured.
        follows: whether an item is a later turn of the chat before it: the same worker sends it, next.
        clock: `time.perf_counter` unless there is no ramp.

    Raises:
        QvlError: what ``send`` raised, of several the first.
    """
    chats = _chains(items, follows)
    waiting = iter(chats)
    workers = min(concurrency, len(chats))
    begun = (clock or time.perf_counter)()
    end = math.inf if duration_s is None else begun + ramp_s + duration_s
    tally = _Tally(begun + ramp_s, failures, on_done)
    ran_out, sent = 0.0, 0

    async def work(start: float) -> None:
        nonlocal ran_out, sent
        if start > begun:
            await sleep_until(start)
        due = start
        turns: Iterator[T] = iter(())
        while not tally.stopped and (due < end or sent < at_least):
            item = next(turns, None)
            if item is None:
                chat = next(waiting, None)
                if chat is None:
                    ran_out = ran_out or due
                    return
                turns = iter(chat)
                item = next(turns)
            sent += due >= tally.measured_from
            trace = await send(item, due)
            due = trace.ended
            tally.add(trace)

    with _frozen():
        async with _watched() as late:
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(workers):
                        group.create_task(work(begun + ramp_s * index / workers))
            except* QvlError as errors:
                raise errors.exceptions[0] from None
    if ran_out and duration_s is not None and not tally.stopped:
        tally.stopped = (
            f"all {len(items)} requests made for it were sent after {ran_out - begun - ramp_s:.1f} of {duration_s:g} s"
        )
    elif not tally.traces and tally.ramp and not tally.stopped:
        tally.stopped = (
            f"all {len(items)} requests were sent during the ramp of {ramp_s:g} s: there is nothing to measure"
        )
    # Under a duration, items that were not needed are not missing.
    total = len(items) if duration_s is None else len(tally.traces) + len(tally.ramp)
    return replace(tally.block(total=total, late=late), full_until=ran_out or None)


async def open_loop(
    send: Send[T],
    items: Sequence[T],
    plan: Schedule,
    *,
    in_flight: int = 1024,
    waiting: int | None = None,
    failures: int = 0,
    on_done: Callable[[Trace], None] = _ignore,
) -> Block:
    """Send each item when the schedule says so, however many are in flight already.

    At most ``in_flight`` are: a client has only so many sockets. A request that is due beyond that is held until
    another ends, its clock running since it was due and its trace saying for how long (``held_s``).

    Args:
        items: one for each moment of the schedule.
        waiting: stop when more than so many are held: the server will not catch up. None never stops for this.
        failures: stop after more failures than this.

    Raises:
        BenchError: fewer items than moments.
        QvlError: what ``send`` raised, of several the first.
    """
    if len(items) < len(plan):
        raise BenchError(f"{len(items)} requests for a schedule of {len(plan)}: make one for each")
    held: deque[tuple[T, float]] = deque()
    free = in_flight

    with _frozen():
        async with _watched() as late:
            begun = time.perf_counter()
            tally = _Tally(begun + plan.ramp_s, failures, on_done)

            async def one(item: T, due: float) -> None:
                """Send a request, then those held meanwhile, each in the place that the last one left."""
                nonlocal free
                held_s = 0.0
                while True:
                    trace = await send(item, due)
                    tally.add(replace(trace, held_s=held_s) if held_s else trace)
                    if tally.stopped or not held:
                        free += 1
                        return
                    item, due = held.popleft()
                    held_s = max(0.0, trace.ended - due)

            async def dispatch() -> None:
                nonlocal free
                for item, offset in zip(items, plan.due, strict=False):
                    await sleep_until(begun + offset)
                    if tally.stopped:
                        return
                    if free:
                        free -= 1
                        group.create_task(one(item, begun + offset))
                        continue
                    held.append((item, begun + offset))
                    if waiting is not None and len(held) > waiting:
                        tally.stopped = (
                            f"queueing exploded: {in_flight} requests in flight and {len(held)} more due after "
                            f"{offset:.1f} s at {plan.rate:.3g} requests/s"
                        )
                        return

            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(dispatch())
            except* QvlError as errors:
                raise errors.exceptions[0] from None
    return tally.block(total=len(plan), late=late)
