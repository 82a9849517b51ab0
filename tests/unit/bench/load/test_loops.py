from __future__ import annotations

import asyncio
import gc
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest

from bench.load import metrics
from bench.load.client import Failure, Trace
from bench.load.loops import Block, Schedule, closed_loop, open_loop, replay, schedule, sleep_until
from tests.support.virtual_time import virtual
from toolkit.errors import BenchError, ServerError


class Server:
    """Answers each request after ``service_s``, at most ``slots`` at a time, and notes how many were in flight."""

    def __init__(self, service_s: float = 0.02, fails_at: int | None = None, slots: int = 10_000) -> None:
        self.service_s, self.fails_at = service_s, fails_at
        self.slots = asyncio.Semaphore(slots)
        self.seen: list[bytes] = []
        self.now = self.most = 0

    async def send(self, body: bytes, due: float) -> Trace:
        started = time.perf_counter()
        self.seen.append(body)
        failed = self.fails_at is not None and len(self.seen) > self.fails_at
        self.now += 1
        self.most = max(self.most, self.now)
        async with self.slots:
            await asyncio.sleep(self.service_s)
        self.now -= 1
        end = time.perf_counter()
        return Trace(due, started, end, (end,), failure=Failure("http", "no", 500) if failed else None)


def bodies(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count)]


def run(server: Server, count: int, concurrency: int, **options: Any) -> Block:
    return virtual(closed_loop(server.send, bodies(count), concurrency, **options))


def run_open(server: Server, plan: Schedule, **options: Any) -> Block:
    return virtual(open_loop(server.send, bodies(len(plan)), plan, **options))


# --- closed loop ------------------------------------------------------------------------------------------------------


def test_everything_is_sent_once_with_so_many_in_flight() -> None:
    server = Server()
    block = run(server, 12, 3)
    assert sorted(server.seen) == sorted(b"%d" % i for i in range(12))
    assert server.most == 3
    assert len(block.traces) == 12
    assert 4 * 0.02 - 0.005 <= block.wall_s < 12 * 0.02  # 12 requests, 3 at a time, 20 ms each
    assert (block.stopped, block.unsent, block.ramp) == (None, 0, ())


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

    block = virtual(closed_loop(blocked, [b"a", b"b"], 2))
    # Both were due at once; the second waited for the first one's 50 ms and shows it.
    assert max(trace.started - trace.scheduled for trace in block.traces) >= 0.1


def test_nothing_more_is_sent_after_a_failure() -> None:
    server = Server(fails_at=3)
    block = run(server, 50, 2)
    assert len(server.seen) <= 6
    assert block.failed
    assert len(block.traces) == len(server.seen)  # those in flight were awaited
    assert block.unsent == 50 - len(server.seen)
    assert "requests failed" in (block.stopped or "")


def test_some_failures_can_be_borne() -> None:
    server = Server(service_s=0.001, fails_at=45)
    block = run(server, 50, 2, failures=5)
    assert (len(block.traces), len(block.failed), block.stopped) == (50, 5, None)


def test_a_duration_ends_the_sending_not_the_requests() -> None:
    server = Server()
    block = run(server, 1000, 2, duration_s=0.15)
    assert len(block.traces) in (14, 16)  # two at a time for 0.15 s, 20 ms each
    assert all(trace.scheduled < block.begun + 0.15 for trace in block.traces)
    assert (block.stopped, block.unsent) == (None, 0)


def test_a_duration_goes_on_until_enough_were_sent() -> None:
    """128 in flight for a few seconds were one request each: a burst, and its end."""
    block = run(Server(service_s=0.2), 1000, 4, duration_s=0.15, at_least=12)
    assert len(block.traces) == 12 and (block.stopped, block.unsent) == (None, 0)
    assert len(run(Server(service_s=0.2), 1000, 4, duration_s=1.9, at_least=12).traces) == 40
    ramped = run(Server(service_s=0.02), 1000, 4, duration_s=0.01, ramp_s=0.1, at_least=12)
    assert ramped.ramp and len(ramped.traces) >= 12


def test_too_few_requests_for_a_duration_are_said_so() -> None:
    assert "all 4 requests" in (run(Server(), 4, 2, duration_s=5).stopped or "")


def test_workers_start_one_after_the_other_on_a_ramp_that_is_not_measured() -> None:
    server = Server()
    block = run(server, 60, 4, ramp_s=0.2)
    begun = block.begun - 0.2
    assert len(block.ramp) + len(block.traces) == 60
    assert all(trace.scheduled < block.begun for trace in block.ramp)
    assert all(trace.scheduled >= block.begun for trace in block.traces)
    assert sum(trace.started < begun + 0.05 for trace in block.ramp) <= 4  # one worker alone
    assert server.most == 4
    assert block.wall_s == pytest.approx(max(t.ended for t in block.traces) - block.begun)


def test_a_ramp_that_leaves_nothing_says_so() -> None:
    assert "during the ramp" in (run(Server(service_s=0.001), 3, 2, ramp_s=0.2).stopped or "")


