"""When requests are sent. A request carries the moment at which it was due, and its latency counts from there.

In a closed loop a request is due when its worker is free; in an open loop it will be due when the schedule says so.
Either way `Send` takes the due moment, so a client or server that falls behind can't hide it (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from bench.client import Clock, Trace

__all__ = ["Block", "Send", "closed_loop"]

#: (body, due moment) -> what became of it. Raises nothing: failures are in the trace.
Send = Callable[[bytes, float], Awaitable[Trace]]


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
    send: Send,
    bodies: Sequence[bytes],
    concurrency: int,
    *,
    on_done: Callable[[Trace], None] = lambda trace: None,
    clock: Clock = time.perf_counter,
) -> Block:
    """Keep ``concurrency`` requests in flight until all bodies are sent; each worker sends its next when its last has
    ended.

    After a failure nothing more is sent: the block is void, and requests in flight are awaited to see what they say.
    """
    waiting = iter(bodies)
    traces: list[Trace] = []
    void = False
    begun = clock()

    async def work() -> None:
        nonlocal void
        due = begun
        for body in waiting:
            trace = await send(body, due)
            due = trace.ended
            traces.append(trace)
            on_done(trace)
            if trace.failure:
                void = True
            if void:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(work())
    return Block(tuple(traces), max((trace.ended for trace in traces), default=begun) - begun)
