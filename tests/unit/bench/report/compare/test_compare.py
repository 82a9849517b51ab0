from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from bench.load.client import Failure, Trace
from bench.load.loops import Block
from bench.report.build import build
from bench.report.compare import html_file as compare_html
from bench.report.compare import markdown as compare_markdown
from bench.report.compare import terminal as compare_terminal
from bench.report.compare import view as compare_view
from bench.report.compare.changes import Change, Row, _between, _mover
from bench.report.compare.comparison import Comparison, compare, compare_all
from bench.report.compare.conditions import parse_condition
from bench.report.compare.figures import KNOWN, Figure, Metric, Side, figures
from bench.report.render import html_file, markdown
from bench.report.render.json_file import read
from bench.report.schema import Estimate, Report
from bench.roles import ROLES
from bench.run.measured import Measurements, Stretch
from bench.run.session import Outcome
from tests.support.factory import CONFIG, about_images, first_version, questions, report, system
from tests.support.paths import OLD_REPORTS, RESULTS
from toolkit.errors import BenchError, UnmeasuredError


def sides(a: Report, b: Report) -> tuple[Side, Side]:
    return Side(a, "candidate"), Side(b, "candidate")


def with_rounds(found: Report, name: str, values: list[float], low: float, high: float) -> Report:
    """The candidate's points have a figure with an interval, and its baseline is like no other report's."""
    middle = sorted(values)[len(values) // 2]
    estimate = Estimate(value=middle, low=low, high=high, rounds=values)
    speed = [
        p.model_copy(update={"by_round": p.by_round | {name: estimate}}) if p.role == "candidate" else p
        for p in found.speed
    ]
    alone = found.systems | {"baseline": system("baseline", server_version=str(values))}
    return found.model_copy(update={"speed": speed, "speed_ratios": [], "systems": alone})


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metric", "at", "op", "change", "unit"),
    [
        ("accuracy<-1%", "accuracy", None, "<", -1.0, "%"),
        (" accuracy.new words <= -0.5 pt ", "accuracy.new words", None, "<=", -0.5, "pt"),
        ("accuracy.a.b<-1pt", "accuracy.a.b", None, "<", -1.0, "pt"),
        ("tpot.p50@4>+5%", "tpot_p50", "4 in flight", ">", 5.0, "%"),
        ("tpot_p50@4>+5%", "tpot_p50", "4 in flight", ">", 5.0, "%"),
        ("tpot_p50 @ 4 in flight > 5 %", "tpot_p50", "4 in flight", ">", 5.0, "%"),
        ("ttft.p95@2.5/s>5%", "ttft_p95", "2.5 requests/s", ">", 5.0, "%"),
        ("TTFT_p99>20ms", "ttft_p99", None, ">", 20.0, "ms"),
        ("output_tokens_per_s<-10%", "output_tokens_per_s", None, "<", -10.0, "%"),
        ("memory>0%", "memory", None, ">", 0.0, "%"),
        ("mean_kl>+20%", "mean_kl", None, ">", 20.0, "%"),
        ("top1_agreement<-0.5pt", "top1_agreement", None, "<", -0.5, "pt"),
    ],
)
def test_conditions_are_read(text: str, metric: str, at: str | None, op: str, change: float, unit: str) -> None:
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
        ("size_on_disk>=.5%", "METRIC OP CHANGE"),
        ("speed>1%", "unknown metric 'speed'; choose one of accuracy"),
        ("accuracy<-1", "say which"),
        ("accuracy<-1ms", "say which"),
        ("ttft_p50>5", "% or ms"),
        ("ttft_p50>5pt", "% or ms"),
        ("memory>5ms", "is given in %"),
        ("memory@4>5%", "not measured under a load"),
        ("accuracy>-1%", "two equal reports would fail"),
        ("ttft_p50>=0%", "two equal reports would fail"),
    ],
)
def test_other_conditions_are_refused(text: str, words: str) -> None:
    with pytest.raises(BenchError, match=r"--fail-if") as caught:
        parse_condition(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "before", "change", "met"),
    [
        ("accuracy<-1%", 0.90, -0.02, True),  # -2.2%
        ("accuracy<-1%", 0.90, -0.008, False),
        ("accuracy<-1pt", 0.90, 0.89 - 0.90, False),  # exactly the limit
        ("accuracy<=-1pt", 0.90, 0.89 - 0.90, True),
        ("accuracy<-1pt", 0.90, -0.011, True),
        ("ttft_p50>5%", 100.0, 0.05, False),
        ("ttft_p50>5%", 100.0, 0.051, True),
        ("ttft_p50>5ms", 200.0, 0.026, True),
        ("output_tokens_per_s<-10%", 100.0, -0.11, True),
        ("memory>5%", 0.0, math.inf, True),
        ("memory>5%", 0.0, 0.0, False),
    ],
)
def test_conditions_are_met_by_a_change(text: str, before: float, change: float, met: bool) -> None:
    assert parse_condition(text).met(before, change) is met


