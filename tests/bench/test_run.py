from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import pytest

from bench.endpoint import discover
from bench.report.model import Role
from bench.run import Measurements, Plan, System, measure, merge
from bench.tasks import Question
from tests.bench.fake_server import Behaviour, FakeServer, serving
from toolkit.errors import BenchError

PLAN = Plan(
    concurrencies=(1, 3),
    requests=6,
    rounds=2,
    output_tokens=4,
    image_sizes=((56, 56), None),
    answer_tokens=8,
    question_concurrency=2,
    timeout_s=5.0,
)
QUESTIONS = [Question(f"q{i}", "t", f"What is {i}?", (str(i),)) for i in range(9)]


def echo(body: dict[str, Any]) -> str | None:
    return None if body.get("ignore_eos") else body["messages"][0]["content"][-1]["text"]


def run(
    a: FakeServer, b: FakeServer, plan: Plan = PLAN, questions: list[Question] = QUESTIONS, **more: Any
) -> Measurements:
    async def main() -> Measurements:
        systems = [System("baseline", await discover(a.url)), System("candidate", await discover(b.url))]
        return await measure(systems, questions, plan, **more)

    return asyncio.run(main())


def test_both_systems_answer_every_question_and_carry_every_load() -> None:
    with serving(Behaviour(text=echo)) as a, serving(Behaviour(text=echo)) as b:
        seen: list[tuple[str, int, int]] = []
        found = run(a, b, progress=lambda *step: seen.append(step))
    assert not found.failures
    for role in ("baseline", "candidate"):
        assert {q.id: found.answers[role][q.id].text for q in QUESTIONS} == {q.id: q.question for q in QUESTIONS}
        for concurrency, count in ((1, 3), (3, 9)):
            blocks = found.blocks[role, concurrency]
            assert [len(block.traces) for block in blocks] == [count, count]
            assert all(trace.completion_tokens == 4 for block in blocks for trace in block.traces)
    assert seen[-1] == ("load", 48, 48)
    assert ("questions", 18, 18) in seen
    assert {phase for phase, _, _ in seen} == {"questions", "warm-up", "load"}


def test_questions_end_naturally_and_load_has_a_fixed_length() -> None:
    with serving(Behaviour(text=echo)) as a, serving() as b:
        run(a, b)
    asked, load = a.bodies[: len(QUESTIONS)], a.bodies[len(QUESTIONS) :]
    assert all("ignore_eos" not in body and body["max_tokens"] == 8 for body in asked)
    assert all(body["ignore_eos"] and body["max_tokens"] == 4 for body in load)
    assert all(body["temperature"] == 0 and body["stream_options"]["include_usage"] for body in a.bodies)


def test_load_inputs_are_unique_warmed_in_every_size_and_equal_for_both() -> None:
    with serving() as a, serving() as b:
        run(a, b, questions=[])
    for server in (a, b):
        digests = [hashlib.sha256(body).hexdigest() for body in server.raw_bodies]
        assert len(digests) == len(set(digests))
        warm = server.bodies[: len(server.bodies) - 24]
        assert {len(body["messages"][0]["content"]) for body in warm} == {1, 2}  # with a picture and without
    assert sorted(a.raw_bodies) == sorted(b.raw_bodies)


def test_one_server_under_both_names_gets_unique_inputs_too() -> None:
    with serving() as a:
        run(a, a, questions=[])
    assert len(a.raw_bodies) == len(set(a.raw_bodies))


def test_two_runs_share_no_input() -> None:
    with serving() as a:
        for _ in range(2):
            run(a, a, replace(PLAN, nonce=Plan().nonce), questions=[])
    assert len(a.raw_bodies) == len(set(a.raw_bodies))


def test_load_keeps_so_many_in_flight() -> None:
    with serving(Behaviour(gap_s=0.01)) as a, serving(Behaviour(gap_s=0.01)) as b:
        run(a, b, questions=[])
    assert a.most_in_flight == b.most_in_flight == 3


def test_the_systems_take_turns() -> None:
    order: list[str] = []

    def noted(name: str) -> Behaviour:
        def text(body: dict[str, Any]) -> str:
            order.append(name)
            return "x"

        return Behaviour(text=text)

    with serving(noted("A")) as a, serving(noted("B")) as b:
        run(a, b, replace(PLAN, concurrencies=(), question_concurrency=1))
    assert "".join(order) == "AAAA BBBB BBBB AAAA A B".replace(" ", "")


