from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats

from bench.judge import stats, verdict
from bench.load.client import Failure, Trace
from bench.load.loops import Block
from bench.machine.server_metrics import ServerPoint
from bench.questions import scoring
from bench.questions.tasks import Question
from bench.report import headlines, speed, words
from bench.report.build import build
from bench.report.render import html_file, markdown
from bench.report.schema import Judgement, Load, Report, SpeedFigure, SpeedRatio
from bench.report.view.whole import view
from bench.roles import ROLES, Role
from bench.run.config import BenchConfig
from bench.run.measured import Measurements, Stretch
from bench.run.session import Outcome
from tests.support.factory import CONFIG, about_images, questions, report, system, trace


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


def test_questions_on_one_image_are_one_piece_of_evidence() -> None:
    asked = about_images(8, each=5)
    lost = {q.id for q in asked if q.images == asked[0].images}  # all five on the first image
    together = report({"candidate": lost}, asked=asked).accuracy
    alone = report({"candidate": lost}, asked=[replace(q, images=()) for q in asked]).accuracy
    assert together is not None and alone is not None
    a, b = together.overall, alone.overall
    assert (a.n, a.clusters, a.difference.lost) == (40, 8, 5) and (b.clusters, b.difference.lost) == (40, 5)
    assert a.difference.p_value == 1.0 and b.difference.p_value == stats.mcnemar(5, 0)
    assert a.difference.design_effect > 4 and b.difference.design_effect == 1.0
    assert a.difference.low < b.difference.low and a.difference.high > b.difference.high
    assert {item.cluster for item in together.items} == {q.images[0].sha256 for q in asked}


def test_rows_say_what_the_statistics_say() -> None:
    asked = questions(60, tasks=("red", "blue", "green"))
    wrong: dict[Role, set[str]] = {"baseline": ids("blue", 1), "candidate": ids("red", *range(9)) | ids("blue", 2)}
    found = report(wrong, asked=asked, margin=2.0).accuracy
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


def test_flipped_items_have_their_image_and_no_others_do() -> None:
    asked = about_images(6, each=2)
    found = report({"baseline": {"scans-1"}, "candidate": {"scans-0", "scans-6", "scans-3"}}, asked=asked).accuracy
    assert found is not None
    assert [(item.id, item.flip) for item in found.flipped] == [
        ("scans-0", "lost"),
        ("scans-1", "won"),
        ("scans-3", "lost"),
        ("scans-6", "lost"),
    ]
    assert set(found.thumbnails) == {asked[i].images[0].sha256 for i in (0, 1, 3)}  # 0 and 6 share theirs
    assert all(item.images == [q.images[0].sha256] for item, q in zip(found.items, asked, strict=True))


def test_an_image_that_is_gone_loses_no_report(tmp_path: Path) -> None:
    file = tmp_path / "gone.png"
    asked = [replace(q, images=(replace(q.images[0], path=file, data=None),)) for q in about_images(1, each=2)]
    found = report({"candidate": {"scans-0"}}, asked=asked)
    assert found.accuracy is not None and found.accuracy.thumbnails == {}
    assert any("1 images of answers that flipped were gone" in warning for warning in found.warnings)


def test_verdicts_are_said_in_words() -> None:
    assert "no loss is shown, and one of more than 1 point is not ruled out" in report().verdict.sentence
    assert "About 1,200 questions like these would tell" in report().verdict.sentence
    assert report().verdict.accuracy == "can't tell"
    fine = report(per_task=400)
    assert (fine.verdict.accuracy, "more than 1 point is ruled out" in fine.verdict.sentence) == ("no worse", True)
    bad = report({"candidate": ids("red", *range(10))})
    assert (bad.verdict.accuracy, "a loss beyond chance" in bad.verdict.sentence) == ("worse", True)
    assert "a smaller one is there" in report(ids_lost(8), per_task=2000, margin=5.0).verdict.sentence
    most = [*questions(20, tasks=["red"]), *questions(600, tasks=["blue"])]
    mixed = report(ids_lost(10), asked=most, margin=5.0)
    assert (mixed.verdict.accuracy, "Worse by itself: red" in mixed.verdict.sentence) == ("no worse", True)
    silent = report(asked=[])
    assert (silent.verdict.accuracy, silent.verdict.sentence) == (None, "Accuracy was not measured.")