@pytest.mark.parametrize(
    ("value", "low", "high", "judgement"),
    [
        (0.08, 0.06, 0.10, "worse"),  # all of it past the limit
        (0.08, 0.01, 0.15, "worse"),  # past the limit, and beyond chance
        (0.08, -0.01, 0.17, "can't tell"),  # past the limit, maybe by chance
        (0.03, 0.01, 0.06, "can't tell"),  # beyond chance, maybe past the limit
        (0.03, 0.01, 0.045, "no worse"),  # beyond chance, not past the limit
        (0.0, -0.02, 0.02, "no worse"),
        (-0.5, -0.6, -0.4, "no worse"),  # the good direction
        (-0.01, -0.30, 0.20, "can't tell"),
        (0.5, None, None, "can't tell"),
        (0.0, None, None, "can't tell"),
        (0.08, 0.08, 0.08, "worse"),  # counted
        (0.05, 0.05, 0.05, "no worse"),
    ],
)
def test_a_condition_is_judged_with_the_interval(
    value: float, low: float | None, high: float | None, judgement: str
) -> None:
    row = Row(Metric("tpot_p50", "4 in flight"), Figure(10.0), Figure(10.0 * (1 + value)), Change(value, low, high))
    assert parse_condition("tpot.p50>+5%").judge(row) == judgement


def test_a_paired_tests_p_value_counts_too() -> None:
    row = Row(Metric("accuracy"), Figure(0.9), Figure(0.88), Change(-0.02, -0.04, -0.0001, "", 0.06))
    assert parse_condition("accuracy<-1pt").judge(row) == "can't tell"


# --- intervals of changes ---------------------------------------------------------------------------------------------


def test_an_interval_of_a_difference_covers_as_it_says() -> None:
    """Two estimates with 95% intervals of their own: the recovered one holds the true difference 95% of times."""
    rng = random.Random(3)
    hits = 0
    for _ in range(2000):
        a, b = rng.gauss(1.0, 0.3), rng.gauss(1.5, 0.2)
        value, low, high = _mover((a, a - 1.96 * 0.3, a + 1.96 * 0.3), (b, b - 1.96 * 0.2, b + 1.96 * 0.2))
        assert low <= value <= high
        hits += low <= 0.5 <= high
    assert 0.935 < hits / 2000 < 0.965


def test_a_ratios_interval_turns_round_with_the_reports() -> None:
    a, b = Figure(10.0, 9.0, 12.0), Figure(11.0, 10.5, 11.6)
    there, back = _between(a, b), _between(b, a)
    assert there and back and there.low is not None and back.low is not None and back.high is not None
    assert 1 + there.value == pytest.approx(1 / (1 + back.value))
    assert 1 + there.low == pytest.approx(1 / (1 + back.high))
    assert _between(a, a).value == 0  # type: ignore[union-attr]


