from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

import numpy as np
import pytest

from bench.load.endpoint import discover
from bench.load.loops import Block
from bench.load.workload import Lengths
from bench.questions.tasks import Question
from bench.report.schema import Load
from bench.roles import Role
from bench.run.config import BenchConfig
from bench.run.measure import measure
from bench.run.measured import Measurements
from bench.run.systems import System
from tests.support.factory import config
from tests.support.fake_server import Behaviour, FakeServer, serving
from toolkit.errors import BenchError

CONFIG = config(
    concurrencies=(1, 3),
    requests=6,
    rounds=2,
    output_tokens="4",
    image_sizes="56x56,text",
    answer_tokens=8,
    question_concurrency=2,
    timeout_s=5.0,
)
QUESTIONS = [Question(f"q{i}", "t", f"What is {i}?", (str(i),)) for i in range(9)]


def echo(body: dict[str, Any]) -> str | None:
    return None if body.get("ignore_eos") else body["messages"][0]["content"][-1]["text"]


def run(
    a: FakeServer, b: FakeServer, config: BenchConfig = CONFIG, questions: list[Question] = QUESTIONS, **more: Any
) -> Measurements:
    async def main() -> Measurements:
        systems = [System("baseline", await discover(a.url)), System("candidate", await discover(b.url))]
        return await measure(systems, questions, config, **more)

    return asyncio.run(main())


def blocks(found: Measurements, role: Role, load: Load) -> list[Block]:
    """Of each round, in their order."""
    rounds = found.stretches()[role, load]
    return [rounds[number].block for number in sorted(rounds)]


def test_both_systems_answer_every_question_and_carry_every_load() -> None:
    with serving(Behaviour(text=echo)) as a, serving(Behaviour(text=echo)) as b:
        seen: list[tuple[str, int, int]] = []
        said: list[str] = []

        def progress(phase: str, done: int, total: int, now: str) -> None:
            seen.append((phase, done, total))
            said.append(now)

        found = run(a, b, progress=progress)
    assert not found.failures
    roles: tuple[Role, ...] = ("baseline", "candidate")
    for role in roles:
        assert {q.id: found.answers[role][q.id].text for q in QUESTIONS} == {q.id: q.question for q in QUESTIONS}
        for concurrency, count in ((1, 3), (3, 9)):
            rounds = blocks(found, role, Load.in_flight(concurrency))
            assert [len(block.traces) for block in rounds] == [count, count]
            assert all(trace.completion_tokens == 4 for block in rounds for trace in block.traces)
    assert seen[-1] == ("load", 48, 48)
    assert ("questions", 18, 18) in seen
    assert {phase for phase, _, _ in seen} == {"questions", "warm-up", "load"}
    assert "candidate, 3 in flight, round 2 of 2" in said[-1] + said[-10]


def test_progress_tells_the_rates_of_the_last_seconds() -> None:
    said: list[str] = []
    chosen = CONFIG.replaced(concurrencies=(2,), requests=40, rounds=1)
    with serving(Behaviour(first_s=0.1)) as a, serving() as b:
        run(a, b, chosen, questions=[], progress=lambda phase, done, total, now: said.append(now))
    found = [
        re.search(r"baseline, 2 in flight, round 1 of 1, ([\d.]+) requests/s, (\d+) tokens/s", now) for now in said
    ]
    rates = [(float(match[1]), int(match[2])) for match in found if match]
    assert rates
    requests, tokens = rates[-1]
    assert 3 < requests < 22  # two at a time, a tenth of a second each, or more where the machine is busy
    assert tokens == pytest.approx(4 * requests, abs=3)


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
        assert {len(body["messages"][0]["content"]) for body in warm} == {1, 2}  # with an image and without
    assert sorted(a.raw_bodies) == sorted(b.raw_bodies)


def test_one_server_under_both_names_gets_unique_inputs_too() -> None:
    with serving() as a:
        run(a, a, questions=[])
    assert len(a.raw_bodies) == len(set(a.raw_bodies))


