from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from bench import scoring, stats, verdict
from bench.client import Failure
from bench.report.model import Judgement, Role
from bench.tasks import Question
from tests.bench.factory import PLAN, pictured, questions, report, system


def ids(task: str, *numbers: int) -> set[str]:
    return {f"{task}-{number}" for number in numbers}


def ids_lost(count: int) -> dict[Role, set[str]]:
    return {"candidate": ids("red", *range(count))}


def test_accuracy_is_scored_per_task_and_over_all() -> None:
    found = report({"baseline": ids("red", 0, 1), "candidate": ids("red", 1, 2, 3)}).accuracy
    assert found is not None
    red, blue = found.tasks
    assert (red.task, red.n, red.baseline.value, red.candidate.value) == ("red", 20, 0.9, 0.85)
    assert (blue.baseline.value, blue.candidate.value) == (1.0, 1.0)
    assert (red.difference.lost, red.difference.won) == (2, 1)
    assert red.difference.value == pytest.approx(-0.05)
    assert red.difference.p_value == pytest.approx(1.0)
    assert found.overall.n == 40
    assert found.overall.candidate.value == pytest.approx(37 / 40)
    wilson = stats.wilson(18, 20)
    assert (red.baseline.low, red.baseline.high) == (wilson.low, wilson.high)
    assert len(found.items) == 40


def test_graded_scores_get_bootstrap_intervals() -> None:
    asked = questions(20, metric="anls")
    found = report(asked=asked).accuracy
    assert found is not None
    assert found.overall.difference.method == "tango"  # every score happened to be 0 or 1
    asked = [type(q)(q.id, q.task, q.question, ("yess",), "anls") for q in asked]
    found = report({"candidate": ids("red", 1, 2)}, asked=asked).accuracy
    assert found is not None
    assert found.overall.difference.method == "bootstrap"
    assert found.overall.baseline.value == pytest.approx(0.75)
    assert found.overall.difference.low < found.overall.difference.value < found.overall.difference.high


def test_questions_on_one_picture_are_one_piece_of_evidence() -> None:
    asked = pictured(8, each=5)
    lost = {q.id for q in asked if q.pictures == asked[0].pictures}  # all five on the first picture
    together = report({"candidate": lost}, asked=asked).accuracy
    alone = report({"candidate": lost}, asked=[replace(q, pictures=()) for q in asked]).accuracy
    assert together is not None and alone is not None
    a, b = together.overall, alone.overall
    assert (a.n, a.clusters, a.difference.lost) == (40, 8, 5) and (b.clusters, b.difference.lost) == (40, 5)
    assert a.difference.p_value == 1.0 and b.difference.p_value == stats.mcnemar(5, 0)
    assert a.difference.design_effect > 4 and b.difference.design_effect == 1.0
    assert a.difference.low < b.difference.low and a.difference.high > b.difference.high
    assert {item.cluster for item in together.items} == {q.pictures[0].sha256 for q in asked}


def test_rows_say_what_the_statistics_say() -> None:
    asked = questions(60, tasks=("red", "blue", "green"))
    wrong: dict[Role, set[str]] = {"baseline": ids("blue", 1), "candidate": ids("red", *range(9)) | ids("blue", 2)}
    found = report(wrong, asked=asked, margin=0.02).accuracy
    assert found is not None
    compared = {
        task: verdict.compare(
            [float(q.id not in wrong["baseline"]) for q in asked if q.task == task],
            [float(q.id not in wrong["candidate"]) for q in asked if q.task == task],
            seed=0,
        )
        for task in ("red", "blue", "green")
    }
    judged = verdict.judge_tasks(compared, 0.02)
    for row in found.tasks:
        said, ruled = compared[row.task], judged[row.task]
        assert (row.verdict, row.p_adjusted, row.items_needed) == (ruled.judgement, ruled.p_value, ruled.items_needed)
        assert (row.difference.low, row.difference.high) == (said.difference.low, said.difference.high)
        assert row.recovery is not None and said.recovery is not None
        assert (row.recovery.value, row.recovery.low) == (said.recovery.value, said.recovery.low)
    assert found.tasks[0].verdict == "worse" and found.tasks[0].p_adjusted == pytest.approx(3 * stats.mcnemar(9, 0))
    assert found.overall.p_adjusted == found.overall.difference.p_value


def test_a_verdict_is_one_of_three_words() -> None:
    assert set(get_args(Judgement)) == {"no worse", "worse", "can't tell"} == set(get_args(verdict.Judgement))
    verdicts = [
        report({"candidate": ids("red", *range(lost))}, per_task=size).verdict.accuracy
        for lost, size in ((0, 400), (10, 20), (0, 20))
    ]
    assert verdicts == ["no worse", "worse", "can't tell"]


