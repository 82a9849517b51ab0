"""Measures two systems against each other: the same questions, the same load, in turns, so that a machine that warms up
or gets busy does so for both.

Load is a number of requests kept in flight, a rate at which they are due, or a sweep from one at a time to saturation.
"""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from bench.load.endpoint import http_client
from bench.load.traffic import Traffic
from bench.machine import server_metrics
from bench.questions.observe import Item
from bench.questions.tasks import Question
from bench.roles import Role
from bench.run.answers import ask_questions, observe_items
from bench.run.config import BenchConfig
from bench.run.measured import Keep, Measurements
from bench.run.progress import Live, Progress
from bench.run.running import Nowhere, Running
from bench.run.speed import IN_FLIGHT, measure_speed
from bench.run.systems import System

__all__ = ["measure"]


def _silent(phase: str, done: int, total: int, now: str) -> None:
    pass


async def measure(
    systems: Sequence[System],
    questions: Sequence[Question],
    config: BenchConfig,
    *,
    items: Sequence[Item] = (),
    found: Measurements | None = None,
    keep: Keep | None = None,
    traffic: Traffic | None = None,
    progress: Progress = _silent,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Measurements:
    """Ask the questions, have the baseline's answers read, warm up, run the load; the systems take turns, a handful of
    questions or a block of load each.

    Ends early, with ``failures`` filled, when a question fails, or more than `bench.run.speed.FAILED_SHARE` of a closed
    loop's requests do, or all of an open loop's.

    Args:
        systems: both, or one of them when they can't run side by side; the baseline then comes first.
        questions: may be empty.
        items: of fidelity; may be empty.
        found: what was measured before, of these settings; it is added to and returned.
        keep: told of everything that is added.
        traffic: what the load is made of, instead of requests that are made.
    """
    found = Measurements() if found is None else found
    clients: dict[Role, httpx.AsyncClient] = {}
    run = Running(systems, config, clients, found, keep or Nowhere(), Live(progress), traffic)
    try:
        for system in systems:
            end = system.endpoint
            clients[system.role] = http_client(
                end.url, end.api_key, timeout_s=config.timeout_s, connections=_connections(config), transport=transport
            )
        await ask_questions(run, questions)
        if items and not found.failures:
            await observe_items(run, items, transport)
        if not found.failures:
            await measure_speed(run)
        for system in systems:
            seen = await server_metrics.read(clients[system.role])
            if seen and seen.kv_tokens:
                found.kv_cache_tokens[system.role] = seen.kv_tokens
    finally:
        for client in clients.values():
            await client.aclose()
    return found


def _connections(config: BenchConfig) -> int:
    """Most requests in flight at once."""
    open_loops = IN_FLIGHT if config.rates or config.replays else 0
    return max([config.question_concurrency, *config.concurrencies, open_loops, 2 * config.sweep_concurrency])