def test_without_both_intervals_there_is_none() -> None:
    assert _between(Figure(10.0), Figure(11.0, 10.0, 12.0)) is None
    assert _between(Figure(10.0, 0.0, 12.0), Figure(11.0, 10.0, 12.0)) is None


def test_rounds_of_both_reports_give_an_interval() -> None:
    a = with_rounds(report(), "tpot", [20.0, 20.1, 19.9], 19.7, 20.3)
    slow = with_rounds(report(), "tpot", [24.0, 24.1, 23.9], 23.7, 24.3)
    noisy = with_rounds(report(), "tpot", [24.0, 34.0, 14.0], 10.0, 50.0)
    condition = [parse_condition("tpot.p50@4>+5%")]
    assert len(compare(*sides(a, slow), condition).regressions) == 1
    found = compare(*sides(a, noisy), condition)
    assert found.regressions == [] and len(found.undecided) == 1
    assert [gate.judgement for gate in compare(*sides(slow, a), condition).gates] == ["no worse"]


def test_old_reports_of_one_baseline_are_compared_through_it() -> None:
    kept = []
    for middle in (1.0, 1.5):
        found = report(speed={"candidate": middle})
        old = [
            r.model_copy(update={"ratio": middle, "low": middle * 0.98, "high": middle * 1.02})
            for r in found.speed_ratios
            if r.metric == "tpot"
        ]
        speed = [p.model_copy(update={"by_round": {}}) for p in found.speed]
        kept.append(found.model_copy(update={"speed_ratios": old, "speed": speed}))
    result = compare(*sides(*kept), [parse_condition("tpot.p50@4>+5%")])
    row = next(row for row in result.rows if str(row.metric) == "tpot_p50@4")
    assert row.change.basis == "through the same baseline" and row.change.value == pytest.approx(0.5)
    assert len(result.regressions) == 1
    other = kept[1].model_copy(
        update={"systems": kept[1].systems | {"baseline": system("baseline", quantization="another")}}
    )
    assert compare(*sides(kept[0], other), [parse_condition("tpot.p50@4>+5%")]).regressions == []


def test_two_days_of_one_machine_are_no_result() -> None:
    """The unchanged baseline came out better in 32 of 32 figures of speed when days were held against each other."""
    one, two = report(speed={"candidate": 0.5}), report(speed={"baseline": 0.7, "candidate": 0.35})
    for role in ROLES:
        found = compare(Side(one, role), Side(two, role))
        speed = [row for row in found.rows if row.metric.at]
        assert len(speed) > 20
        assert [str(row.metric) for row in speed if row.says in ("better", "worse")] == []
        told = [row for row in speed if row.change.low is not None]
        assert told and all(row.change.value == pytest.approx(0.0) for row in told)
    slower = report(speed={"baseline": 0.7, "candidate": 0.42})  # by a fifth, on the faster day
    found = compare(*sides(one, slower), [parse_condition("tpot.p50@4>+5%")])
    assert found.regressions and "(+20.0%" in found.regressions[0]
    assert "through the same baseline" in found.regressions[0]


def kept_rate(offered: float = 4.0, candidate: float = 1.0, grows: float = 0.0) -> Report:
    """Both under a rate; the candidate's answers take longer, and with ``grows`` longer and longer."""
    settings = CONFIG.replaced(concurrencies=(), rates=(offered,), rounds=4, requests=80)
    load = settings.loads[0]
    measured = Measurements()
    for role in ROLES:
        for round_ in range(4):
            slow = candidate if role == "candidate" else 1.0
            late = grows if role == "candidate" else 0.0
            traces = []
            for number in range(20):
                due = number / offered
                took = slow * (1.0 + 0.01 * round_) + late * due
                chunks = tuple(due + took * (0.2 + 0.2 * i) for i in range(5))
                traces.append(Trace(due, due, due + took, chunks, "x", 7, 5, "length", number=number))
            wall = max(trace.ended for trace in traces)
            measured.units[role, load.name, round_] = [(load, Stretch(Block(tuple(traces), wall), offered))]
    return build(Outcome(measured, {role: system(role) for role in ROLES}, []), settings, command="qvl bench")