def test_an_error_of_the_sender_is_raised_as_it_is() -> None:
    async def broken(body: bytes, due: float) -> Trace:
        raise ServerError("gone")

    with pytest.raises(ServerError, match="gone"):
        virtual(closed_loop(broken, bodies(4), 2))
    with pytest.raises(ServerError, match="gone"):
        virtual(open_loop(broken, bodies(4), schedule(1000, count=4)))
    assert gc.get_freeze_count() == 0


# --- schedules --------------------------------------------------------------------------------------------------------


def test_a_constant_rate_is_evenly_spaced() -> None:
    assert schedule(10, count=4, arrivals="constant").due == pytest.approx((0.0, 0.1, 0.2, 0.3))
    assert len(schedule(10, duration_s=2.0, arrivals="constant")) == 20


def test_poisson_gaps_are_exponential_and_repeatable() -> None:
    plan = schedule(50, count=20_000, seed=3)
    gaps = np.diff(plan.due)
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.05)  # exponential: as large as the mean
    assert np.mean(gaps > 0.02) == pytest.approx(math.exp(-1), abs=0.02)
    assert plan == schedule(50, count=20_000, seed=3)
    assert plan != schedule(50, count=20_000, seed=4)


def test_a_duration_bounds_a_poisson_schedule() -> None:
    counts = [len(schedule(100, duration_s=10, seed=seed)) for seed in range(20)]
    assert np.mean(counts) == pytest.approx(1000, rel=0.03)
    assert len(set(counts)) > 5  # a Poisson process has no fixed count
    assert max(schedule(100, duration_s=10).due) < 10


@pytest.mark.parametrize("arrivals", ["poisson", "constant"])
def test_the_rate_grows_linearly_on_the_ramp(arrivals: Any) -> None:
    plan = schedule(200, count=2000, ramp_s=10, seed=1, arrivals=arrivals)
    due = np.asarray(plan.due)
    assert (np.diff(due) >= 0).all()
    # r t^2 / (2 ramp): a quarter of the ramp's 1000 in its first half; then the full rate.
    assert np.sum(due < 5) == pytest.approx(250, rel=0.2)
    assert np.sum(due < 10) == pytest.approx(1000, rel=0.1)
    assert np.sum(due >= 10) == 2000
    assert due[-1] == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(
    ("rate", "options"),
    [
        (0, {"count": 1}),
        (-1, {"count": 1}),
        (math.nan, {"count": 1}),
        (math.inf, {"count": 1}),
        (1, {}),
        (1, {"count": 1, "duration_s": 1.0}),
        (1, {"count": 0}),
        (1, {"duration_s": 0.0}),
        (1, {"count": 1, "ramp_s": -1.0}),
    ],
)
def test_schedules_that_make_no_sense_are_refused(rate: float, options: dict[str, Any]) -> None:
    with pytest.raises(BenchError):
        schedule(rate, **options)


# --- open loop --------------------------------------------------------------------------------------------------------


def test_requests_are_sent_when_they_are_due_whatever_the_server_does() -> None:
    server = Server(service_s=0.3)
    plan = schedule(100, count=20, arrivals="constant")
    block = run_open(server, plan)
    assert server.most == 20  # none waited for another
    assert len(block.traces) == 20
    due = sorted(trace.scheduled - block.begun for trace in block.traces)
    assert due == pytest.approx(list(plan.due))
    assert np.median([metrics.client_lag(trace) for trace in block.traces]) < 0.02
    assert block.held == 0


def test_a_server_that_pauses_is_seen_by_every_request_that_was_due_meanwhile() -> None:
    """Coordinated omission: a loop that waited for the pause would see one slow request."""
    pause = 0.3

    async def send(body: bytes, due: float) -> Trace:
        started = time.perf_counter()
        await sleep_until(max(started, stalled_until))
        end = time.perf_counter()
        return Trace(due, started, end, (end,))

    stalled_until = pause
    block = virtual(open_loop(send, bodies(30), schedule(100, count=30, arrivals="constant"), in_flight=1))
    latencies = sorted(metrics.e2e(trace) for trace in block.traces)
    assert latencies[15] == pytest.approx(pause / 2, abs=0.02)


def test_beyond_the_cap_requests_are_held_with_their_clocks_running() -> None:
    server = Server(service_s=0.05)
    block = run_open(server, schedule(200, count=12, arrivals="constant"), in_flight=2)
    assert server.most == 2
    assert len(block.traces) == 12
    assert block.held >= 8
    for trace in block.traces:
        assert trace.started - trace.scheduled >= trace.held_s
        assert metrics.client_lag(trace) < 0.04  # what was held is not the client's lag
    # 12 requests, two at a time, 50 ms each: the last, due after 55 ms, ended after 300.
    assert max(map(metrics.e2e, block.traces)) > 0.2


def test_a_queue_that_explodes_stops_the_loop() -> None:
    server = Server(service_s=0.2)
    block = run_open(server, schedule(500, count=100, arrivals="constant"), in_flight=2, waiting=5)
    assert "queueing exploded: 2 requests in flight and 6 more due" in (block.stopped or "")
    assert len(block.traces) == 2
    assert block.unsent == 98