def test_speed_points_pool_their_rounds() -> None:
    found = report(speed={"candidate": 0.5})
    point = found.point("baseline", "4 in flight")
    assert point is not None and point.ttft_ms and point.tpot_ms and point.itl_ms
    assert (point.requests, point.completed, point.rounds) == (24, 24, 2)
    assert point.ttft_ms.p50 == pytest.approx(105.5)
    assert point.tpot_ms.p50 == pytest.approx(20.0)
    assert point.itl_ms.n == 24 * 4
    assert point.output_tokens_per_s == pytest.approx(24 * 5 / 2.0)
    assert point.requests_per_s == pytest.approx(12.0)
    ratio = found.ratio("ttft", "1 in flight")
    assert ratio and ratio.ratio == pytest.approx(0.5)
    assert ratio.low == pytest.approx(0.5) == ratio.high  # the rounds are equal
    more = found.ratio("requests_per_s", "4 in flight")
    assert more and more.ratio == pytest.approx(2.0) and len(more.rounds) == 2


def test_latencies_have_their_percentiles_and_a_curve() -> None:
    point = report().speed[0]
    assert point.ttft_ms and point.ttft_ms.p95
    assert point.ttft_ms.p50 <= point.ttft_ms.p90 <= point.ttft_ms.p95 <= point.ttft_ms.p99
    assert len(point.ttft_ms.cdf) == 101
    assert point.ttft_ms.cdf[50] == pytest.approx(point.ttft_ms.p50, rel=1e-4)
    assert point.ttft_ms.cdf[95] == pytest.approx(point.ttft_ms.p95, rel=1e-4)
    assert point.itl_ms and point.itl_ms.cdf == []  # not drawn


def stretch(scale: float, count: int = 4, **more: Any) -> Stretch:
    traces = tuple(trace(ttft=0.1 * scale, gap=0.02 * scale) for _ in range(count))
    return Stretch(Block(traces, scale), **more)


def measured(
    config: BenchConfig, scales: dict[Role, list[float]], load: Load | None = None, **more: Any
) -> Measurements:
    found = Measurements()
    load = load or config.loads[0]
    for role, rounds in scales.items():
        for number, scale in enumerate(rounds):
            found.units[role, load.name, number] = [(load, stretch(scale, **more))]
    return found


def built(found: Measurements, config: BenchConfig, asked: Sequence[Question] = (), **more: Any) -> Report:
    both = {role: system(role) for role in ROLES}
    return build(Outcome(found, both, asked, duration_s=1.0, **more), config, command="qvl bench")


def test_what_slows_both_in_a_round_is_not_in_the_ratio() -> None:
    config = CONFIG.replaced(concurrencies=(1,), rounds=3)
    found = built(measured(config, {"baseline": [1.0, 2.0, 4.0], "candidate": [0.8, 1.6, 3.2]}), config)
    ratio = found.ratio("tpot", "1 in flight")
    assert ratio and ratio.ratio == pytest.approx(0.8) and ratio.low == pytest.approx(0.8) == ratio.high
    estimate = found.speed[0].by_round["tpot"]
    assert estimate.value == pytest.approx(40.0) and estimate.rounds == pytest.approx([20.0, 40.0, 80.0])
    assert estimate.low and estimate.high and estimate.low < 20.0 and estimate.high > 80.0