def test_answers_carry_what_it_takes_to_score_them_again() -> None:
    asked = [
        Question("c", "t", "Which?\nA. x\nB. y", ("B",), "choice", choices=("x", "y")),
        Question("v", "t", "What?", ("yes",) * 3 + ("no",) * 7, "vqa", cluster="sign 7"),
        Question("a", "t", "What?", ("yesterday",), "anls"),
    ]
    found = report({"candidate": {"c"}}, asked=asked).accuracy
    assert found is not None
    for item in found.items:
        for answer in (item.baseline, item.candidate):
            again = scoring.grade(item.metric, answer.text, item.answers, item.choices)
            assert (answer.score, answer.note) == (again.score, again.note)
    assert found.items[0].candidate.note == "names none of the options"
    assert found.items[1].cluster == "sign 7"


def test_flipped_items_have_their_picture_and_no_others_do() -> None:
    asked = pictured(6, each=2)
    found = report({"baseline": {"scans-1"}, "candidate": {"scans-0", "scans-6", "scans-3"}}, asked=asked).accuracy
    assert found is not None
    assert [(item.id, item.flip) for item in found.flipped] == [
        ("scans-0", "lost"),
        ("scans-1", "won"),
        ("scans-3", "lost"),
        ("scans-6", "lost"),
    ]
    assert set(found.thumbnails) == {asked[i].pictures[0].sha256 for i in (0, 1, 3)}  # 0 and 6 share theirs
    assert all(item.pictures == [q.pictures[0].sha256] for item, q in zip(found.items, asked, strict=True))


def test_a_picture_that_is_gone_loses_no_report(tmp_path: Path) -> None:
    file = tmp_path / "gone.png"
    asked = [replace(q, pictures=(replace(q.pictures[0], path=file, data=None),)) for q in pictured(1, each=2)]
    found = report({"candidate": {"scans-0"}}, asked=asked)
    assert found.accuracy is not None and found.accuracy.thumbnails == {}
    assert any("1 pictures of answers that flipped were gone" in warning for warning in found.warnings)


def test_verdicts_are_said_in_words() -> None:
    assert "no loss is shown, and one of more than 1 point is not ruled out" in report().verdict.sentence
    assert "About 390 questions like these would tell" in report().verdict.sentence
    assert report().verdict.accuracy == "can't tell"
    fine = report(per_task=400)
    assert (fine.verdict.accuracy, "more than 1 point is ruled out" in fine.verdict.sentence) == ("no worse", True)
    bad = report({"candidate": ids("red", *range(10))})
    assert (bad.verdict.accuracy, "a loss beyond chance" in bad.verdict.sentence) == ("worse", True)
    assert "a smaller one is there" in report(ids_lost(8), per_task=2000, margin=0.05).verdict.sentence
    most = [*questions(20, tasks=["red"]), *questions(600, tasks=["blue"])]
    mixed = report(ids_lost(10), asked=most, margin=0.05)
    assert (mixed.verdict.accuracy, "Worse by itself: red" in mixed.verdict.sentence) == ("no worse", True)
    silent = report(asked=[])
    assert (silent.verdict.accuracy, silent.verdict.sentence) == (None, "Accuracy was not measured.")


def test_speed_points_pool_their_rounds() -> None:
    found = report(speed={"candidate": 0.5})
    point = found.point("baseline", 4)
    assert point is not None and point.tpot_ms and point.itl_ms
    assert point.requests == 8
    assert point.ttft_ms.p50 == pytest.approx(101.5)
    assert point.tpot_ms.p50 == pytest.approx(20.0)
    assert point.itl_ms.n == 8 * 4
    assert point.output_tokens_per_s == pytest.approx(8 * 5 / 2.0)
    assert point.requests_per_s == pytest.approx(4.0)
    ratio = next(r for r in found.speed_ratios if (r.metric, r.concurrency) == ("ttft", 1))
    assert ratio.ratio == pytest.approx(0.5)
    assert ratio.low <= 0.5 <= ratio.high < 1.0


def test_a_server_that_counts_no_tokens_gets_no_token_metrics() -> None:
    found = report(counted=False)
    point = found.point("candidate", 1)
    assert point is not None
    assert point.tpot_ms is None and point.output_tokens_per_s is None
    assert point.itl_ms is not None
    assert any("no token counts" in warning for warning in found.warnings)


def test_unequal_lengths_are_doubted() -> None:
    longer = replace(PLAN, output_tokens=9)  # the traces have five
    assert any("instead of 9" in warning for warning in report(plan=longer).warnings)
    assert not any("instead of" in warning for warning in report().warnings)


def test_a_failed_run_has_no_figures() -> None:
    found = report(failure=Failure("http", "HTTP 500: no"))
    assert found.status == "failed"
    assert found.accuracy is None and found.speed == [] and found.speed_ratios == []
    assert found.verdict.accuracy is None
    assert "2 requests failed" in found.verdict.sentence and "HTTP 500: no" in found.verdict.sentence
    assert [(f.role, f.kind, f.count) for f in found.failures] == [("candidate", "http", 2)]


def test_labels_and_sizes_are_kept() -> None:
    found = report(candidate=system("candidate", label="mine", disk_bytes=7))
    assert found.systems["candidate"].label == "mine"
    assert "mine" in found.verdict.sentence
