from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from bench.load.client import Failure, Trace, ask
from bench.load.endpoint import http_client
from bench.load.inputs import SpeedInputs
from bench.load.objectives import parse_slos
from bench.load.sweep import Sweep, SweepPlan, sweep
from tests.support.fake_server import Behaviour, serving
from tests.support.virtual_time import virtual
from toolkit.errors import BenchError


class Server:
    """``slots`` requests at a time, ``service_s`` each: it saturates at slots / service_s requests a second."""

    def __init__(self, service_s: float = 0.02, slots: int = 4) -> None:
        self.service_s, self.slots = service_s, slots
        self.made: list[tuple[str, int]] = []
        self.count = 0
        self.free: asyncio.Semaphore | None = None
        self.slow_from: float = 1e9  # requests so many and later take ten times as long
        self.fails_from: float = 1e9

    def make(self, name: str, count: int) -> list[str]:
        self.made.append((name, count))
        return [f"{name}/{i}" for i in range(count)]

    async def send(self, item: str, due: float) -> Trace:
        started = time.perf_counter()
        self.count += 1
        number = self.count
        self.free = self.free or asyncio.Semaphore(self.slots)
        async with self.free:
            await asyncio.sleep(self.service_s * (10 if number >= self.slow_from else 1))
        end = time.perf_counter()
        failure = Failure("http", "no", 500) if number >= self.fails_from else None
        return Trace(due, started, end, (started + 0.5 * (end - started), end), "", 3, 2, failure=failure)


def run(server: Server, plan: SweepPlan, **options: Any) -> Sweep:
    return virtual(sweep(server.send, server.make, plan, **options))


def saturated(found: Sweep) -> float:
    """Requests a second at saturation."""
    point = found.points[1]
    return (point.steady or point.summary).requests_per_s


PLAN = SweepPlan(rates=3, concurrency=8, single_requests=5, requests=40, slos=parse_slos("e2e=10s"))


def test_the_curve_goes_from_one_at_a_time_over_saturation_through_the_rates_between() -> None:
    server = Server()
    found = run(server, PLAN)
    assert [point.kind for point in found.points] == ["single", "saturation", "rate", "rate", "rate"]
    assert saturated(found) == pytest.approx(4 / 0.02, rel=0.2)
    assert [point.fraction for point in found.points[2:]] == pytest.approx([0.95 / 3, 1.9 / 3, 0.95])
    for point in found.points:
        assert point.stopped is None
        assert point.summary.goodput is not None
        assert point.summary.goodput.share == 1.0
        if point.offered_per_s is not None:
            assert point.summary.requests_per_s == pytest.approx(point.offered_per_s, rel=0.5)
    # Latency is least when one is asked at a time, and saturation's queue doubles it: 8 in flight, 4 slots.
    single, saturation, *rates = (point.summary.e2e for point in found.points)
    assert single and saturation and rates[0]
    assert single.p50 == pytest.approx(0.02, rel=0.3)
    assert saturation.p50 == pytest.approx(0.04, rel=0.3)
    assert single.p50 * 0.9 < rates[0].p50 < saturation.p50
    assert [point.name for point in found.points[1:3]] == ["saturation", "32% of saturation"]


def test_inputs_are_made_for_each_point_before_it() -> None:
    server = Server()
    # Concurrency far above the slots: a busy machine must not look like a queue that explodes.
    run(server, SweepPlan(rates=3, concurrency=32, single_requests=3, requests=20))
    names = [name for name, _ in server.made]
    assert names == ["single", "saturation", "rate/0", "rate/1", "rate/2"]
    assert sum(count for _, count in server.made) == server.count


def test_a_server_that_fails_ends_the_sweep_and_says_so() -> None:
    server = Server(service_s=0.01)
    server.fails_from = 60  # in the first of the rates
    found = run(server, PLAN)
    assert [point.kind for point in found.points] == ["single", "saturation", "rate"]
    last = found.points[-1]
    assert "requests failed" in (last.stopped or "")
    assert last.summary.errors.keys() == {"http 500"}
    assert last.summary.unsent > 0
    assert last.fraction == pytest.approx(0.95 / 3)


@pytest.mark.parametrize(("fails_from", "kinds"), [(1, ["single"]), (6, ["single", "saturation"])])
def test_without_saturation_there_are_no_rates(fails_from: int, kinds: list[str]) -> None:
    server = Server(service_s=0.002)
    server.fails_from = fails_from
    found = run(server, PLAN)
    assert [point.kind for point in found.points] == kinds


def test_a_queue_that_explodes_ends_the_sweep_and_says_so() -> None:
    server = Server()
    server.slow_from = 5 + 40 + 1  # from the first rate on: as if saturation had been measured on another server
    found = run(server, PLAN)
    assert [point.kind for point in found.points] == ["single", "saturation", "rate"]
    assert "queueing exploded" in (found.points[-1].stopped or "")


def test_rates_are_shares_of_saturation() -> None:
    fractions = SweepPlan(rates=5).fractions
    assert fractions == pytest.approx((0.19, 0.38, 0.57, 0.76, 0.95))
    assert all(a < b < 1 for a, b in itertools.pairwise(fractions))


def test_failures_are_counted_over_all_rounds_of_a_point() -> None:
    plan = SweepPlan(requests=40, rounds=8, failed={"saturation": 10})
    assert plan.allowed("saturation", 40) == 6 and plan.allowed("one at a time", 40) == 16
    assert SweepPlan(rounds=1).allowed("saturation", 40) == 2


@pytest.mark.parametrize("options", [{"rates": 0}, {"concurrency": 0}, {"single_requests": 0}, {"failed_share": 1.0}])
def test_sweeps_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BenchError, match="a sweep"):
        SweepPlan(**options)


def test_over_http_with_a_server_that_has_few_slots() -> None:
    inputs = SpeedInputs("n", ((28, 28), None), 4)
    plan = SweepPlan(rates=2, concurrency=8, single_requests=4, requests=24)
    with serving(Behaviour(slots=4, first_s=0.01, gap_s=0.01, queue_time=True)) as server:

        async def main() -> Sweep:
            async with http_client(server.url, connections=16) as http:

                async def send(body: bytes, due: float) -> Trace:
                    return await ask(http, body, timeout_s=10, scheduled=due)

                return await sweep(send, lambda name, count: inputs.bodies(name, count, "fake"), plan)

        found = asyncio.run(main())
        texts = [body["messages"][0]["content"][-1]["text"] for body in server.bodies]
    assert len(texts) == len(set(texts))
    saturation = found.points[1]
    assert saturation.summary.completed == 32
    assert saturation.summary.server_queueing is not None
    assert saturation.summary.server_queueing.n == 32
    assert saturation.steady is not None
    assert saturation.steady.output_tokens_per_s == pytest.approx(4 * saturation.steady.requests_per_s, rel=0.01)
