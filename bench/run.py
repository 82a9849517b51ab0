"""Measures two systems against each other: the same questions, the same load, in turns, so that a machine that warms up
or gets busy does so for both."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import httpx

from bench.client import ChatRequest, Failure, Trace, ask
from bench.endpoint import Endpoint, http_client
from bench.inputs import ImageSize, SpeedInputs
from bench.load import Block, closed_loop
from bench.report.model import Role
from bench.tasks import Question
from toolkit.errors import BenchError

__all__ = ["Measurements", "Plan", "System", "measure", "merge"]

#: Called with the name of the phase, the requests done in it and their total.
Progress = Callable[[str, int, int], None]


#: Questions a turn, for each that is in flight: few enough to take turns often, enough to keep all in flight.
TURN = 4
#: Requests of a block for each that is in flight, at least.
WAVES = 3


def _silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class System:
    """One of the two that are measured."""

    role: Role
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        concurrencies: requests kept in flight, one speed point each; empty skips speed.
        requests: measured requests a point and system, over all rounds; more at high concurrency.
        rounds: each point is measured so often, the two systems taking turns in alternating order.
        output_tokens: exact length of each answer in speed runs, >= 2 (one token has no TPOT).
        image_sizes: pictures of speed runs.
        answer_tokens: longest answer to a question.
        question_concurrency: questions in flight.
        timeout_s: seconds a request may take.
        nonce: makes this run's speed inputs new to a server that outlives it.
    """

    concurrencies: tuple[int, ...] = (1, 4, 16)
    requests: int = 96
    rounds: int = 3
    output_tokens: int = 128
    image_sizes: tuple[ImageSize, ...] = ((448, 448),)
    answer_tokens: int = 64
    question_concurrency: int = 4
    timeout_s: float = 120.0
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        positive = {
            "--requests": self.requests,
            "--rounds": self.rounds,
            "--answer-tokens": self.answer_tokens,
            "--question-concurrency": self.question_concurrency,
            "--timeout": self.timeout_s,
        }
        for name, value in positive.items():
            if value <= 0:
                raise BenchError(f"{name} {value}: must be at least 1")
        if self.output_tokens < 2:
            raise BenchError(
                f"--output-tokens {self.output_tokens}: must be at least 2, one token has no time per output token"
            )
        if any(concurrency < 1 for concurrency in self.concurrencies):
            raise BenchError("--concurrency: each must be at least 1")

    def block_requests(self, concurrency: int) -> int:
        """Requests of one block: one system, one concurrency, one round.

        At least `WAVES` times as many as are in flight: a single wave would be a burst, not a load.
        """
        return max(-(-self.requests // self.rounds), WAVES * concurrency)


@dataclass(slots=True)
class Measurements:
    """Raw results. ``blocks`` and ``answers`` are only worth reading when ``failures`` is empty."""

    blocks: dict[tuple[Role, int], list[Block]] = field(default_factory=dict)
    answers: dict[Role, dict[str, Trace]] = field(default_factory=dict)
    failures: Counter[tuple[Role, str, Failure]] = field(default_factory=Counter)

    def fail(self, role: Role, phase: str, traces: Sequence[Trace]) -> None:
        """Record the failures among ``traces``."""
        for trace in traces:
            if trace.failure:
                self.failures[role, phase, trace.failure] += 1


def merge(parts: Sequence[Measurements]) -> Measurements:
    """Join what was measured of each system alone."""
    whole = Measurements()
    for part in parts:
        whole.blocks |= part.blocks
        whole.answers |= part.answers
        whole.failures += part.failures
    return whole


async def measure(
    systems: Sequence[System],
    questions: Sequence[Question],
    plan: Plan,
    *,
    progress: Progress = _silent,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Measurements:
    """Ask the questions, warm up, run the load; the systems take turns, a handful of questions or a block of load each.

    Ends early, with ``failures`` filled, as soon as a phase has a failed request.

    Args:
        systems: both, or one of them when they can't run side by side (see `merge`).
        questions: may be empty.
    """
    found = Measurements()
    connections = max([plan.question_concurrency, *plan.concurrencies])
    clients: dict[Role, httpx.AsyncClient] = {}
    try:
        for system in systems:
            end = system.endpoint
            clients[system.role] = http_client(
                end.url, end.api_key, timeout_s=plan.timeout_s, connections=connections, transport=transport
            )
        if questions:
            await _answer(systems, clients, questions, plan, found, progress)
        if plan.concurrencies and not found.failures:
            await _warm_up(systems, clients, plan, found, progress)
        if plan.concurrencies and not found.failures:
            await _load(systems, clients, plan, found, progress)
    finally:
        for client in clients.values():
            await client.aclose()
    return found


async def _answer(
    systems: Sequence[System],
    clients: dict[Role, httpx.AsyncClient],
    questions: Sequence[Question],
    plan: Plan,
    found: Measurements,
    progress: Progress,
) -> None:
    """Ask all questions, a handful to one system, then the same to the other: two that compute at once on one machine
    would slow each other down many times over (their threads wait for one another's cores)."""
    total = len(questions) * len(systems)
    done = 0

    def tick(trace: Trace) -> None:
        nonlocal done
        done += 1
        progress("questions", done, total)

    turn = TURN * plan.question_concurrency
    for start in range(0, len(questions), turn):
        asked = questions[start : start + turn]
        for system in systems if start // turn % 2 == 0 else reversed(systems):
            answers = found.answers.setdefault(system.role, {})
            send = partial(_ask, clients[system.role], system.endpoint.model, plan, answers)
            block = await closed_loop(send, asked, plan.question_concurrency, on_done=tick)
            found.fail(system.role, "questions", block.traces)
            if found.failures:
                return


async def _ask(
    client: httpx.AsyncClient, model: str, plan: Plan, answers: dict[str, Trace], question: Question, due: float
) -> Trace:
    """Ask one question and keep the answer under the question's id."""
    pictures = tuple(picture.data_url() for picture in question.pictures)
    body = ChatRequest(question.question, pictures, plan.answer_tokens).body(model)
    answers[question.id] = trace = await ask(client, body, timeout_s=plan.timeout_s, scheduled=due)
    return trace


def _inputs(system: System, systems: Sequence[System], plan: Plan) -> SpeedInputs:
    """Both systems get the same inputs, unless both are one server, whose caches would know them the second time."""
    shared = len({other.endpoint.url for other in systems}) < len(systems)
    nonce = f"{plan.nonce}/{system.role}" if shared else plan.nonce
    return SpeedInputs(nonce, plan.image_sizes, plan.output_tokens)


async def _block(
    system: System,
    client: httpx.AsyncClient,
    bodies: Sequence[bytes],
    concurrency: int,
    plan: Plan,
    tick: Callable[[], None],
) -> Block:
    async def send(body: bytes, due: float) -> Trace:
        trace = await ask(client, body, timeout_s=plan.timeout_s, scheduled=due)
        if trace.failure is None and not trace.chunks:
            empty = Failure("empty", "the answer has no text although a fixed length was asked for: nothing to time")
            return Trace(trace.scheduled, trace.started, trace.ended, failure=empty)
        return trace

    return await closed_loop(send, bodies, concurrency, on_done=lambda trace: tick())


async def _warm_up(
    systems: Sequence[System],
    clients: dict[Role, httpx.AsyncClient],
    plan: Plan,
    found: Measurements,
    progress: Progress,
) -> None:
    """Send every image size at the lowest and the highest concurrency, with inputs that are not measured later."""
    most = max(plan.concurrencies)
    # Twice through the sizes one by one, then one full wave.
    stages = [(1, 2 * len(plan.image_sizes)), (most, max(most, len(plan.image_sizes)))]
    total = sum(count for _, count in stages) * len(systems)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("warm-up", done, total)

    for system in systems:
        for concurrency, count in stages:
            bodies = _inputs(system, systems, plan).bodies(f"warm-up/{concurrency}", count, system.endpoint.model)
            block = await _block(system, clients[system.role], bodies, concurrency, plan, tick)
            found.fail(system.role, "warm-up", block.traces)
            if found.failures:
                return


async def _load(
    systems: Sequence[System],
    clients: dict[Role, httpx.AsyncClient],
    plan: Plan,
    found: Measurements,
    progress: Progress,
) -> None:
    total = plan.rounds * len(systems) * sum(map(plan.block_requests, plan.concurrencies))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("load", done, total)

    for round_ in range(plan.rounds):
        for step, concurrency in enumerate(plan.concurrencies):
            for system in systems if (round_ + step) % 2 == 0 else reversed(systems):
                bodies = _inputs(system, systems, plan).bodies(
                    f"load/{round_}/{concurrency}", plan.block_requests(concurrency), system.endpoint.model
                )
                block = await _block(system, clients[system.role], bodies, concurrency, plan, tick)
                found.blocks.setdefault((system.role, concurrency), []).append(block)
                found.fail(system.role, f"load at concurrency {concurrency}", block.traces)
                if found.failures:
                    return
