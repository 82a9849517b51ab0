from __future__ import annotations

import pytest

from bench.client import Failure
from bench.report.compare import Side, compare, parse_condition, snapshot
from bench.report.model import Report
from tests.bench.factory import pictured, questions, report, system
from toolkit.errors import BenchError


def sides(a: Report, b: Report) -> tuple[Side, Side]:
    return Side(a, "candidate"), Side(b, "candidate")


@pytest.mark.parametrize(
    ("text", "metric", "at", "op", "change", "unit"),
    [
        ("accuracy<-1%", "accuracy", None, "<", -1.0, "%"),
        (" accuracy.new words <= -0.5 pt ", "accuracy.new words", None, "<=", -0.5, "pt"),
        ("accuracy.a.b<-1pt", "accuracy.a.b", None, "<", -1.0, "pt"),
        ("tpot.p50@4>+5%", "tpot_p50", 4, ">", 5.0, "%"),
        ("TTFT_p99>20ms", "ttft_p99", None, ">", 20.0, "ms"),
        ("output_tokens_per_s<-10%", "output_tokens_per_s", None, "<", -10.0, "%"),
        ("size_on_disk>=.5%", None, None, None, None, None),
        ("memory>0%", "memory", None, ">", 0.0, "%"),
    ],
)
def test_conditions_are_read(
    text: str, metric: str | None, at: int | None, op: str | None, change: float | None, unit: str | None
) -> None:
    if metric is None:
        with pytest.raises(BenchError):
            parse_condition(text)
        return
    found = parse_condition(text)
    assert (found.metric, found.at, found.op, found.change, found.unit) == (metric, at, op, change, unit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "METRIC OP CHANGE"),
        ("accuracy", "METRIC OP CHANGE"),
        ("accuracy=1%", "METRIC OP CHANGE"),
        ("accuracy<lots", "METRIC OP CHANGE"),
        ("accuracy.<-1%", "METRIC OP CHANGE"),
        ("speed>1%", "unknown metric 'speed'; choose one of accuracy"),
        ("accuracy<-1", "say which"),
        ("accuracy<-1ms", "say which"),
        ("ttft_p50>5", "% or ms"),
        ("ttft_p50>5pt", "% or ms"),
        ("memory>5ms", "is given in %"),
        ("memory@4>5%", "has no concurrency"),
        ("accuracy>-1%", "two equal reports would fail"),
        ("ttft_p50>=0%", "two equal reports would fail"),
    ],
)
def test_other_conditions_are_refused(text: str, words: str) -> None:
    with pytest.raises(BenchError, match=r"--fail-if") as caught:
        parse_condition(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "before", "after", "met"),
    [
        ("accuracy<-1%", 0.90, 0.88, True),  # -2.2%
        ("accuracy<-1%", 0.90, 0.892, False),
        ("accuracy<-1pt", 0.90, 0.89, False),  # exactly the limit
        ("accuracy<=-1pt", 0.90, 0.89, True),
        ("accuracy<-1pt", 0.90, 0.889, True),
        ("ttft_p50>5%", 100.0, 105.0, False),
        ("ttft_p50>5%", 100.0, 105.1, True),
        ("ttft_p50>5ms", 100.0, 105.1, True),
        ("output_tokens_per_s<-10%", 100.0, 89.0, True),
        ("memory>5%", 0.0, 1.0, True),
        ("memory>5%", 0.0, 0.0, False),
    ],
)
def test_conditions_are_met_by_the_change_of_b_from_a(text: str, before: float, after: float, met: bool) -> None:
    assert parse_condition(text).met(before, after) is met


def test_every_metric_of_the_grammar_can_be_measured() -> None:
    names = {metric.name for metric in snapshot(Side(report(), "candidate"))}
    assert {"accuracy", "accuracy.red", "ttft_p50", "tpot_p90", "itl_p99", "e2e_p50"} <= names
    assert {"output_tokens_per_s", "requests_per_s", "size_on_disk", "memory"} <= names
    for name in names:
        parse_condition(f"{name}<-5%")


def test_equal_reports_pass_every_condition() -> None:
    found = report()
    conditions = [parse_condition(f"{metric.name}<-0.001%") for metric in snapshot(Side(found, "candidate"))]
    assert compare(*sides(found, report()), conditions).regressions == []


