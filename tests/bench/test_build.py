from __future__ import annotations

from dataclasses import replace

import pytest

from bench import stats
from bench.client import Failure
from bench.report.build import judge
from bench.report.model import Difference
from tests.bench.factory import PLAN, questions, report, system


def ids(task: str, *numbers: int) -> set[str]:
    return {f"{task}-{number}" for number in numbers}


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


def difference(low: float, high: float) -> Difference:
    return Difference(
        value=(low + high) / 2, low=low, high=high, method="tango", p_value=1, lost=0, won=0, smallest_detectable=0.1
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.009, 0.02, "no worse"),
        (-0.009, -0.001, "no worse"),  # surely a loss, surely one that does not matter
        (-0.05, -0.001, "worse"),
        (-0.05, 0.01, "can't tell"),
    ],
)
def test_the_verdict_follows_the_interval(low: float, high: float, verdict: str) -> None:
    assert judge(difference(low, high), 0.01) == verdict


def test_verdicts_are_said_in_words() -> None:
    assert "no loss shown, none ruled out" in report().verdict.sentence
    assert report().verdict.accuracy == "can't tell"
    fine = report(per_task=400)
    assert (fine.verdict.accuracy, "more than 1 points is ruled out" in fine.verdict.sentence) == ("no worse", True)
    bad = report({"candidate": ids("red", *range(10))})
    assert (bad.verdict.accuracy, "a loss beyond chance" in bad.verdict.sentence) == ("worse", True)
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