def test_intervals_over_rounds_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    config = CONFIG.replaced(concurrencies=(1,), rounds=3)
    hits, tries = 0, 200
    for _ in range(tries):
        rounds: dict[Role, list[float]] = {
            "baseline": list(np.exp(rng.normal(0.0, 0.1, 3))),
            "candidate": list(0.9 * np.exp(rng.normal(0.0, 0.1, 3))),
        }
        raw = measured(config, rounds, count=1)
        ratio = speed.ratios(raw, speed.points(raw, config), config)[1]
        assert ratio.metric == "tpot" and ratio.low is not None and ratio.high is not None
        hits += ratio.low <= 0.9 <= ratio.high
    assert 0.90 <= hits / tries <= 0.99


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ([0.74, 0.76, 0.75], "Time per token is shorter (×0.75, 95%: 0.73–0.78) at 1 in flight, throughput"),
        ([1.5, 1.4, 1.45], "longer (×1.45"),
        ([0.7, 0.8, 0.75], "not told apart (×0.75, 95%: 0.63–0.88)"),  # p is 2% by itself, and 5.4% of three
        ([0.9, 1.1, 1.0], "Time per token is not told apart (×1.00"),
    ],
)
def test_speed_is_judged_in_words_by_its_interval(scales: list[float], said: str) -> None:
    config = CONFIG.replaced(concurrencies=(1,), rounds=3)
    found = built(measured(config, {"baseline": [1.0, 1.0, 1.0], "candidate": scales}), config)
    assert found.verdict.speed and said in found.verdict.speed
    assert ("lower" in found.verdict.speed) == ("longer" in said)
    for text in (html_file.render(found), markdown.render(found)):
        assert said in text


def test_a_headline_is_beyond_chance_among_the_others() -> None:
    config = CONFIG.replaced(concurrencies=(1,), rounds=3)
    found = built(measured(config, {"baseline": [1.0, 1.0, 1.0], "candidate": [0.7, 0.8, 0.75]}), config)
    chosen = [ratio for ratio in found.speed_ratios if ratio.headline]
    assert [(ratio.metric, ratio.load) for ratio in chosen] == [
        ("ttft", "1 in flight"),
        ("tpot", "1 in flight"),
        ("output_tokens_per_s", "1 in flight"),
    ]
    for ratio in chosen:
        assert ratio.low is not None and ratio.high is not None and ratio.p_value and ratio.p_adjusted
        assert not ratio.low <= 1.0 <= ratio.high and ratio.p_value < 0.05  # by itself
        assert ratio.p_adjusted == pytest.approx(3 * ratio.p_value) and not ratio.beyond_chance
    assert all(ratio.p_adjusted is None for ratio in found.speed_ratios if not ratio.headline)


@pytest.mark.parametrize("rounds", [[0.9, 1.0, 1.05], [0.97, 0.98, 0.99, 0.96], [1.02, 1.05, 0.99, 1.04, 1.03]])
def test_p_is_below_5_percent_where_the_interval_leaves_out_1(rounds: list[float]) -> None:
    estimate, p = speed._estimate(rounds), headlines.p_value(rounds)
    assert estimate and estimate.low and estimate.high and p is not None
    assert (p < 0.05) == (not estimate.low <= 1.0 <= estimate.high)
    assert p == pytest.approx(scipy.stats.ttest_1samp(np.log(rounds), 0.0).pvalue)


def test_a_burst_is_marked_and_no_headline() -> None:
    """128 in flight for a few seconds were one request each."""
    config = CONFIG.replaced(concurrencies=(1, 8), rounds=3)
    found = measured(config, {"baseline": [1.0, 1.1, 1.0], "candidate": [0.5, 0.5, 0.5]})
    for role in ROLES:
        for number in range(3):
            found.units[role, "8 in flight", number] = [(config.loads[1], stretch(1.0, count=23))]
    out = built(found, config)
    point = out.point("candidate", "8 in flight")
    assert point and point.burst and words.marks(point) == "burst"
    assert any("candidate, 8 in flight: a burst, 2.9 requests a round for each in flight" in w for w in out.warnings)
    assert {ratio.load for ratio in out.speed_ratios if ratio.headline} == {"1 in flight"}
    for role in ROLES:
        for number in range(3):
            found.units[role, "8 in flight", number] = [(config.loads[1], stretch(1.0, count=24))]
    out = built(found, config)
    assert not any(point.burst for point in out.speed)
    assert {ratio.load for ratio in out.speed_ratios if ratio.headline} == {"1 in flight", "8 in flight"}