def test_the_page_leads_with_five_lines() -> None:
    found = compare(*sides(report(), report(speed={"candidate": 1.2})))
    assert [str(row.metric) for row in compare_view.leading(found)] == [
        "accuracy",
        "tpot_p50@1",
        "ttft_p50@1",
        "output_tokens_per_s@4",
        "memory",
    ]
    page = compare_html.render([found])
    assert page.index("In five lines") < page.index("All figures") and "untold" not in page
    told, untold = compare_view.split(found)
    assert all(line.metric.name.endswith(("_p90", "_p95", "_p99")) for line in untold)
    assert len(told) + len(untold) == len(found.rows)
    assert f"{len(untold)} figures without an interval" in page


def test_a_rate_that_is_kept_has_no_ratio_of_throughput() -> None:
    """Wall time ends with the last answer: a server that takes longer to answer looked as if it answered fewer."""
    found = kept_rate(candidate=1.5)
    points = [found.point(role, "4 requests/s") for role in ROLES]
    assert [point and point.kept for point in points] == [True, True]
    assert points[1] and points[1].offered_per_s == 4.0 and points[1].achieved_per_s == pytest.approx(4.0, rel=0.02)
    assert {ratio.metric for ratio in found.speed_ratios} == {"ttft", "tpot", "itl", "e2e"}
    assert found.verdict.speed and "throughput" not in found.verdict.speed.lower()
    conditions = [parse_condition(f"{name}@4/s<-1%") for name in ("requests_per_s", "output_tokens_per_s")]
    gated = compare(Side(found, "baseline"), Side(found, "candidate"), conditions)
    assert [gate.judgement for gate in gated.gates] == ["no worse", "no worse"]
    for text in (html_file.render(found), markdown.render(found)):
        assert "rate kept" in text


def test_a_rate_that_is_not_kept_says_what_was_achieved() -> None:
    found = kept_rate(grows=0.5)  # half a second more each second: two thirds of the rate
    point = found.point("candidate", "4 requests/s")
    assert point and point.kept is False and point.achieved_per_s == pytest.approx(4.0 / 1.5)
    assert found.ratio("requests_per_s", "4 requests/s")
    assert any("4 requests/s offered, 2.67 achieved" in note for note in found.warnings)
    condition = [parse_condition("requests_per_s@4/s<-5%")]
    assert compare(Side(found, "baseline"), Side(found, "candidate"), condition).regressions
    assert compare(*sides(kept_rate(), found), condition).regressions  # against a report in which it was kept


# --- comparing --------------------------------------------------------------------------------------------------------


def test_every_metric_that_is_measured_can_be_a_condition() -> None:
    names = {metric.name for metric in figures(Side(report(), "candidate"))}
    assert {"accuracy", "accuracy.red", "ttft_p50", "tpot_p90", "itl_p99", "e2e_p50"} <= names
    assert {"output_tokens_per_s", "requests_per_s", "size_on_disk", "memory"} <= names
    for name in names:
        parse_condition(f"{name}<-5%")
        assert name in KNOWN or name.startswith("accuracy.")


def test_equal_reports_pass_every_condition() -> None:
    found = report()
    conditions = [parse_condition(f"{metric.name}<-0.001%") for metric in figures(Side(found, "candidate"))]
    result = compare(*sides(found, report()), conditions)
    assert result.regressions == [] and result.losses == []


def test_a_loss_is_a_regression_only_beyond_chance() -> None:
    condition = [parse_condition("accuracy<-1pt")]
    few = compare(*sides(report(), report({"candidate": {"red-1", "red-2"}})), condition)
    assert few.regressions == []
    assert few.undecided[0].startswith("accuracy<-1pt: accuracy went from 1 to 0.95 (-5.0 points, 95% interval")
    many = compare(*sides(report(), report({"candidate": {f"red-{i}" for i in range(12)}})), condition)
    assert many.regressions[0].startswith("accuracy<-1pt: accuracy went from 1 to 0.7")
    assert many.losses and "candidate" not in many.losses[0]


