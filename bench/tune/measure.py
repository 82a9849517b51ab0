"""Measures candidates, one server after the other, each at the same loads; resumes after a kill.

A candidate is booted, warmed up and loaded in a closed loop, with inputs that are new to it. What is measured is
written down load by load, so a run that is killed, or whose time is up, goes on where it was. A candidate that does not
boot, or whose requests fail, is recorded with its reason and not tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.load.client import ChatRequest, Trace, ask
from bench.load.endpoint import Endpoint, discover, http_client
from bench.load.inputs import SpeedInputs
from bench.load.loops import Block, closed_loop
from bench.load.metrics import summarise
from bench.questions.tasks import load_questions
from bench.run.boot import Abort, Start, booted
from bench.tune.config import TuneConfig
from bench.tune.journal import Journal
from toolkit.errors import BenchError, QvlError

__all__ = ["Measure", "measure_load", "tune"]

#: (endpoint, config, requests in flight) -> the figures of that load.
Measure = Callable[[Endpoint, TuneConfig, int], dict[str, float]]


def measure_load(end: Endpoint, config: TuneConfig, concurrency: int) -> dict[str, float]:
    """Warm the server up, load it, and return the figures. Raises BenchError when a request fails."""
    return asyncio.run(_measure(end, config, concurrency))


#: (what for, count, model) -> that many bodies of requests.
Bodies = Callable[[str, int, str], list[bytes]]


def _made(config: TuneConfig) -> Bodies:
    """Requests that no server has seen before."""
    return SpeedInputs(secrets.token_hex(8), config.image_sizes, config.output_tokens).bodies


def _asked(config: TuneConfig, concurrency: int) -> Bodies:
    """The questions in turn, from another place for every load and use, the same for all candidates."""
    questions = load_questions(config.questions or Path())

    def bodies(name: str, count: int, model: str) -> list[bytes]:
        start = int.from_bytes(hashlib.sha256(f"{name}/{concurrency}".encode()).digest()[:4], "big")
        chosen = [questions[(start + index) % len(questions)] for index in range(count)]
        images = [tuple(image.data_url() for image in each.images) for each in chosen]
        return [
            ChatRequest(each.question, shown, config.output_tokens).body(model)
            for each, shown in zip(chosen, images, strict=True)
        ]

    return bodies


async def _measure(end: Endpoint, config: TuneConfig, concurrency: int) -> dict[str, float]:
    bodies = _asked(config, concurrency) if config.questions else _made(config)
    async with http_client(end.url, end.api_key, timeout_s=config.timeout_s, connections=concurrency) as http:

        async def send(body: bytes, due: float) -> Trace:
            return await ask(http, body, timeout_s=config.timeout_s, scheduled=due)

        async def block(name: str, count: int, in_flight: int) -> Block:
            found = await closed_loop(send, bodies(name, count, end.model), in_flight)
            if found.failed:
                failure = found.failed[0].failure
                said = failure.message if failure else ""
                raise BenchError(f"requests failed at {concurrency} in flight ({name}): {said}")
            return found

        await block("alone", 2 * len(config.image_sizes), 1)
        await block("warm-up", max(concurrency, len(config.image_sizes)), concurrency)
        measured = await block("load", config.requests_at(concurrency), concurrency)
    found = summarise(measured.traces, measured.wall_s, loop_lag=measured.loop_lag)
    if found.output_tokens_per_s is None or found.ttft is None or found.tpot is None:
        raise BenchError("the server does not report how many tokens it wrote, so there is no speed to compare")
    return {
        "output_tokens_per_s": found.output_tokens_per_s,
        "tpot_ms": 1000 * found.tpot.p50,
        "ttft_ms": 1000 * found.ttft.p50,
        "requests": float(found.completed),
    }


def _ignore(name: str, step: str, done: int, total: int) -> None:
    pass


def tune(
    candidates: Mapping[str, dict[str, Any]],
    config: TuneConfig,
    boot: Callable[[str], tuple[Start, Abort]],
    journal: Journal,
    *,
    seconds: float,
    progress: Callable[[str, str, int, int], None] = _ignore,
    measure: Measure = measure_load,
) -> bool:
    """Measure what is missing and return whether that is all, now.

    Args:
        candidates: settings by name, in the order in which they are tried.
        boot: name -> how to start its server, and how to end it while it boots.
        seconds: none is begun after so long, and no load of one that has been.
        progress: called with (candidate, what it is doing, steps done, steps in all).
    """
    end = time.monotonic() + seconds
    trials = [journal.trial(name, settings) for name, settings in candidates.items()]
    total = len(trials) * len(config.concurrencies)
    journal.save()

    def done() -> int:
        return total - sum(len(trial.missing(config)) for trial in trials)

    for trial in trials:
        if not trial.missing(config):
            continue
        if time.monotonic() >= end:
            return False
        progress(trial.name, "starting", done(), total)
        try:
            with booted({"candidate": boot(trial.name)}, at_once=False) as servers:
                server = servers["candidate"]
                endpoint = asyncio.run(discover(server.url, server.api_key))
                for load in trial.missing(config):
                    if time.monotonic() >= end:
                        return False
                    progress(trial.name, f"{load} in flight", done(), total)
                    trial.figures[load] = measure(endpoint, config, load)
                    journal.save()
        except QvlError as error:
            trial.failed = str(error)
            journal.save()
        progress(trial.name, "failed" if trial.failed else "measured", done(), total)
    return True
