"""Measures candidates, one server after the other, each at the same loads; resumes after a kill.

A candidate is booted, warmed up and loaded in a closed loop, with inputs that are new to it. What is measured is
written down load by load, so a run that is killed, or whose time is up, goes on where it was. A candidate that does not
boot, or whose requests fail, is recorded with its reason and not tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.load.client import ChatRequest, Trace, ask
from bench.load.endpoint import Endpoint, discover, http_client
from bench.load.inputs import SpeedInputs
from bench.load.loops import Block, closed_loop
from bench.load.metrics import summarise
from bench.load.workload import ImageSize
from bench.questions.tasks import load_questions
from bench.run.boot import Abort, Start, booted
from toolkit.errors import BenchError, QvlError

__all__ = ["FP16", "Journal", "Measure", "Trial", "TunePlan", "table_rows", "tune"]

#: Name of the 16-bit model among the trials.
FP16 = "fp16"
_SCHEMA = 1
#: Requests of a load for each that is in flight, at least.
_WAVES = 3


@dataclass(frozen=True, slots=True)
class TunePlan:
    """How much is measured.

    Attributes:
        concurrencies: requests in flight, a load each.
        requests: measured requests a load, at least three times as many as are in flight.
        output_tokens: exact length of each answer.
        image_sizes: pictures of the requests, in turn.
        questions: file of questions that are asked instead; answers then end by themselves, or at ``output_tokens``.
        timeout_s: seconds a request may take.
    """

    concurrencies: tuple[int, ...] = (1, 8, 32, 128)
    requests: int = 64
    output_tokens: int = 128
    image_sizes: tuple[ImageSize, ...] = ((448, 448),)
    questions: str | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise BenchError("--concurrency: tuning needs loads, such as 1,8,32.")
        if self.requests < 1 or self.output_tokens < 2:
            raise BenchError(
                "give --requests of at least 1 and --output-tokens of at least 2: one has no time a token."
            )

    def requests_at(self, concurrency: int) -> int:
        """Return the measured requests of a load; fewer than three waves would be a burst."""
        return max(self.requests, _WAVES * concurrency)


@dataclass(slots=True)
class Trial:
    """What became of a candidate.

    Attributes:
        settings: what it was booted with, as JSON.
        figures: by load: output tokens/s, p50 of TTFT and TPOT in ms, requests.
        failed: why it could not be measured, or not further.
    """

    name: str
    settings: dict[str, Any]
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: str | None = None

    def missing(self, plan: TunePlan) -> list[int]:
        """Return the loads that are still to be measured."""
        return [] if self.failed else [load for load in plan.concurrencies if load not in self.figures]


class Journal:
    """The trials of one tuning, in a file that is rewritten after each step.

    Args:
        path: the file; its directory is made.
        about: what is tuned and how: a file about something else is begun anew.
        fresh: begin anew in any case.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.about = path, about
        self.trials: dict[str, Trial] = {}
        if fresh:
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] == _SCHEMA and found["about"] == json.loads(json.dumps(about)):
                for each in found["trials"]:
                    figures = {int(load): values for load, values in each["figures"].items()}
                    self.trials[each["name"]] = Trial(each["name"], each["settings"], figures, each["failed"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.trials = {}  # none yet, or a file that is no journal

    @classmethod
    def name(cls, about: dict[str, Any]) -> str:
        """Return a file name that stands for what is tuned and how."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return f"{digest[:16]}.json"

    def trial(self, name: str, settings: dict[str, Any]) -> Trial:
        """Return the trial of a candidate, begun anew when its settings are not what they were."""
        known = self.trials.get(name)
        if known is None or known.settings != settings:
            known = self.trials[name] = Trial(name, settings)
        return known

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"schema": _SCHEMA, "about": self.about, "trials": [asdict(t) for t in self.trials.values()]}
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


#: (endpoint, plan, requests in flight) -> the figures of that load.
Measure = Callable[[Endpoint, TunePlan, int], dict[str, float]]


def measure_load(end: Endpoint, plan: TunePlan, concurrency: int) -> dict[str, float]:
    """Warm the server up, load it, and return the figures. Raises BenchError when a request fails."""
    return asyncio.run(_measure(end, plan, concurrency))


#: (what for, count, model) -> that many bodies of requests.
Bodies = Callable[[str, int, str], list[bytes]]


def _made(plan: TunePlan) -> Bodies:
    """Requests that no server has seen before."""
    return SpeedInputs(secrets.token_hex(8), plan.image_sizes, plan.output_tokens).bodies


def _asked(plan: TunePlan, concurrency: int) -> Bodies:
    """The questions in turn, from another place for every load and use, the same for all candidates."""
    questions = load_questions(Path(plan.questions or ""))

    def bodies(name: str, count: int, model: str) -> list[bytes]:
        start = int.from_bytes(hashlib.sha256(f"{name}/{concurrency}".encode()).digest()[:4], "big")
        chosen = [questions[(start + index) % len(questions)] for index in range(count)]
        pictures = [tuple(picture.data_url() for picture in each.pictures) for each in chosen]
        return [
            ChatRequest(each.question, shown, plan.output_tokens).body(model)
            for each, shown in zip(chosen, pictures, strict=True)
        ]

    return bodies


async def _measure(end: Endpoint, plan: TunePlan, concurrency: int) -> dict[str, float]:
    bodies = _asked(plan, concurrency) if plan.questions else _made(plan)
    async with http_client(end.url, end.api_key, timeout_s=plan.timeout_s, connections=concurrency) as http:

        async def send(body: bytes, due: float) -> Trace:
            return await ask(http, body, timeout_s=plan.timeout_s, scheduled=due)

        async def block(name: str, count: int, in_flight: int) -> Block:
            found = await closed_loop(send, bodies(name, count, end.model), in_flight)
            if found.failed:
                failure = found.failed[0].failure
                said = failure.message if failure else ""
                raise BenchError(f"requests failed at {concurrency} in flight ({name}): {said}")
            return found

        await block("alone", 2 * len(plan.image_sizes), 1)
        await block("warm-up", max(concurrency, len(plan.image_sizes)), concurrency)
        measured = await block("load", plan.requests_at(concurrency), concurrency)
    found = summarise(measured.traces, measured.wall_s, loop_lag=measured.loop_lag)
    if found.output_tokens_per_s is None or found.ttft is None or found.tpot is None:
        raise BenchError("the server does not count its tokens: nothing to compare by")
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
    plan: TunePlan,
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
    total = len(trials) * len(plan.concurrencies)
    journal.save()

    def done() -> int:
        return total - sum(len(trial.missing(plan)) for trial in trials)

    for trial in trials:
        if not trial.missing(plan):
            continue
        if time.monotonic() >= end:
            return False
        progress(trial.name, "starting", done(), total)
        try:
            with booted({"candidate": boot(trial.name)}, at_once=False) as servers:
                server = servers["candidate"]
                endpoint = asyncio.run(discover(server.url, server.api_key))
                for load in trial.missing(plan):
                    if time.monotonic() >= end:
                        return False
                    progress(trial.name, f"{load} in flight", done(), total)
                    trial.figures[load] = measure(endpoint, plan, load)
                    journal.save()
        except QvlError as error:
            trial.failed = str(error)
            journal.save()
        progress(trial.name, "failed" if trial.failed else "measured", done(), total)
    return True


def table_rows(trials: Sequence[Trial], loads: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Return each trial's cells: output tokens/s at each load, the best of a load marked; then why it failed."""
    best = {
        load: max(
            (t.figures[load]["output_tokens_per_s"] for t in trials if load in t.figures and t.name != FP16), default=0
        )
        for load in loads
    }
    rows = []
    for trial in trials:
        cells = []
        for load in loads:
            figures = trial.figures.get(load)
            if figures is None:
                cells.append("")
                continue
            speed = figures["output_tokens_per_s"]
            mark = "*" if trial.name != FP16 and speed == best[load] else ""
            cells.append(f"{speed:,.4g}{mark}")
        rows.append((trial.name, [*cells, (trial.failed or "").splitlines()[0] if trial.failed else ""]))
    return rows