def test_sizes_are_exact() -> None:
    b = report(candidate=system("candidate", disk_bytes=401))
    found = compare(*sides(report(), b), [parse_condition("size_on_disk>0%")])
    assert len(found.regressions) == 1
    assert compare(*sides(report(), b), [parse_condition("size_on_disk>1%")]).regressions == []


def test_without_a_load_every_one_counts() -> None:
    a = with_rounds(report(), "tpot", [20.0, 20.0], 19.9, 20.1)
    b = with_rounds(report(), "tpot", [30.0, 30.0], 29.9, 30.1)
    found = compare(*sides(a, b), [parse_condition("tpot_p50>5%")])
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
    assert sorted(after.id for _, after in found.flips) == ["red-1", "red-2", "red-3"]


def test_clusters_are_counted_as_in_one_report() -> None:
    asked = about_images(8, each=5)
    lost = {q.id for q in asked if q.images == asked[0].images}
    found = compare(*sides(report(asked=asked), report({"candidate": lost}, asked=asked))).accuracy
    assert found is not None
    assert (found.clusters, found.difference.lost, found.difference.p_value) == (8, 5, 1.0)


def test_one_side_that_knows_the_clusters_is_enough() -> None:
    new = report(asked=about_images(8, each=5))
    assert new.accuracy is not None
    alone = [item.model_copy(update={"cluster": f"question {item.id}"}) for item in new.accuracy.items]
    old = new.model_copy(update={"accuracy": new.accuracy.model_copy(update={"items": alone})})
    for pair in ((old, new), (new, old)):
        found = compare(*sides(*pair)).accuracy
        assert found is not None and found.clusters == 8


def test_verdicts_go_by_the_margin_of_the_report_that_is_judged() -> None:
    fine = compare(*sides(report(margin=1.0), report(margin=20.0))).accuracy
    strict = compare(*sides(report(margin=20.0), report(margin=1.0))).accuracy
    assert fine is not None and strict is not None
    assert (fine.verdict, strict.verdict) == ("no worse", "can't tell")


def test_the_baseline_can_be_compared_with_the_candidate_of_one_report() -> None:
    both = report({"candidate": {f"red-{i}" for i in range(10)}})
    found = compare(Side(both, "baseline"), Side(both, "candidate"), [parse_condition("accuracy<-1pt")])
    assert found.regressions and found.accuracy is not None and found.accuracy.verdict == "worse"
    assert found.notes == []


def test_several_reports_are_compared_with_the_first() -> None:
    reports = [report(), report({"candidate": {"red-1"}}), report({"candidate": {f"red-{i}" for i in range(12)}})]
    found = compare_all([Side(r, "candidate", name) for r, name in zip(reports, "xyz", strict=True)])
    assert [(one.a.label, one.b.label) for one in found] == [("x", "y"), ("x", "z")]
    assert [len(one.flips) for one in found] == [1, 12]


# --- what can't be compared -------------------------------------------------------------------------------------------


def test_failed_reports_cannot_be_compared() -> None:
    bad = report(failure=Failure("timeout", "too slow"))
    if bad.status != "failed":
        bad = bad.model_copy(update={"status": "failed"})
    for pair in (sides(report(), bad), sides(bad, report())):
        with pytest.raises(UnmeasuredError, match="marked failed"):
            compare(*pair, anyway=True)


def test_partial_reports_are_compared_and_said_to_be() -> None:
    part = report().model_copy(update={"status": "partial", "unfinished": ["round 3"]})
    notes = compare(*sides(report(), part)).notes
    assert any("partial" in note and "round 3" in note for note in notes)