def waves(in_flight: int, took_s: float, answers: int) -> Block:
    """A closed loop on a server that takes as long for each; the last wave is cut."""
    traces = []
    for number in range(answers):
        due = took_s * (number // in_flight)
        took = took_s * (1.0 + 0.5 * (number == answers - 1))
        chunks = tuple(due + took * (i + 1) / 5 for i in range(5))
        traces.append(Trace(due, due, due + took, chunks, "x", 7, 5, "length", number=number))
    return Block(tuple(traces), max(trace.ended for trace in traces))


def test_throughput_is_that_of_a_full_server_and_one_figure_everywhere() -> None:
    config = CONFIG.replaced(concurrencies=(4,), rounds=2)
    found = Measurements()
    for role, took in (("baseline", 1.0), ("candidate", 0.8)):
        for number in range(2):
            found.units[role, "4 in flight", number] = [(config.loads[0], Stretch(waves(4, took, 13)))]
    out = built(found, config)
    point = out.point("baseline", "4 in flight")
    assert point and point.by_round["steady_output_tokens_per_s"].value == pytest.approx(20.0, rel=0.001)
    assert point.output_tokens_per_s and point.output_tokens_per_s < 15.0  # 65 tokens in 4.5 s: the end is not full
    ratio = out.ratio("steady_output_tokens_per_s", "4 in flight")
    assert ratio and ratio.headline and ratio.ratio == pytest.approx(1.25)
    shown = view(out)
    card = next(card for card in shown.cards if card.name == "Output tokens/s")
    assert card.detail.startswith("25.0 against 20.0, 4 in flight")
    assert [row.tokens_per_s for row in shown.speed] == ["20.0", "25.0"]
    for text in (html_file.render(out), markdown.render(out)):
        assert "14.4" not in text


def test_latencies_of_a_mixture_are_told_by_shape_and_paired_by_request() -> None:
    """Texts and images in turn: the median of all is now the one, now the other."""
    rng = np.random.default_rng(1)
    config = CONFIG.replaced(concurrencies=(1,), rounds=8, image_sizes="text,448x448")
    load = config.loads[0]
    found = Measurements()
    for number in range(8):
        for role, factor in (("baseline", 1.0), ("candidate", 0.9)):
            traces = []
            for request in range(13 + number % 2):  # odd numbers: the median falls to either side
                shape = ("448x448", "text")[(request + number) % 2]
                ttft = factor * (0.3 if shape == "448x448" else 0.02) * float(np.exp(rng.normal(0.0, 0.02)))
                traces.append(replace(trace(ttft=ttft, gap=0.02 * factor), number=request, shape=shape))
            found.units[role, load.name, number] = [(load, Stretch(Block(tuple(traces), 1.0)))]
    out = built(found, config)
    ratio = out.ratio("ttft", load.name)
    assert ratio and ratio.low and ratio.high and ratio.low > 0.87 and ratio.high < 0.93
    point = out.point("baseline", load.name)
    assert point and list(point.by_shape) == ["448x448", "text"]
    assert point.by_shape["448x448"]["ttft"].value == pytest.approx(300, rel=0.05)
    assert point.by_shape["text"]["ttft"].value == pytest.approx(20, rel=0.05)
    of_text = out.ratio("ttft", load.name, "text")
    assert of_text and of_text.ratio == pytest.approx(0.9, rel=0.02)
    assert {r.metric for r in out.speed_ratios if r.shape} == {"ttft", "tpot", "itl", "e2e"}
    for text in (html_file.render(out), markdown.render(out)):
        assert "1 in flight, text" in text


def test_chunks_that_are_not_tokens_are_said() -> None:
    config = CONFIG.replaced(concurrencies=(1,), output_tokens="20")
    load = config.loads[0]
    found = Measurements()
    packed = Trace(0.0, 0.0, 0.5, (0.1, 0.2, 0.3, 0.4, 0.5), "x", 7, 20)
    counted = replace(packed, counts=(1, 6, 11, 16, 20))
    for role, one in (("baseline", packed), ("candidate", counted)):
        for number in range(2):
            found.units[role, load.name, number] = [(load, Stretch(Block((one,) * 4, 1.0)))]
    out = built(found, config)
    notes = [note for note in out.warnings if "chunks are not tokens" in note]
    assert len(notes) == 2 and "4.0 tokens a chunk" in notes[0]
    assert "spread evenly" in notes[0] and "counted chunk by chunk" in notes[1]
    before, after = (out.point(role, load.name) for role in ROLES)
    assert before and before.tpot_ms and before.itl_ms and after and after.tpot_ms and after.itl_ms
    assert before.tpot_ms.p50 == pytest.approx(400 / 16) and before.itl_ms.p50 == pytest.approx(25.0)
    assert after.tpot_ms.p50 == pytest.approx(400 / 19) and after.itl_ms.mean == pytest.approx(400 / 19)


def test_a_busy_servers_retries_are_shown() -> None:
    config = CONFIG.replaced(concurrencies=(1,))
    found = measured(config, {"baseline": [1.0], "candidate": [1.0]})
    load = config.loads[0]
    twice = replace(trace(), retries=2)
    found.units["candidate", load.name, 0] = [(load, Stretch(Block((*stretch(1.0).block.traces, twice), 1.0)))]
    out = built(found, config)
    point = out.point("candidate", load.name)
    assert point and point.retries == 2 and "2 retries" in words.marks(point)
    assert any("2 times a request was refused and sent again" in note for note in out.warnings)


def test_no_percentile_of_fewer_requests_than_it_takes() -> None:
    config = CONFIG.replaced(concurrencies=(1,))
    few = view(built(measured(config, {"baseline": [1.0], "candidate": [1.0]}, count=9), config)).speed[0].latencies[0]
    many = view(built(measured(config, {"baseline": [1.0] * 2, "candidate": [1.0]}, count=50), config)).speed[0]
    assert few and (few.p90, few.p95, few.p99) == ("", "", "")
    assert many.latencies[0] and all((many.latencies[0].p90, many.latencies[0].p95, many.latencies[0].p99))


def test_one_round_has_no_interval() -> None:
    config = CONFIG.replaced(concurrencies=(1,), rounds=1)
    found = built(measured(config, {"baseline": [1.0], "candidate": [0.8]}), config)
    ratio = found.ratio("tpot", "1 in flight")
    assert ratio and (ratio.low, ratio.high) == (None, None)
    assert "one round: speed has no intervals" in found.warnings
    assert "–" in html_file.render(found)


def test_goodput_counts_requests_that_met_every_objective() -> None:
    config = CONFIG.replaced(concurrencies=(1,), slos="ttft=150ms,tpot=30ms")
    found = built(measured(config, {"baseline": [1.0, 1.0], "candidate": [1.0, 2.0]}), config)
    before, after = (found.point(role, "1 in flight") for role in ("baseline", "candidate"))
    assert before and after and before.goodput and after.goodput
    assert (before.goodput.share, before.goodput.per_s) == (1.0, 4.0)
    assert after.goodput.share == 0.5
    assert after.goodput.per_s == pytest.approx(4 / 3)  # the second round took twice as long
    assert found.workload.slos == ["ttft=150ms", "tpot=30ms"]


def test_failures_within_bounds_are_counted_by_kind_and_never_timed() -> None:
    config = CONFIG.replaced(concurrencies=(1,))
    found = measured(config, {"baseline": [1.0], "candidate": [1.0]})
    load = config.loads[0]
    bad = Trace(0.0, 0.0, 99.0, failure=Failure("http", "HTTP 429", 429))
    found.units["candidate", load.name, 0] = [(load, Stretch(Block((*stretch(1.0, 30).block.traces, bad), 1.0)))]
    out = built(found, config)
    point = out.point("candidate", "1 in flight")
    assert point and point.e2e_ms and out.status == "ok"
    assert (point.requests, point.completed, point.errors) == (31, 30, {"http 429": 1})
    assert point.e2e_ms.p99 < 1000 and point.requests_per_s == 30
    assert any("1 of 31 requests failed (1 http 429)" in warning for warning in out.warnings)


def test_a_point_that_measures_the_client_is_invalid_and_compared_with_nothing() -> None:
    config = CONFIG.replaced(concurrencies=(1,))
    found = measured(config, {"baseline": [1.0, 1.0], "candidate": [1.0, 1.0]})
    load = config.loads[0]
    late = tuple(replace(t, started=t.started + 0.02) for t in stretch(1.0).block.traces)
    found.units["candidate", load.name, 1] = [(load, Stretch(Block(late, 1.0)))]
    found.units["candidate", load.name, 0] = [(load, Stretch(Block(late, 1.0)))]
    out = built(found, config)
    point = out.point("candidate", "1 in flight")
    assert point and point.invalid and "20.0 ms late (p50)" in point.invalid
    assert out.speed_ratios == []
    assert any("candidate, 1 in flight: invalid" in warning for warning in out.warnings)
    for text in (html_file.render(out), markdown.render(out)):
        assert "invalid" in text


def test_rates_of_a_sweep_are_not_compared_for_each_system_has_its_own() -> None:
    config = CONFIG.replaced(concurrencies=(), sweep=True, sweep_rates=1)
    load = Load(kind="rate", name="sweep: 95% of saturation", arrivals="poisson", share=0.95)
    found = Measurements()
    rates: dict[Role, float] = {"baseline": 3.0, "candidate": 5.0}
    for role, rate in rates.items():
        for number in range(2):
            found.units[role, "sweep", number] = [(load, stretch(1.0, offered_per_s=rate + number))]
    out = built(found, config)
    assert [(point.load.name, point.offered_per_s) for point in out.speed] == [(load.name, 3.5), (load.name, 5.5)]
    assert out.speed_ratios == []


def test_what_the_server_counted_is_added_up_over_the_rounds() -> None:
    config = CONFIG.replaced(concurrencies=(1,))
    load = config.loads[0]
    found = measured(config, {"baseline": [1.0, 1.0], "candidate": [1.0, 1.0]})
    for number, (hits, queue, ended) in enumerate([(10, 0.002, 1), (30, 0.006, 3)]):
        seen = ServerPoint(100, hits, 4, 1, number, 100, 20, ended, queue, 50, 800)
        found.units["candidate", load.name, number] = [(load, stretch(1.0, server=seen, joules=6.0))]
    out = built(found, config)
    point, other = out.point("candidate", load.name), out.point("baseline", load.name)
    assert point and other and point.server and other.server is None
    assert (point.server.prefix_cache_share, point.server.image_cache_share) == (0.2, 0.25)
    assert (point.server.preemptions, point.server.finished) == (1, 4)
    assert point.server.queue_mean_ms == pytest.approx(5.0)
    assert point.energy_j_per_token == pytest.approx(12.0 / 40) and other.energy_j_per_token is None
    assert any("25% of the images in its cache" in warning for warning in out.warnings)
    # What requests share on purpose a cache is to have.
    shared = built(found, config.replaced(shared_prefix=500))
    assert not any("in its cache" in warning for warning in shared.warnings)
    assert shared.point("candidate", load.name) == point


def test_a_drafts_guesses_are_told() -> None:
    config = CONFIG.replaced(concurrencies=(1,))
    load = config.loads[0]
    found = measured(config, {"baseline": [1.0, 1.0], "candidate": [1.0, 1.0]})
    for number in range(2):
        for role, guesses in (("baseline", (None, None, None)), ("candidate", (20, 60, 30 * number))):
            seen = ServerPoint(0, 0, 0, 0, 0, 100, 20, 1, None, 50, 800, *guesses)
            found.units[role, load.name, number] = [(load, stretch(1.0, server=seen))]  # type: ignore[index]
    out = built(found, config)
    point, other = out.point("candidate", load.name), out.point("baseline", load.name)
    assert point and other and point.server and other.server
    assert (point.server.accepted_share, point.server.tokens_per_step) == (0.25, 1.75)
    assert other.server.accepted_share is other.server.tokens_per_step is None
    assert "25.0%, 1.75 a step" in html_file.render(out) and "Guessed tokens taken" in html_file.render(out)


def test_an_interrupted_run_keeps_what_it_has_and_judges_nothing_over_all() -> None:
    config = CONFIG.replaced(concurrencies=(1,), rounds=2)
    asked = questions(10)
    found = measured(config, {"baseline": [1.0, 1.0], "candidate": [0.8]})
    found.answers = {
        "baseline": {q.id: trace("yes") for q in asked},
        "candidate": {q.id: trace("yes") for q in asked[:12]},
    }
    out = built(found, config, asked, interrupted=True)
    assert out.status == "partial" and out.verdict.accuracy is None
    assert out.unfinished == ["8 of 20 questions to the candidate", "1 of 2 blocks of load on the candidate"]
    assert out.accuracy and out.accuracy.overall.n == 12
    assert out.ratio("tpot", "1 in flight")
    assert "interrupted and is not complete: 8 of 20 questions" in out.verdict.sentence
    page = html_file.render(out)
    assert page.index("Not complete") < page.index("<h2")


def test_a_server_that_counts_no_tokens_gets_no_token_metrics() -> None:
    found = report(counted=False)
    point = found.point("candidate", "1 in flight")
    assert point is not None
    assert point.tpot_ms is None and point.output_tokens_per_s is None and point.uncounted == 8
    assert point.itl_ms is not None
    assert any("no token counts" in warning for warning in found.warnings)


def test_unequal_lengths_are_doubted() -> None:
    longer = CONFIG.replaced(output_tokens="9")  # the traces have five
    assert any("instead of 9" in warning for warning in report(settings=longer).warnings)
    assert not any("instead of" in warning for warning in report().warnings)
    assert not any("instead of" in w for w in report(settings=CONFIG.replaced(output_tokens="2-9")).warnings)


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


def test_the_throughput_that_is_quoted_is_that_of_a_full_server() -> None:
    def ratio(load: str, metric: SpeedFigure = "output_tokens_per_s") -> SpeedRatio:
        return SpeedRatio(metric=metric, load=load, ratio=1.0, low=None, high=None)

    closed, rates = [ratio("1 in flight"), ratio("128 in flight")], [ratio("4 requests/s"), ratio("12 requests/s")]
    full = [ratio("sweep: one at a time"), ratio("sweep: saturation")]
    assert headlines.throughput([]) is None
    assert headlines.throughput(rates) is rates[1]
    assert headlines.throughput([*closed, *rates]) is closed[1]
    assert headlines.throughput([*closed, *rates, *full]) is full[1]
    fallback = [ratio("1 in flight", "requests_per_s"), ratio("4 requests/s", "tpot")]
    assert headlines.throughput(fallback) is fallback[0]
