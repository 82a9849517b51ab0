from __future__ import annotations

import asyncio
import itertools
import time

from bench.client import Failure, Trace
from bench.load import Block, closed_loop


class Server:
    """Answers each request after ``service_s`` and notes how many were in flight."""

    def __init__(self, service_s: float = 0.02, fails_at: int | None = None) -> None:
        self.service_s, self.fails_at = service_s, fails_at
        self.seen: list[bytes] = []
        self.now = self.most = 0

    async def send(self, body: bytes, due: float) -> Trace:
        started = time.perf_counter()
        self.seen.append(body)
        failed = self.fails_at is not None and len(self.seen) > self.fails_at
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.service_s)
        self.now -= 1
        end = time.perf_counter()
        return Trace(due, started, end, (end,), failure=Failure("http", "no") if failed else None)


def run(server: Server, count: int, concurrency: int) -> Block:
    return asyncio.run(closed_loop(server.send, [b"%d" % i for i in range(count)], concurrency))


def test_everything_is_sent_once_with_so_many_in_flight() -> None:
    server = Server()
    block = run(server, 12, 3)
    assert sorted(server.seen) == sorted(b"%d" % i for i in range(12))
    assert server.most == 3
    assert len(block.traces) == 12
    assert 4 * 0.02 - 0.005 <= block.wall_s < 12 * 0.02  # 12 requests, 3 at a time, 20 ms each


def test_fewer_requests_than_workers() -> None:
    assert len(run(Server(), 2, 8).traces) == 2


def test_the_next_request_is_due_when_the_last_has_ended() -> None:
    traces = run(Server(), 4, 1).traces
    for earlier, later in itertools.pairwise(traces):
        assert later.scheduled == earlier.ended


def test_a_client_that_falls_behind_is_seen_in_the_latency() -> None:
    async def blocked(body: bytes, due: float) -> Trace:
        await asyncio.sleep(0)
        time.sleep(0.05)  # the client itself is slow
        started = time.perf_counter()
        return Trace(due, started, started, (started,))

    block = asyncio.run(closed_loop(blocked, [b"a", b"b"], 2))
    # Both were due at once; the second waited for the first one's 50 ms and shows it.
    assert max(trace.started - trace.scheduled for trace in block.traces) >= 0.1


def test_nothing_more_is_sent_after_a_failure() -> None:
    server = Server(fails_at=3)
    block = run(server, 50, 2)
    assert len(server.seen) <= 6
    assert block.failed
    assert len(block.traces) == len(server.seen)  # those in flight were awaited