def test_blocks_take_turns_too() -> None:
    order: list[str] = []

    def noted(name: str) -> Behaviour:
        def text(body: dict[str, Any]) -> None:
            order.append(name)

        return Behaviour(text=text)

    with serving(noted("A")) as a, serving(noted("B")) as b:
        run(a, b, replace(PLAN, concurrencies=(1,), rounds=4, requests=4), questions=[])
    assert "".join(order[-24:]) == "AAABBB BBBAAA AAABBB BBBAAA".replace(" ", "")


def test_measured_times_are_the_servers_delays() -> None:
    plan = replace(PLAN, concurrencies=(2,), requests=6, rounds=1, output_tokens=6, image_sizes=(None,))
    with serving(Behaviour(first_s=0.08, gap_s=0.02)) as a, serving(Behaviour(first_s=0.16, gap_s=0.04)) as b:
        found = run(a, b, plan, questions=[])
    truth: dict[Role, tuple[float, float]] = {"baseline": (0.08, 0.02), "candidate": (0.16, 0.04)}
    for role, (first, gap) in truth.items():
        (block,) = found.blocks[role, 2]
        # A busy machine only ever adds to a delay, and not to each.
        firsts = [trace.chunks[0] - trace.scheduled for trace in block.traces]
        tpots = [(trace.ended - trace.chunks[0]) / 5 for trace in block.traces]
        assert min(firsts) == pytest.approx(first, abs=0.02)
        assert min(tpots) == pytest.approx(gap, abs=0.008)
        assert block.wall_s >= 3 * (first + 5 * gap) - 0.01


@pytest.mark.parametrize("fail_after", [0, 4, 10, 14])
def test_a_failed_request_ends_the_run(fail_after: int) -> None:
    with serving(Behaviour(text=echo, fail_after=fail_after)) as a, serving(Behaviour(text=echo)) as b:
        found = run(a, b)
        sent = len(a.bodies)
    (role, phase, failure), count = found.failures.most_common(1)[0]
    assert (role, failure.kind) == ("baseline", "http")
    assert (
        phase == "questions"
        if fail_after < 9
        else phase in ("warm-up", "load at concurrency 1", "load at concurrency 3")
    )
    assert 1 <= count <= 3
    assert sent <= fail_after + 3  # nothing new is sent once something failed


def test_answers_without_text_cannot_be_timed() -> None:
    with serving(Behaviour(text=lambda body: "")) as a, serving() as b:
        found = run(a, b, questions=[])
    assert {failure.kind for _, _, failure in found.failures} == {"empty"}


def test_an_empty_answer_to_a_question_is_no_failure() -> None:
    with serving(Behaviour(text=lambda body: "")) as a, serving() as b:
        found = run(a, b, replace(PLAN, concurrencies=()))
    assert not found.failures
    assert found.answers["baseline"]["q0"].text == ""


def test_systems_measured_alone_are_merged() -> None:
    with serving(Behaviour(text=echo)) as a:

        async def alone(role: Any) -> Measurements:
            return await measure([System(role, await discover(a.url))], QUESTIONS, PLAN)

        whole = merge([asyncio.run(alone(role)) for role in ("baseline", "candidate")])
    assert set(whole.answers) == {"baseline", "candidate"}
    assert set(whole.blocks) == {(role, c) for role in ("baseline", "candidate") for c in (1, 3)}


def test_a_block_is_more_than_one_wave() -> None:
    plan = replace(PLAN, requests=20, rounds=2)
    assert [plan.block_requests(concurrency) for concurrency in (1, 3, 4, 32)] == [10, 10, 12, 96]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requests": 0}, "--requests 0"),
        ({"rounds": -1}, "--rounds -1"),
        ({"output_tokens": 1}, "at least 2"),
        ({"concurrencies": (0, 1)}, "--concurrency"),
        ({"timeout_s": 0}, "--timeout"),
        ({"question_concurrency": 0}, "--question-concurrency"),
        ({"answer_tokens": 0}, "--answer-tokens"),
    ],
)
def test_plans_that_measure_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        replace(PLAN, **changes)
