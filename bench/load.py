"""When requests are sent. A request carries the moment at which it was due, and its latency counts from there.

In a closed loop a request is due when its worker is free; in an open loop it will be due when the schedule says so.
Either way `Send` takes the due moment, so a client or server that falls behind can't hide it (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.client import Clock, Trace
from toolkit.errors import QvlError

__all__ = ["Block", "Send", "closed_loop"]

#: What is sent: an encoded body, or something a body is made of.
T = TypeVar("T")
#: (item, due moment) -> what became of it. A failed request is a trace, not an exception.
Send = Callable[[T, float], Awaitable[Trace]]


@dataclass(frozen=True, slots=True)
class Block:
    """The requests of one stretch of load on one server.

    Attributes:
        traces: in the order in which the requests ended.
        wall_s: seconds from the block's start to its last end.
    """

    traces: tuple[Trace, ...]
    wall_s: float

    @property
    def failed(self) -> list[Trace]:
        """The requests that failed."""
        return [trace for trace in self.traces if trace.failure]


async def closed_loop(
    send: Send[T],
    items: Sequence[T],
    concurrency: int,
    *,
    on_done: Callable[[Trace], None] = lambda trace: None,
    clock: Clock = time.perf_counter,
) -> Block:
    """Keep ``concurrency`` requests in flight until all items are sent; each worker sends its next when its last has
    ended.

    After a failure nothing more is sent: the block is void, and requests in flight are awaited to see what they say.

    Raises:
        QvlError: what ``send`` raised, of several the first.
    """
    waiting = iter(items)
    traces: list[Trace] = []
    void = False
    begun = clock()

    async def work() -> None:
        nonlocal void
        due = begun
        for item in waiting:
            trace = await send(item, due)
            due = trace.ended
            traces.append(trace)
            on_done(trace)
            if trace.failure:
                void = True
            if void:
                return

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(work())
    except* QvlError as errors:
        raise errors.exceptions[0] from None
    return Block(tuple(traces), max((trace.ended for trace in traces), default=begun) - begun)