def test_other_questions_are_refused_unless_told() -> None:
    a, b = report(), report(per_task=10)
    with pytest.raises(BenchError, match=r"other questions \(40 and 20\).*--anyway"):
        compare(*sides(a, b))
    found = compare(*sides(a, b), anyway=True)
    assert found.accuracy is None and found.differences == ["other questions (40 and 20)"]
    # Means over other questions may differ for any reason: no interval, no regression.
    assert compare(*sides(a, b), [parse_condition("accuracy<-1pt")], anyway=True).regressions == []


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("environment", {"gpus": ["H100, 80 GiB, 550.1"]}, "measured on"),
        ("environment", {"cpu": "another"}, "and on another"),
        ("workload", {"image_sizes": ["1x1", "text"]}, "image sizes 56x56 and 1x1, text"),
        ("workload", {"images_per_request": "4"}, "images per request 1 and 4"),
        ("workload", {"output_tokens": "9"}, "output tokens 5 and 9"),
        ("workload", {"interleaved": False}, "interleaved True and False"),
        ("workload", {"answer_tokens": 1}, "answers of up to"),
        ("workload", {"questions_sha256": "0"}, "other questions"),
    ],
)
def test_what_differs_is_named_and_refused(part: str, changes: dict[str, Any], words: str) -> None:
    a = report()
    b = a.model_copy(update={part: getattr(a, part).model_copy(update=changes)})
    for pair in (sides(a, b), sides(b, a)):
        with pytest.raises(BenchError, match="can't be compared"):
            compare(*pair)
    with pytest.raises(BenchError) as caught:
        compare(*sides(a, b))
    assert words in str(caught.value)
    assert compare(*sides(a, b), anyway=True).differences


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("environment", {"versions": {"vllm": "9"}}, None),
        ("environment", {"commit": "abc"}, "other commits of qvl"),
        ("workload", {"seed": 7}, None),
        ("workload", {"requests": [1, 2]}, None),
        ("workload", {"prompt_tokens": "64"}, "does not say: prompt tokens"),
    ],
)
def test_what_does_not_matter_is_at_most_noted(part: str, changes: dict[str, Any], words: str | None) -> None:
    a = report()
    known = a.workload.model_copy(update={"prompt_tokens": None})
    a = a.model_copy(update={"workload": known})
    b = a.model_copy(update={part: getattr(a, part).model_copy(update=changes)})
    found = compare(*sides(a, b))
    assert found.differences == []
    assert words is None or any(words in note for note in found.notes)


def test_another_driver_is_software() -> None:
    a = report()
    one, two = (
        a.model_copy(update={"environment": a.environment.model_copy(update={"gpus": [f"H100, 80 GiB, {driver}"]})})
        for driver in ("550.1", "560.2")
    )
    found = compare(*sides(one, two))
    assert found.differences == [] and any("550.1 and 560.2" in note for note in found.notes)


def test_points_that_measured_the_client_are_left_out() -> None:
    a = report()
    bad = a.model_copy(update={"speed": [p.model_copy(update={"invalid": "the client was slow"}) for p in a.speed]})
    found = compare(*sides(a, bad))
    assert not any(row.metric.at for row in found.rows)
    assert any("measured the client" in note for note in found.notes)
    gated = compare(*sides(a, bad), [parse_condition("tpot.p50@4>5%"), parse_condition("accuracy<-1pt")])
    assert gated.unmeasured == ["tpot.p50@4>5%: could not be measured: awq, 4 in flight: the client was slow"]
    assert [gate.condition.metric for gate in gated.gates] == ["accuracy"]


def test_a_baseline_that_moved_is_told() -> None:
    found = compare(*sides(report(), report(speed={"baseline": 1.3, "candidate": 1.3})))
    assert any("the baseline, the same in both, moved by itself" in note and "+30.0%" in note for note in found.notes)
    assert not any("moved by itself" in note for note in compare(*sides(report(), report())).notes)