def test_a_regression_names_metric_and_values() -> None:
    before, after = report(), report({"candidate": {"red-1", "red-2"}}, speed={"candidate": 1.2})
    conditions = [parse_condition(text) for text in ("accuracy<-1pt", "tpot_p50@4>5%", "accuracy.blue<-1pt")]
    found = compare(*sides(before, after), conditions).regressions
    assert len(found) == 2
    assert found[0].startswith("accuracy<-1pt: accuracy went from 1 to 0.95")
    assert found[1].startswith("tpot_p50@4>5%: tpot_p50@4 went from 20")


def test_without_a_concurrency_any_one_counts() -> None:
    found = compare(*sides(report(), report(speed={"candidate": 1.2})), [parse_condition("tpot_p50>5%")])
    assert [line.split(": ")[1].split()[0] for line in found.regressions] == ["tpot_p50@1", "tpot_p50@4"]


def test_accuracies_are_paired_by_item() -> None:
    found = compare(*sides(report({"candidate": {"red-1"}}), report({"candidate": {"red-2", "red-3"}})))
    assert found.accuracy is not None
    assert (found.accuracy.difference.lost, found.accuracy.difference.won) == (2, 1)
    assert found.accuracy.verdict == "can't tell"
    assert [(row.task, row.difference.lost, row.difference.won) for row in found.tasks] == [
        ("red", 2, 1),
        ("blue", 0, 0),
    ]


def test_clusters_are_counted_as_in_one_report() -> None:
    asked = pictured(8, each=5)
    lost = {q.id for q in asked if q.pictures == asked[0].pictures}
    found = compare(*sides(report(asked=asked), report({"candidate": lost}, asked=asked))).accuracy
    assert found is not None
    assert (found.clusters, found.difference.lost, found.difference.p_value) == (8, 5, 1.0)


def test_one_side_that_knows_the_clusters_is_enough() -> None:
    new = report(asked=pictured(8, each=5))
    assert new.accuracy is not None
    alone = [item.model_copy(update={"cluster": f"question {item.id}"}) for item in new.accuracy.items]
    old = new.model_copy(update={"accuracy": new.accuracy.model_copy(update={"items": alone})})
    for pair in ((old, new), (new, old)):
        found = compare(*sides(*pair)).accuracy
        assert found is not None and found.clusters == 8


def test_verdicts_go_by_the_margin_of_the_report_that_is_judged() -> None:
    fine = compare(*sides(report(margin=0.01), report(margin=0.2))).accuracy
    strict = compare(*sides(report(margin=0.2), report(margin=0.01))).accuracy
    assert fine is not None and strict is not None
    assert (fine.verdict, strict.verdict) == ("no worse", "can't tell")


def test_the_baseline_can_be_compared_with_the_candidate_of_one_report() -> None:
    both = report({"candidate": {f"red-{i}" for i in range(10)}})
    found = compare(Side(both, "baseline"), Side(both, "candidate"), [parse_condition("accuracy<-1pt")])
    assert found.regressions and found.accuracy is not None and found.accuracy.verdict == "worse"


def test_failed_reports_cannot_be_compared() -> None:
    bad = report(failure=Failure("timeout", "too slow"))
    for pair in (sides(report(), bad), sides(bad, report())):
        with pytest.raises(BenchError, match="marked failed"):
            compare(*pair)


def test_other_questions_are_said_and_gate_nothing_unless_told() -> None:
    a, b = report(), report(per_task=10)
    condition = [parse_condition("accuracy<-1pt")]
    found = compare(*sides(a, b))
    assert found.accuracy is None
    assert found.differences == ["other questions (40 and 20)"]
    with pytest.raises(BenchError, match=r"other questions .*--anyway"):
        compare(*sides(a, b), condition)
    assert compare(*sides(a, b), condition, anyway=True).regressions == []


def test_another_machine_gates_no_latency() -> None:
    b = report()
    b = b.model_copy(update={"environment": b.environment.model_copy(update={"gpus": ["H100"]})})
    with pytest.raises(BenchError, match="measured on"):
        compare(*sides(report(), b), [parse_condition("ttft_p50>5%")])
    compare(*sides(report(), b), [parse_condition("accuracy<-1pt"), parse_condition("size_on_disk>1%")])


def test_what_was_not_measured_is_said() -> None:
    b = report(candidate=system("candidate", disk_bytes=None), asked=questions(1))
    with pytest.raises(BenchError, match="not measured for both"):
        compare(*sides(report(), b), [parse_condition("size_on_disk>1%")])
    with pytest.raises(BenchError, match="not measured for both"):
        compare(*sides(report(), report()), [parse_condition("ttft_p50@16>1%")])
    with pytest.raises(BenchError, match="not measured for both"):
        compare(*sides(report(), report()), [parse_condition("accuracy.green<-1%")])