def test_two_runs_share_no_input() -> None:
    with serving() as a:
        for _ in range(2):
            run(a, a, CONFIG.replaced(nonce=config().nonce), questions=[])
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
        run(a, b, CONFIG.replaced(concurrencies=(), question_concurrency=1))
    assert "".join(order) == "AAAA BBBB BBBB AAAA A B".replace(" ", "")


def test_blocks_take_turns_too() -> None:
    order: list[str] = []

    def noted(name: str) -> Behaviour:
        def text(body: dict[str, Any]) -> None:
            order.append(name)

        return Behaviour(text=text)

    with serving(noted("A")) as a, serving(noted("B")) as b:
        run(a, b, CONFIG.replaced(concurrencies=(1,), rounds=4, requests=4), questions=[])
    assert "".join(order[-24:]) == "AAABBB BBBAAA AAABBB BBBAAA".replace(" ", "")


def test_measured_times_are_the_servers_delays() -> None:
    chosen = CONFIG.replaced(concurrencies=(2,), requests=6, rounds=1, output_tokens="6", image_sizes=(None,))
    with serving(Behaviour(first_s=0.08, gap_s=0.02)) as a, serving(Behaviour(first_s=0.16, gap_s=0.04)) as b:
        found = run(a, b, chosen, questions=[])
    truth: dict[Role, tuple[float, float]] = {"baseline": (0.08, 0.02), "candidate": (0.16, 0.04)}
    for role, (first, gap) in truth.items():
        (block,) = blocks(found, role, Load.in_flight(2))
        # A busy machine only ever adds to a delay, and not to each; a first token that is late makes TPOT short.
        firsts = [trace.chunks[0] - trace.scheduled for trace in block.traces]
        tpots = [(trace.ended - trace.chunks[0]) / 5 for trace in block.traces]
        assert first - 0.005 < min(firsts) < first + 0.06
        assert 0.7 * gap < sorted(tpots)[len(tpots) // 2] < 3 * gap
        assert block.wall_s >= 3 * (first + 5 * gap) - 0.01


@pytest.mark.parametrize("fail_after", [0, 4, 10, 14])
def test_a_failed_request_ends_the_run(fail_after: int) -> None:
    with serving(Behaviour(text=echo, fail_after=fail_after)) as a, serving(Behaviour(text=echo)) as b:
        found = run(a, b)
        sent = len(a.bodies)
    (role, phase, failure), count = found.failures.most_common(1)[0]
    assert (role, failure.kind) == ("baseline", "http")
    assert phase == "questions" if fail_after < 9 else phase in ("warm-up", "load, 1 in flight", "load, 3 in flight")
    assert 1 <= count <= 3
    assert sent <= fail_after + 3  # nothing new is sent once something failed


def test_answers_without_text_cannot_be_timed() -> None:
    with serving(Behaviour(text=lambda body: "")) as a, serving() as b:
        found = run(a, b, questions=[])
    assert {failure.kind for _, _, failure in found.failures} == {"empty"}


def test_an_empty_answer_to_a_question_is_no_failure() -> None:
    with serving(Behaviour(text=lambda body: "")) as a, serving() as b:
        found = run(a, b, CONFIG.replaced(concurrencies=()))
    assert not found.failures
    assert found.answers["baseline"]["q0"].text == ""


def test_systems_measured_alone_add_up() -> None:
    with serving(Behaviour(text=echo)) as a:
        whole = Measurements()
        roles: tuple[Role, ...] = ("baseline", "candidate")
        for role in roles:

            async def alone(role: Role = role) -> Measurements:
                return await measure([System(role, await discover(a.url))], QUESTIONS, CONFIG, found=whole)

            assert asyncio.run(alone()) is whole
    assert set(whole.answers) == {"baseline", "candidate"}
    assert set(whole.stretches()) == {(role, Load.in_flight(c)) for role in roles for c in (1, 3)}


def test_what_was_measured_before_is_not_measured_again() -> None:
    with serving(Behaviour(text=echo)) as a, serving(Behaviour(text=echo)) as b:
        found = run(a, b)
        asked = len(a.bodies)
        assert run(a, b, found=found) is found
        assert len(a.bodies) == asked
        del found.units["baseline", "3 in flight", 1]
        del found.answers["baseline"]["q5"]
        run(a, b, CONFIG.replaced(nonce="another"), found=found)
        again = a.bodies[asked:]
        load = [body for body in again if body.get("ignore_eos")]
    assert [body["messages"][0]["content"][-1]["text"] for body in again[:1]] == ["What is 5?"]
    assert len(again) == 1 + len(load)
    assert len(blocks(found, "baseline", Load.in_flight(3))) == 2
    assert len(load) < asked - 9  # a warm-up and nine requests


OPEN = CONFIG.replaced(concurrencies=(), rates=(40.0, 80.0), requests=24, rounds=2)


def test_open_loops_keep_to_their_rate() -> None:
    with serving() as a, serving() as b:
        found = run(a, b, OPEN, questions=[])
    roles: tuple[Role, ...] = ("baseline", "candidate")
    for rate in OPEN.rates:
        load = Load.at_rate(rate, "poisson")
        dues = []
        for role in roles:
            rounds = blocks(found, role, load)
            assert [len(block.traces) for block in rounds] == [12, 12]
            dues.append([sorted(trace.scheduled - block.begun for trace in block.traces) for block in rounds])
            assert all(found.stretches()[role, load][number].offered_per_s == rate for number in range(2))
        assert np.allclose(dues[0], dues[1], atol=1e-6)  # both were due at the same moments
        assert not np.allclose(dues[0][0], dues[0][1])  # other ones in each round
        assert 0.3 * 12 / rate < np.mean([due[-1] for due in dues[0]]) < 3 * 12 / rate


def test_a_rate_that_is_too_much_is_marked_and_no_higher_one_is_tried() -> None:
    # Each third request under load is refused: the run goes on, the point says so.
    chosen = OPEN.replaced(rates=(50.0, 100.0), rounds=1, requests=30)
    with serving() as a, serving() as b:

        def progress(phase: str, done: int, total: int, now: str) -> None:
            if phase == "load":
                a.behaviour.fail_every = 3

        found = run(a, b, chosen, questions=[], progress=progress)
    assert not found.failures
    slow, fast = (Load.at_rate(rate, "poisson") for rate in chosen.rates)
    (block,) = blocks(found, "baseline", slow)
    assert block.stopped and "http" in block.stopped
    assert {trace.failure.status for trace in block.traces if trace.failure} == {500}
    assert ("baseline", fast) not in found.stretches()
    assert len(blocks(found, "candidate", fast)[0].traces) == 30


def test_a_sweep_goes_from_one_at_a_time_to_saturation() -> None:
    chosen = CONFIG.replaced(concurrencies=(), sweep=True, sweep_rates=2, sweep_concurrency=4, requests=16, rounds=2)
    with serving(Behaviour(gap_s=0.004, slots=2)) as a, serving(Behaviour(gap_s=0.004, slots=2)) as b:
        found = run(a, b, chosen, questions=[])
    names = [load.name for role, load in found.stretches() if role == "baseline"]
    assert names[:2] == ["sweep: one at a time", "sweep: saturation"] and len(names) >= 3
    single, saturation = (
        next(load for _, load in found.stretches() if load.kind == kind) for kind in ("single", "saturation")
    )
    assert (single.concurrency, saturation.concurrency) == (1, 4)
    for role in ("baseline", "candidate"):
        assert len(blocks(found, role, single)) == 2
    assert a.most_in_flight >= 4


def test_durations_and_ramps_bound_a_point() -> None:
    chosen = CONFIG.replaced(concurrencies=(2,), rounds=1, duration_s=0.4, ramp_s=0.2)
    with serving(Behaviour(first_s=0.01)) as a, serving(Behaviour(first_s=0.01)) as b:
        found = run(a, b, chosen, questions=[])
    (block,) = blocks(found, "baseline", Load.in_flight(2))
    assert block.ramp and not block.stopped
    assert 0.2 < block.wall_s < 0.8
    assert all(trace.scheduled < block.begun for trace in block.ramp)
    assert all(block.begun <= trace.scheduled <= block.begun + 0.4 for trace in block.traces)


def test_a_few_failures_of_a_block_are_a_result_and_more_end_the_run() -> None:
    chosen = CONFIG.replaced(concurrencies=(1,), rounds=1, requests=40)

    def run_failing(every: int) -> Measurements:
        with serving() as a, serving() as b:

            def progress(phase: str, done: int, total: int, now: str) -> None:
                if phase == "load":
                    a.behaviour.fail_every = every

            return run(a, b, chosen, questions=[], progress=progress)

    found = run_failing(25)
    (block,) = blocks(found, "baseline", Load.in_flight(1))
    assert not found.failures and 1 <= len(block.failed) <= 2 and len(block.traces) == 40
    found = run_failing(5)
    assert {(role, phase, failure.status) for role, phase, failure in found.failures} == {
        ("baseline", "load, 1 in flight", 500)
    }


def test_failures_are_borne_by_the_point_and_not_by_the_round() -> None:
    """Eight rounds of five requests: 5% of a round is none, of the point it is two."""
    chosen = CONFIG.replaced(concurrencies=(1,), rounds=8, requests=40)

    def run_failing(rounds: int) -> Measurements:
        """One request of each of the first so many rounds fails."""
        seen: set[str] = set()
        with serving() as a, serving() as b:

            def progress(phase: str, done: int, total: int, now: str) -> None:
                round_ = now.partition("round ")[2].partition(" of")[0]
                first = phase == "load" and now.startswith("baseline") and round_ not in seen
                seen.update([round_] if first else [])
                a.behaviour.fail_after = len(a.bodies) if first and int(round_) <= rounds else None

            return run(a, b, chosen, questions=[], progress=progress)

    found = run_failing(2)
    failed = [len(block.failed) for block in blocks(found, "baseline", Load.in_flight(1))]
    assert not found.failures and sum(failed) == 2 and len(failed) == 8
    assert run_failing(3).failures


def test_a_busy_server_is_asked_again_under_load_and_with_questions() -> None:
    chosen = CONFIG.replaced(concurrencies=(1,), rounds=1)
    with serving(Behaviour(text=echo, busy=2, retry_after="0")) as a, serving(Behaviour(text=echo)) as b:

        def progress(phase: str, done: int, total: int, now: str) -> None:
            if phase == "load" and done == 1:
                a.behaviour.busy = 1

        found = run(a, b, chosen, progress=progress)
    assert not found.failures and len(found.answers["baseline"]) == len(QUESTIONS)
    assert sum(trace.retries for trace in found.answers["baseline"].values()) == 2
    (block,) = blocks(found, "baseline", Load.in_flight(1))
    assert sum(trace.retries for trace in block.traces) == 1


def test_both_get_the_same_requests_and_each_trace_knows_which_it_is() -> None:
    chosen = CONFIG.replaced(concurrencies=(3,), rounds=2, requests=18)
    with serving() as a, serving() as b:
        found = run(a, b, chosen, questions=[])
        assert sorted(str(body["messages"]) for body in a.bodies) == sorted(str(body["messages"]) for body in b.bodies)
    for role in ("baseline", "candidate"):
        for block in blocks(found, role, Load.in_flight(3)):
            assert sorted(trace.number or 0 for trace in block.traces) == list(range(9))
            assert {trace.number: trace.shape for trace in block.traces if trace.number in (0, 1)} == {
                0: "56x56",
                1: "text",
            }


@pytest.mark.parametrize("counts", [True, False])
def test_a_server_of_packed_chunks_is_asked_to_count_them(counts: bool) -> None:
    chosen = CONFIG.replaced(concurrencies=(1,), rounds=1, output_tokens="12")
    with serving(Behaviour(per_chunk=4, count_chunks=True)) as a, serving(Behaviour(count_chunks=counts)) as b:
        found = run(a, b, chosen, questions=[])
    (block,) = blocks(found, "baseline", Load.in_flight(1))
    assert {trace.counts for trace in block.traces} == ({(4, 8, 12)} if counts else {()})
    (other,) = blocks(found, "candidate", Load.in_flight(1))  # asked the same
    assert {trace.counts for trace in other.traces} == ({tuple(range(1, 13))} if counts else {()})


def test_a_server_that_reasons_is_timed_by_its_reasoning() -> None:
    chosen = CONFIG.replaced(concurrencies=(1,), rounds=1)
    with serving(Behaviour(reasoning="reasoning_content")) as a, serving() as b:
        found = run(a, b, chosen, questions=[])
    (block,) = blocks(found, "baseline", Load.in_flight(1))
    assert not found.failures and all(len(trace.chunks) == 4 for trace in block.traces)


def test_a_short_duration_is_three_waves_all_the_same() -> None:
    chosen = CONFIG.replaced(concurrencies=(3,), rounds=1, duration_s=0.001)
    with serving(Behaviour(first_s=0.02)) as a, serving(Behaviour(first_s=0.02)) as b:
        found = run(a, b, chosen, questions=[])
    for role in ("baseline", "candidate"):
        (block,) = blocks(found, role, Load.in_flight(3))
        assert len(block.traces) == 9 and not block.stopped


def test_what_the_server_counts_is_read_around_each_block() -> None:
    with serving(Behaviour(metrics=True)) as a, serving() as b:
        found = run(a, b, CONFIG.replaced(concurrencies=(1,)), questions=[])
    for stretch in found.stretches()["baseline", Load.in_flight(1)].values():
        assert stretch.server and stretch.server.finished == len(stretch.block.traces) == 3
        assert stretch.server.kv_tokens == 1600
    assert all(s.server is None for s in found.stretches()["candidate", Load.in_flight(1)].values())
    assert found.kv_cache_tokens == {"baseline": 1600}


class Kept:
    """Notes what it is told to keep."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def answer(self, role: Role, question: str, trace: Any) -> None:
        self.seen.append(("answer", role, question))

    def unit(self, role: Role, unit: str, round_: int, stretches: Any) -> None:
        self.seen.append(("unit", role, unit, round_))

    def observed(self, who: str, observed: Any) -> None:
        self.seen.append(("observed", who))


def test_what_failed_is_not_kept() -> None:
    kept = Kept()
    with serving(Behaviour(text=echo, fail_after=4)) as a, serving(Behaviour(text=echo)) as b:
        found = run(a, b, keep=kept)
    assert found.failures
    assert set(found.answers["baseline"]) == {name for kind, role, name in kept.seen if role == "baseline"}
    assert len(found.answers["baseline"]) == 4


def test_a_block_is_more_than_one_wave() -> None:
    chosen = CONFIG.replaced(requests=20, rounds=2)
    assert [chosen.block_requests(concurrency) for concurrency in (1, 3, 4, 32)] == [10, 10, 12, 96]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requests": 0}, "--requests 0"),
        ({"rounds": -1}, "--rounds -1"),
        ({"output_tokens": Lengths.fixed(1)}, "at least 2"),
        ({"concurrencies": (0, 1)}, "--concurrency"),
        ({"rates": (0.0,)}, "--rate"),
        ({"duration_s": 0.0}, "--duration 0"),
        ({"ramp_s": -1.0}, "--ramp -1"),
        ({"sweep_concurrency": 0}, "--sweep-concurrency"),
        ({"prompt_tokens": "3"}, "at least 8"),
        ({"timeout_s": 0}, "--timeout"),
        ({"question_concurrency": 0}, "--question-concurrency"),
        ({"answer_tokens": 0}, "--answer-tokens"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        CONFIG.replaced(**changes)