def test_what_was_not_measured_is_said() -> None:
    b = report(candidate=system("candidate", disk_bytes=None), asked=questions(1))
    with pytest.raises(BenchError, match="not measured for both"):
        compare(*sides(report(), b), [parse_condition("size_on_disk>1%")], anyway=True)
    for text in ("ttft_p50@16>1%", "accuracy.green<-1%", "mean_kl>1%"):
        with pytest.raises(BenchError, match="not measured for both"):
            compare(*sides(report(), report()), [parse_condition(text)])


# --- old schemas ------------------------------------------------------------------------------------------------------


def test_reports_of_the_first_schema_are_compared(tmp_path: Path) -> None:
    first = OLD_REPORTS / "accuracy-of-schema-1"
    for file in (RESULTS / "demo-cpu", OLD_REPORTS / "card-with-rates", first):
        found = compare(*sides(read(file), read(file)))
        assert found.rows and found.differences == [] and found.regressions == []
    old = tmp_path / "report.json"
    old.write_text(json.dumps(json.loads((first / "report.json").read_text()) | {"schema_version": 1}))
    assert compare(*sides(read(old), read(first))).accuracy is not None
    assert first_version  # what the factory makes of it is tested with the reader


# --- how it is shown --------------------------------------------------------------------------------------------------


def shown(*reports: Report, conditions: tuple[str, ...] = ()) -> list[Comparison]:
    named = [Side(r, "candidate", f"week {i}") for i, r in enumerate(reports)]
    return compare_all(named, [parse_condition(text) for text in conditions])


HOSTILE = "a|b <script>alert(1)</script> `x`\nnew"


def hostile() -> Report:
    """A candidate whose wrong answers hold markup."""
    found = report({"candidate": {f"red-{i}" for i in range(12)}})
    assert found.accuracy
    items = [
        item.model_copy(update={"candidate": item.candidate.model_copy(update={"text": HOSTILE})})
        if item.flip
        else item
        for item in found.accuracy.items
    ]
    return found.model_copy(update={"accuracy": found.accuracy.model_copy(update={"items": items})})


def test_markdown_holds_verdict_figures_and_flips_and_no_markup_of_answers() -> None:
    text = compare_markdown.render(shown(report(), hostile(), conditions=("accuracy<-1pt",)))
    assert text.startswith("**worse**: week 1 scores 70.0%, week 0 100.0%, on 40 questions")
    assert "> **regression**: accuracy<-1pt" in text
    assert "12 answers changed between right and wrong" in text
    assert "<script>" not in text and "&lt;script>" in text
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1  # no answer adds a cell


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = compare_html.render(shown(report(), hostile(), report(), conditions=("accuracy<-1pt", "tpot.p50>+5%")))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://127.0.0.1", "") and "https://" not in page and "src=" not in page
    assert page.count('class="card flip') == 12
    for word in ("worse", "no worse", "can&#39;t tell", "What was compared", "week 2"):
        assert word in page


def test_every_figure_is_in_every_format() -> None:
    from rich.console import Console

    found = shown(report(), report(speed={"candidate": 1.3}))
    console = Console(width=200, record=True, file=io.StringIO())
    compare_terminal.show(found, console, every=True)
    texts = [console.export_text(), compare_html.render(found)]
    rows = [row for row in found[0].rows if not row.metric.is_accuracy]
    assert len(rows) > 20
    for row in rows:
        value = compare_view.figure(row.metric, row.after.value)
        for text in texts:
            assert value in text and compare_view.change(row)[0] in text, row.metric


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change(0.1, 0.05, 0.2), "worse"),
        (Change(-0.1, -0.2, -0.05), "better"),
        (Change(0.1, -0.05, 0.2), "can’t tell"),
        (Change(0.1), "no interval"),
        (Change(0.0, 0.0, 0.0), "same"),
    ],
)
def test_a_change_is_put_in_a_word(change: Change, said: str) -> None:
    assert compare_view.verdict(Row(Metric("tpot_p50", "4 in flight"), Figure(1.0), Figure(1.1), change))[1] == said
