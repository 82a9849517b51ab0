"""The phases that ask questions: for accuracy, and for fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import httpx

from bench.load.client import ChatRequest, Trace, ask_again
from bench.load.loops import closed_loop
from bench.questions.observe import Item, Observing, observe
from bench.questions.tasks import Question
from bench.run.measured import Observer
from bench.run.running import Running
from bench.run.systems import System

__all__ = ["ask_questions", "observe_items"]

#: Questions a turn, for each that is in flight: few enough to take turns often, enough to keep all in flight.
TURN = 4


async def ask_questions(run: Running, questions: Sequence[Question]) -> None:
    """Ask all questions that have no answer yet, a handful to one system, then the same to the other: two that
    compute at once on one machine would slow each other down many times over (their threads wait for one another's
    cores)."""
    missing = {
        system.role: {q.id for q in questions} - run.found.answers.setdefault(system.role, {}).keys()
        for system in run.systems
    }
    run.live.begin("questions", sum(map(len, missing.values())))
    in_flight = run.config.question_concurrency
    size = TURN * in_flight
    for turn, start in enumerate(range(0, len(questions), size)):
        for system in run.turns(turn):
            asked = [q for q in questions[start : start + size] if q.id in missing[system.role]]
            if not asked:
                continue
            run.live.doing(system.role)
            block = await closed_loop(partial(_ask, run, system), asked, in_flight, on_done=run.live.tick)
            run.found.fail(system.role, "questions", block.traces)
            if run.found.failures:
                return


async def _ask(run: Running, system: System, question: Question, due: float) -> Trace:
    """Ask one question and keep the answer under the question's id."""
    images = tuple(image.data_url() for image in question.images)
    body = ChatRequest(question.question, images, run.config.answer_tokens).body(system.endpoint.model)
    trace = await ask_again(run.clients[system.role], body, timeout_s=run.config.timeout_s, scheduled=due)
    if not trace.failure:
        run.found.answers[system.role][question.id] = trace
        run.keep.answer(system.role, question.id, trace)
    return trace


async def observe_items(run: Running, items: Sequence[Item], transport: httpx.AsyncBaseTransport | None) -> None:
    """Have each system answer the items and read the baseline's answers, the baseline a second time too."""
    config, observed = run.config, run.found.observed
    passes: list[tuple[System, Observer]] = []
    for system in sorted(run.systems, key=lambda system: system.role):  # the baseline's answers come first
        observers: tuple[Observer, ...] = ("baseline", "again") if system.role == "baseline" else ("candidate",)
        passes += [(system, who) for who in observers if who not in observed]
    how = Observing(
        top_k=config.top_k,
        max_tokens=config.fidelity_tokens,
        concurrency=config.question_concurrency,
        timeout_s=config.timeout_s,
    )
    run.live.begin("fidelity", len(passes) * len(items))
    for system, who in passes:
        run.live.doing(who if who != "again" else "baseline, asked again")
        observed[who] = await observe(
            system.endpoint,
            items,
            how,
            reference=None if who == "baseline" else observed["baseline"],
            on_done=run.live.tick,
            transport=transport,
        )
        run.keep.observed(who, observed[who])