def test_failures_stop_an_open_loop_too() -> None:
    server = Server(service_s=0.001, fails_at=10)
    block = run_open(server, schedule(500, count=100, arrivals="constant"), failures=3)
    assert "http" in (block.stopped or "")
    assert 4 <= len(block.failed) <= 8
    assert block.unsent == 100 - len(block.traces)
    everything = run_open(Server(service_s=0.001, fails_at=10), schedule(500, count=30), failures=30)
    assert (len(everything.traces), len(everything.failed), everything.stopped) == (30, 20, None)


def test_an_open_loops_ramp_is_not_measured() -> None:
    plan = schedule(200, count=20, ramp_s=0.2, arrivals="constant")
    block = run_open(Server(service_s=0.005), plan)
    assert (len(block.ramp), len(block.traces)) == (20, 20)
    assert all(trace.scheduled < block.begun for trace in block.ramp)


def test_each_moment_needs_its_request() -> None:
    with pytest.raises(BenchError, match="3 requests for a schedule of 4"):
        virtual(open_loop(Server().send, bodies(3), schedule(1, count=4)))


def test_a_busy_event_loop_is_recorded() -> None:
    async def send(body: bytes, due: float) -> Trace:
        started = time.perf_counter()
        await asyncio.sleep(0.1)
        for _ in range(8):
            time.sleep(0.05)  # what a client does that encodes images while it measures
            await asyncio.sleep(0)
        end = time.perf_counter()
        return Trace(due, started, end, (started + 0.01,))

    block = virtual(closed_loop(send, bodies(2), 2))
    assert max(block.loop_lag) > 0.02
    assert "late" in (metrics.client_fault(block.traces, block.loop_lag) or "")
    quiet = run(Server(service_s=0.15), 4, 1)
    assert len(quiet.loop_lag) >= 4
    assert np.percentile(quiet.loop_lag, 20) < 0.005


def test_sleeping_is_more_exact_than_asyncios_timers() -> None:
    async def late() -> float:
        lates = []
        for _ in range(40):
            moment = time.perf_counter() + 0.0033
            await sleep_until(moment)
            lates.append(time.perf_counter() - moment)
        assert min(lates) >= 0
        return max(lates)

    # Timers that count milliseconds would be 0.7 ms late every time.
    assert virtual(late()) < 0.0001


# --- chats, bursts, replays -------------------------------------------------------------------------------------------


def test_a_later_turn_is_sent_when_the_one_before_it_was_answered() -> None:
    """Chats of three turns, two at a time: a worker keeps to its chat."""
    server = Server(service_s=0.1)
    block = virtual(
        closed_loop(server.send, bodies(12), 2, follows=lambda body: int(body) % 3 > 0)  # 0 begins, 1 and 2 follow
    )
    ends = {int(body): index for index, body in enumerate(server.seen)}
    by_body = dict(zip([int(body) for body in server.seen], sorted(block.traces, key=lambda t: t.started), strict=True))
    assert server.most == 2 and sorted(ends) == list(range(12))
    for turn in range(12):
        if turn % 3:
            assert by_body[turn].scheduled >= by_body[turn - 1].ended - 1e-3
    assert block.full_until == pytest.approx(0.6, abs=0.01)


def test_a_worker_without_a_chat_ends_what_is_steady() -> None:
    server = Server(service_s=0.1)
    # Three chats of 1, 1 and 4 turns: from 0.1 s on one request is in flight.
    block = virtual(closed_loop(server.send, bodies(6), 2, follows=lambda body: int(body) > 2))
    assert block.full_until == pytest.approx(0.1, abs=0.01)
    assert max(trace.scheduled for trace in block.traces) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_spread_that_were_asked_for(burstiness: float) -> None:
    plan = schedule(50, count=20_000, arrivals="gamma", burstiness=burstiness, seed=3)
    gaps = np.diff(plan.due)
    assert len(plan) == 20_000
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    # vllm bench serve: shape = burstiness, so the variance of the gaps is 1 / burstiness of the squared mean.
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    assert plan == schedule(50, count=20_000, arrivals="gamma", burstiness=burstiness, seed=3)


def test_bursts_last_as_long_as_they_were_asked_to() -> None:
    for seed in range(20):
        plan = schedule(20, duration_s=30, arrivals="gamma", burstiness=0.1, seed=seed)
        assert plan.due[-1] < 30 and len(plan) > 300
    with pytest.raises(BenchError, match="burstiness of 0"):
        schedule(20, count=3, arrivals="gamma", burstiness=0.0)


def test_a_replay_sends_requests_at_their_own_times() -> None:
    server = Server(service_s=1.0)
    due = (0.0, 0.5, 0.5, 2.0, 7.25)
    plan = replay(due)
    block = run_open(server, plan)
    assert sorted(trace.scheduled - block.begun for trace in block.traces) == pytest.approx(due)
    for trace in block.traces:
        assert trace.started - trace.scheduled < 0.002
    assert plan.rate == pytest.approx(4 / 7.25) and server.most == 3
    with pytest.raises(BenchError, match="in order"):
        replay((1.0, 0.5))
    with pytest.raises(BenchError, match="at least one"):
        replay(())
