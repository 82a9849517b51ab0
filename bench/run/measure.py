"""Measures two systems against each other: the same questions, the same load, in turns, so that a machine that warms up
or gets busy does so for both.

Load is a number of requests kept in flight, a rate at which they are due, or a sweep from one at a time to saturation.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import httpx
import psutil

from bench.load import metrics
from bench.load.client import ChatRequest, Failure, Trace, ask
from bench.load.endpoint import http_client
from bench.load.inputs import SpeedInputs
from bench.load.loops import Block, Send, closed_loop, open_loop, schedule
from bench.load.sweep import Point, SweepPlan, sweep
from bench.machine import energy, server_metrics
from bench.machine.server_metrics import ServerPoint
from bench.questions.observe import Item, Observed, observe
from bench.questions.tasks import Question
from bench.roles import Role
from bench.run.config import Plan
from bench.run.measured import SWEEP, Keep, Load, Measurements, Observer, Stretch
from bench.run.systems import System
from toolkit.errors import BenchError

__all__ = ["Progress", "measure"]

#: Called with the name of the phase, the requests done in it, their total, and what is going on just now.
Progress = Callable[[str, int, int, str], None]
#: Questions a turn, for each that is in flight: few enough to take turns often, enough to keep all in flight.
TURN = 4
#: Under a duration, so many times the requests are made that the fastest pace seen before asks for.
SPARE = 3.0
#: Most requests in flight under a rate, and most that wait beyond that before the server counts as too slow for it.
IN_FLIGHT = 1024
#: When a larger share of a block's requests fails, it ends.
FAILED_SHARE = 0.05
#: Seconds over which live rates are taken.
LIVE_S = 5.0


def _silent(phase: str, done: int, total: int, now: str) -> None:
    pass


class _Nowhere:
    """Keeps nothing."""

    def answer(self, role: Role, question: str, trace: Trace) -> None:
        """Do nothing."""

    def unit(self, role: Role, unit: str, round_: int, stretches: Sequence[tuple[Load, Stretch]]) -> None:
        """Do nothing."""

    def observed(self, who: Observer, observed: Observed) -> None:
        """Do nothing."""


async def measure(
    systems: Sequence[System],
    questions: Sequence[Question],
    plan: Plan,
    *,
    items: Sequence[Item] = (),
    found: Measurements | None = None,
    keep: Keep | None = None,
    progress: Progress = _silent,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Measurements:
    """Ask the questions, have the baseline's answers read, warm up, run the load; the systems take turns, a handful of
    questions or a block of load each.

    Ends early, with ``failures`` filled, when a question fails, or more than `FAILED_SHARE` of a closed loop's requests
    do, or all of an open loop's.

    Args:
        systems: both, or one of them when they can't run side by side; the baseline then comes first.
        questions: may be empty.
        items: of fidelity; may be empty.
        found: what was measured before, of this plan; it is added to and returned.
        keep: told of everything that is added.
    """
    run = _Run(systems, plan, Measurements() if found is None else found, keep or _Nowhere(), progress)
    try:
        for system in systems:
            end = system.endpoint
            run.clients[system.role] = http_client(
                end.url, end.api_key, timeout_s=plan.timeout_s, connections=run.connections, transport=transport
            )
        await run.ask(questions)
        if items and not run.found.failures:
            await run.observe(items, transport)
        if not run.found.failures:
            await run.speed()
        for system in systems:
            seen = await server_metrics.read(run.clients[system.role])
            if seen and seen.kv_tokens:
                run.found.kv_cache_tokens[system.role] = seen.kv_tokens
    finally:
        for client in run.clients.values():
            await client.aclose()
    return run.found


class _Run:
    """What the phases of a measurement share."""

    def __init__(
        self, systems: Sequence[System], plan: Plan, found: Measurements, keep: Keep, progress: Progress
    ) -> None:
        self.systems, self.plan, self.found, self.keep, self._progress = systems, plan, found, keep, progress
        self.clients: dict[Role, httpx.AsyncClient] = {}
        self._phase, self._done, self._total, self._now = "", 0, 0, ""
        self._ended: deque[tuple[float, int]] = deque()
        #: Seconds that the fastest request took of a system at a concurrency.
        self._pace: dict[tuple[Role, int], float] = {}
        #: The rate that was too much for a system.
        self._ceiling: dict[Role, float] = {}
        self._meters: dict[Role, energy.Meter | None] = {}

    @property
    def connections(self) -> int:
        """Most requests in flight at once."""
        plan = self.plan
        open_loops = IN_FLIGHT if plan.rates else 0
        return max([plan.question_concurrency, *plan.concurrencies, open_loops, 2 * plan.sweep_concurrency])

    # --- progress ---

    def _begin(self, phase: str, total: int) -> None:
        self._phase, self._done, self._total = phase, 0, total
        self._ended.clear()

    def _doing(self, now: str) -> None:
        """Say what goes on from now on."""
        self._now = now

    def _tick(self, trace: Trace | None = None) -> None:
        """Count a request that has ended, and show the rates of the last seconds."""
        self._done += 1
        self._total = max(self._total, self._done)
        now, text = time.perf_counter(), self._now
        self._ended.append((now, trace.completion_tokens or 0 if trace else 0))
        while now - self._ended[0][0] > LIVE_S:
            self._ended.popleft()
        seconds = now - self._ended[0][0]
        if seconds >= LIVE_S / 5:  # less is chance
            ended = list(self._ended)[1:]  # the first marks where the window begins
            tokens = sum(count for _, count in ended) / seconds
            text += f", {len(ended) / seconds:.1f} requests/s" + (f", {tokens:.0f} tokens/s" if tokens else "")
        self._progress(self._phase, self._done, self._total, text)

    # --- questions ---

    async def ask(self, questions: Sequence[Question]) -> None:
        """Ask all questions that have no answer yet, a handful to one system, then the same to the other: two that
        compute at once on one machine would slow each other down many times over (their threads wait for one another's
        cores)."""
        missing = {
            system.role: {q.id for q in questions} - self.found.answers.setdefault(system.role, {}).keys()
            for system in self.systems
        }
        self._begin("questions", sum(map(len, missing.values())))
        size = TURN * self.plan.question_concurrency
        for turn, start in enumerate(range(0, len(questions), size)):
            for system in self._turns(turn):
                asked = [q for q in questions[start : start + size] if q.id in missing[system.role]]
                if not asked:
                    continue
                self._doing(system.role)
                send = partial(self._ask, system)
                block = await closed_loop(send, asked, self.plan.question_concurrency, on_done=self._tick)
                self.found.fail(system.role, "questions", block.traces)
                if self.found.failures:
                    return

    async def _ask(self, system: System, question: Question, due: float) -> Trace:
        """Ask one question and keep the answer under the question's id."""
        pictures = tuple(picture.data_url() for picture in question.pictures)
        body = ChatRequest(question.question, pictures, self.plan.answer_tokens).body(system.endpoint.model)
        trace = await ask(self.clients[system.role], body, timeout_s=self.plan.timeout_s, scheduled=due)
        if not trace.failure:
            self.found.answers[system.role][question.id] = trace
            self.keep.answer(system.role, question.id, trace)
        return trace

    # --- fidelity ---

    async def observe(self, items: Sequence[Item], transport: httpx.AsyncBaseTransport | None) -> None:
        """Have each system answer the items and read the baseline's answers, the baseline a second time too."""
        plan = self.plan
        passes: list[tuple[System, Observer]] = []
        for system in sorted(self.systems, key=lambda system: system.role):  # the baseline's answers come first
            observers: tuple[Observer, ...] = ("baseline", "again") if system.role == "baseline" else ("candidate",)
            passes += [(system, who) for who in observers if who not in self.found.observed]
        self._begin("fidelity", len(passes) * len(items))
        for system, who in passes:
            self._doing(who if who != "again" else "baseline, asked again")
            self.found.observed[who] = await observe(
                system.endpoint,
                items,
                reference=None if who == "baseline" else self.found.observed["baseline"],
                top_k=plan.top_k,
                max_tokens=plan.fidelity_tokens,
                concurrency=plan.question_concurrency,
                timeout_s=plan.timeout_s,
                on_done=self._tick,
                transport=transport,
            )
            self.keep.observed(who, self.found.observed[who])

    # --- speed ---

    def _inputs(self, system: System) -> SpeedInputs:
        """Both systems get the same inputs, unless both are one server, whose caches would know them the second
        time."""
        shared = len({other.endpoint.url for other in self.systems}) < len(self.systems)
        return self.plan.inputs(f"{self.plan.nonce}/{system.role}" if shared else self.plan.nonce)

    def _bodies(self, system: System, block: str, count: int) -> list[bytes]:
        return self._inputs(system).bodies(block, count, system.endpoint.model)

    def _turns(self, step: int) -> Sequence[System]:
        return self.systems if step % 2 == 0 else self.systems[::-1]

    def _sender(self, system: System) -> Send[bytes]:
        client = self.clients[system.role]

        async def send(body: bytes, due: float) -> Trace:
            trace = await ask(client, body, timeout_s=self.plan.timeout_s, scheduled=due)
            if trace.failure is None and not trace.chunks:
                empty = Failure(
                    "empty", "the answer has no text although a fixed length was asked for: nothing to time"
                )
                return Trace(trace.scheduled, trace.started, trace.ended, failure=empty)
            return trace

        return send

    async def speed(self) -> None:
        """Measure every unit that is missing, a round at a time, after a warm-up."""
        plan = self.plan
        missing = [
            (round_, step, unit, system)
            for round_ in range(plan.rounds)
            for step, unit in enumerate(plan.units)
            for system in self._turns(round_ + step)
            if (system.role, unit, round_) not in self.found.units
        ]
        if not missing:
            return
        await self._warm_up({unit for _, _, unit, _ in missing})
        if self.found.failures:
            return
        loads = {load.name: load for load in plan.loads}
        self._begin("load", sum(self._expected(system.role, loads.get(unit)) for _, _, unit, system in missing))
        for round_, _, unit, system in missing:
            self._doing(f"{system.role}, {unit}, round {round_ + 1} of {plan.rounds}")
            load = loads.get(unit)
            if load is None:
                stretches = await self._sweep(system, round_)
            elif load.concurrency is not None:
                stretches = [(load, await self._closed(system, load, round_))]
            elif load.rate_per_s is not None and load.rate_per_s < self._ceiling.get(system.role, math.inf):
                stretches = [(load, await self._open(system, load, round_))]
            else:
                stretches = []  # a lower rate was too much already
            if self.found.failures:
                return
            self.found.units[system.role, unit, round_] = stretches
            self.keep.unit(system.role, unit, round_, stretches)

    async def _warm_up(self, units: set[str]) -> None:
        """Show each server every shape of request, twice one by one, then a wave at each concurrency that is measured;
        no input of these is measured later."""
        plan = self.plan
        shapes = len(self._inputs(self.systems[0]).warm_up(""))
        waves = {c for c in plan.concurrencies if Load.in_flight(c).name in units}
        waves |= {plan.sweep_concurrency} if SWEEP in units else set()
        self._begin("warm-up", (2 * shapes + sum(max(wave, shapes) for wave in waves if wave > 1)) * len(self.systems))
        for system in self.systems:
            self._doing(system.role)
            inputs, model = self._inputs(system), system.endpoint.model
            for turn in range(2):
                await self._wave(system, 1, inputs.warm_up(model, f"warm-up/{turn}"))
                if self.found.failures:
                    return
            # As many as the highest rate will have in flight, by Little's law.
            busy = math.ceil(max(plan.rates, default=0.0) * self._pace[system.role, 1])
            for wave in sorted({*waves, min(busy, IN_FLIGHT)} - {0, 1}):
                bodies = inputs.warm_up(model, f"warm-up/wave/{wave}")
                bodies += inputs.bodies(f"warm-up/{wave}", max(0, wave - len(bodies)), model)
                await self._wave(system, wave, bodies)
                if self.found.failures:
                    return

    async def _wave(self, system: System, concurrency: int, bodies: Sequence[bytes]) -> None:
        block = await closed_loop(self._sender(system), bodies, concurrency, on_done=self._tick)
        self.found.fail(system.role, "warm-up", block.traces)
        # The second time one by one, nothing is compiled any more.
        if not self.found.failures:
            self._pace[system.role, concurrency] = min(map(metrics.e2e, block.traces))

    def _expected(self, role: Role, load: Load | None) -> int:
        """How many requests a load makes, about; None stands for a sweep."""
        plan = self.plan
        if load is None:
            return plan.round_requests * (1 + plan.sweep) + max(plan.round_requests, 4 * plan.sweep_concurrency)
        if load.concurrency is None:
            rate = load.rate_per_s or 0.0
            count = plan.round_requests if plan.duration_s is None else rate * plan.duration_s
            return math.ceil(count + rate * plan.ramp_s / 2)
        pace = self._pace[role, load.concurrency]
        on_ramp = math.ceil(load.concurrency * plan.ramp_s / 2 / pace)
        if plan.duration_s is None:
            return on_ramp + plan.block_requests(load.concurrency)
        return on_ramp + math.ceil(load.concurrency * plan.duration_s / pace)

    async def _watched(self, system: System, load: Awaitable[Block], offered_per_s: float | None = None) -> Stretch:
        """Run a load between two looks at the server's counters and the GPUs'."""
        client, meter = self.clients[system.role], self._meter(system)
        before, began = await server_metrics.read(client), meter.joules() if meter else None
        block = await load
        ended = meter.joules() if meter else None
        return Stretch(
            block,
            offered_per_s,
            ServerPoint.between(before, await server_metrics.read(client)),
            ended - began if began is not None and ended is not None and ended >= began else None,
        )

    def _meter(self, system: System) -> energy.Meter | None:
        """Of the GPUs of a server that runs here; of others nothing is known."""
        if system.role not in self._meters:
            self._meters[system.role] = energy.open_meter(_tree(system.pid)) if system.pid else None
        return self._meters[system.role]

    async def _closed(self, system: System, load: Load, round_: int) -> Stretch:
        plan, role, concurrency = self.plan, system.role, load.concurrency or 1
        count = self._expected(role, load)
        allowed = int(FAILED_SHARE * count)
        if plan.duration_s is not None:
            count = math.ceil(SPARE * count) + concurrency
        stretch = await self._watched(
            system,
            closed_loop(
                self._sender(system),
                self._bodies(system, f"load/{round_}/{concurrency}", count),
                concurrency,
                duration_s=plan.duration_s,
                ramp_s=plan.ramp_s,
                failures=allowed,
                on_done=self._tick,
            ),
        )
        block = stretch.block
        if len(block.failed) > allowed or not any(trace.failure is None for trace in block.traces):
            self.found.fail(role, f"load, {load.name}", block.failed)
            if not self.found.failures:
                raise BenchError(
                    f"load, {load.name}: every request began on the ramp of {plan.ramp_s:g} s and none was left to "
                    "measure; shorten --ramp, or raise --duration or --requests"
                )
        else:
            seen = min(metrics.e2e(trace) for trace in block.traces if not trace.failure)
            self._pace[role, concurrency] = min(seen, self._pace[role, concurrency])
        return stretch

    async def _open(self, system: System, load: Load, round_: int) -> Stretch:
        plan, role, rate = self.plan, system.role, load.rate_per_s or 0.0
        moments = schedule(
            rate,
            count=plan.round_requests if plan.duration_s is None else None,
            duration_s=plan.duration_s,
            arrivals=plan.arrivals,
            ramp_s=plan.ramp_s,
            seed=round_,  # equal for both systems
        )
        if len(moments) == 0:
            raise BenchError(
                f"--rate {rate:g} for --duration {plan.duration_s:g}: no request is due in that time; raise one of them"
            )
        stretch = await self._watched(
            system,
            open_loop(
                self._sender(system),
                self._bodies(system, f"load/{round_}/rate/{rate:g}", len(moments)),
                moments,
                in_flight=IN_FLIGHT,
                waiting=IN_FLIGHT,
                failures=int(FAILED_SHARE * len(moments)),
                on_done=self._tick,
            ),
            rate,
        )
        self._fail_without_answers(role, f"load, {load.name}", stretch.block)
        if stretch.block.stopped:
            self._ceiling[role] = rate
        return stretch

    async def _sweep(self, system: System, round_: int) -> list[tuple[Load, Stretch]]:
        plan = self.plan
        result = await sweep(
            self._sender(system),
            lambda name, count: self._bodies(system, f"sweep/{round_}/{name}", count),
            SweepPlan(
                rates=plan.sweep,
                concurrency=plan.sweep_concurrency,
                single_requests=plan.round_requests,
                requests=plan.round_requests,
                duration_s=plan.duration_s or 0.0,
                ramp_s=plan.ramp_s,
                arrivals=plan.arrivals,
                failed_share=FAILED_SHARE,
                seed=1000 * round_,
                slos=plan.slos,
            ),
            on_done=self._tick,
        )
        for point in result.points:
            self._fail_without_answers(system.role, f"sweep, {point.name}", point.block)
        return [(_load(point, plan), _stretch(point)) for point in result.points]

    def _fail_without_answers(self, role: Role, phase: str, block: Block) -> None:
        if not any(trace.failure is None for trace in block.traces):
            self.found.fail(role, phase, [*block.ramp, *block.traces])


def _load(point: Point, plan: Plan) -> Load:
    """What a point of a sweep is called; rates are told as shares, which are the same in every round."""
    return Load(
        kind=point.kind,
        name=f"sweep: {point.name}",
        concurrency=point.concurrency,
        arrivals=None if point.fraction is None else plan.arrivals,
        share=point.fraction,
    )


def _stretch(point: Point) -> Stretch:
    block = point.block if point.block.stopped else replace(point.block, stopped=point.stopped)
    return Stretch(block, point.offered_per_s)


def _tree(pid: int) -> set[int]:
    """The ids of a process and its descendants."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return {pid}
