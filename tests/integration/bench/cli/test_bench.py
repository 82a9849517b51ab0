from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet  # type: ignore[import-untyped]
import pytest

from bench.report.render.json_file import render
from bench.report.schema import Report
from tests.support.factory import first_version, questions, report
from tests.support.fake_server import Behaviour, FakeServer, serving
from toolkit import cli

FAST = [
    *("--fidelity", "0"),
    *("--concurrency", "1,2", "--requests", "4", "--rounds", "2", "--output-tokens", "4"),
    *("--image-sizes", "56x56", "--timeout", "5"),
]


def qvl(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run `qvl` as a user does and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["qvl", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def bench(monkeypatch: pytest.MonkeyPatch, a: FakeServer, b: FakeServer, tmp_path: Path, *more: str) -> int:
    file = tmp_path / "t.jsonl"
    if not file.exists():
        lines = [{"id": f"{i}", "task": "t", "images": [], "question": f"{i}", "answers": ["x"]} for i in range(8)]
        file.write_text("\n".join(map(json.dumps, lines)))
    common = ["--out", str(tmp_path / "out"), "--tasks", str(file), *FAST]
    return qvl(monkeypatch, "bench", "--baseline", a.url, "--candidate", b.url, *common, *more)


def says(text: str) -> Behaviour:
    return Behaviour(text=lambda body: None if body.get("ignore_eos") else text)


def read(tmp_path: Path) -> Report:
    return Report.model_validate_json((tmp_path / "out" / "report.json").read_text())


def test_bench_writes_a_report_and_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says("x")) as a, serving(says("y")) as b:
        assert bench(monkeypatch, a, b, tmp_path, "--api-key", "secret-key") == 0
    found = read(tmp_path)
    assert found.status == "ok"
    assert found.accuracy is not None and found.accuracy.overall.difference.lost == 8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    assert "secret-key" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    printed = capsys.readouterr().out
    assert "−100.0" in printed and "report.html" in printed


def test_every_request_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(says("x")) as a, serving(says("x")) as b:
        assert bench(monkeypatch, a, b, tmp_path, "--export", "csv,parquet", "--price", "3.6") == 0
    with (tmp_path / "out" / "requests.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = read(tmp_path)
    assert len(lines) == sum(point.requests for point in found.speed)
    table = parquet.read_table(tmp_path / "out" / "requests.parquet").to_pylist()
    assert len(table) == len(lines) and list(table[0]) == list(lines[0])
    assert {row["system"] for row in table} == {"baseline", "candidate"} and {row["failure"] for row in table} == {None}
    for row, line in zip(table, lines, strict=True):
        assert row["ttft_ms"] == float(line["ttft_ms"]) <= row["e2e_ms"] and row["output_tokens"] == 4
    assert "Cost of a million output tokens" in (tmp_path / "out" / "report.html").read_text()


def test_two_models_of_one_server_and_a_key_for_each_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Behaviour(model="fp16", others=("awq",), api_key="one")) as a:
        more = ["--baseline-key", "one", "--candidate-key", "one", "--api-key", "none", "--candidate-model", "awq"]
        assert bench(monkeypatch, a, a, tmp_path, *more) == 0
        assert {body["model"] for body in a.bodies} == {"fp16", "awq"}
    found = read(tmp_path)
    assert [found.systems[role].label for role in ("baseline", "candidate")] == ["fp16", "awq"]
    assert any("models of one server" in note for note in found.warnings)
    assert "--baseline-key ***" in found.environment.command or "one" not in found.environment.command.split()
    with serving(Behaviour(model="fp16")) as a:
        assert bench(monkeypatch, a, a, tmp_path, "--force", "--candidate-model", "awq") == 2


def test_bench_gates_the_candidate_against_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says("x")) as a, serving(says("y")) as b:
        assert bench(monkeypatch, a, b, tmp_path, "--fail-if", "accuracy<-1pt", "--fail-if", "accuracy.t<-1%") == 1
        assert "accuracy<-1pt: accuracy went from 1 to 0" in capsys.readouterr().err
        assert bench(monkeypatch, b, a, tmp_path, "--force", "--fail-if", "accuracy<-1pt") == 0
    assert read(tmp_path).status == "ok"


def test_failed_requests_mark_the_report_and_exit_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says("x")) as a, serving(Behaviour(fail_after=5)) as b:
        assert bench(monkeypatch, a, b, tmp_path) == 3
    found = read(tmp_path)
    assert found.status == "failed" and found.accuracy is None and found.speed == []
    error = capsys.readouterr().err
    assert "HTTP 500: out of luck" in error and "report.json" in error and "Traceback" not in error
    assert qvl(monkeypatch, "compare", tmp_path / "out", tmp_path / "out") == 3
    assert "marked failed" in capsys.readouterr().err


def test_noise_breakage_and_mistakes_have_other_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = report(speed={"candidate": 1.0})
    slow = report(speed={"candidate": 1.5})
    broken = good.model_copy(update={"speed": [p.model_copy(update={"invalid": "it lagged"}) for p in good.speed]})
    for name, made in (("good", good), ("slow", slow), ("broken", broken)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(render(made))

    def compared(one: str, two: str, *conditions: str) -> int:
        given = [part for condition in conditions for part in ("--fail-if", condition)]
        return qvl(monkeypatch, "compare", tmp_path / one, tmp_path / two, *given)

    assert compared("good", "good", "tpot.p50@4>+5%") == 0
    assert compared("good", "slow", "tpot.p50@4>+5%") == 1
    assert compared("good", "slow", "tpot.p50@77>+5%") == 2  # nobody asked for it
    assert compared("good", "broken", "tpot.p50@4>+5%") == 3
    assert "not measured: tpot.p50@4>+5%: could not be measured" in " ".join(capsys.readouterr().err.split())
    assert compared("slow", "broken", "tpot.p50@4>+5%", "size_on_disk>1%") == 3
    assert compared("good", "broken", "size_on_disk>1%") == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--fail-if", "speed>1%"], "unknown metric"),
        (["--concurrency", "two"], "--concurrency 'two'"),
        (["--concurrency", "0"], "--concurrency: each must be at least 1"),
        (["--image-sizes", "big"], "image size"),
        (["--output-tokens", "1"], "at least 2"),
        (["--tasks", "none", "--concurrency", "none"], "nothing to measure"),
        (["--tasks", "missing.jsonl"], "no such file"),
        (["--tasks", "docvq"], "one of docvqa, chartqa, textvqa, mmmu"),
        (["--tasks", "docvqa:"], "write docvqa[:DIR or hub id][@SPLIT]"),
        (["--tasks", f"mmmu:{Path(__file__).parent}"], "no files data/validation-*.parquet in it"),
        (["--margin", "0"], "--margin 0: must be above 0"),
        (["--rate", "fast"], "--rate 'fast': write requests per second"),
        (["--rate", "0"], "--rate: each must be more than 0"),
        (["--arrivals", "bursty"], "--arrivals 'bursty': write poisson or constant"),
        (["--slo", "ttft=200"], "is not a time above 0 with its unit"),
        (["--slo", "speed=2ms"], "'speed' is none of ttft, tpot, itl, e2e"),
        (["--preset", "video"], "--preset 'video': choose one of chat:"),
        (["--output-tokens", "8-4"], "--output-tokens 8-4: the range runs backwards"),
        (["--prompt-tokens", "3"], "must have at least 8"),
        (["--images-per-request", "0"], "--images-per-request 0: must be at least 1"),
        (["--duration", "0"], "--duration 0: must be more than 0"),
        (["--images", "nowhere"], "no such directory of images"),
        (["--fidelity", "-1"], "--fidelity -1: must be 0 or more"),
        (["--export", "xlsx"], "--export 'xlsx': write csv, parquet or csv,parquet"),
        (["--price", "0"], "--price 0: must be more than 0"),
        (["--resume"], "holds no interrupted run"),
    ],
)
def test_mistakes_are_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    with serving() as a:
        assert bench(monkeypatch, a, a, tmp_path, *more) == 2
        assert a.bodies == []
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_kind_of_load_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [
        *("--tasks", "none", "--rate", "40,80", "--arrivals", "constant", "--sweep", "--sweep-concurrency", "4"),
        *("--slo", "ttft=500ms,tpot=100ms", "--output-tokens", "4-8", "--prompt-tokens", "lognormal:20:0.3"),
        *("--images-per-request", "1-2", "--ramp", "0.05", "--rounds", "2", "--requests", "8"),
    ]
    with serving(Behaviour(slots=4, gap_s=0.002)) as a, serving(Behaviour(slots=4, gap_s=0.002)) as b:
        assert bench(monkeypatch, a, b, tmp_path, *more) == 0
        load = [body for body in a.bodies if body.get("ignore_eos")]
    found = read(tmp_path)
    kinds = [point.load.kind for point in found.speed if point.role == "candidate"]
    assert kinds[:6] == ["closed", "closed", "open", "open", "single", "saturation"] and "rate" in kinds
    assert found.workload.rates == [40.0, 80.0] and found.workload.arrivals == "constant"
    assert (found.workload.output_tokens, found.workload.prompt_tokens) == ("4-8", "lognormal:20:0.3")
    assert found.workload.slos == ["ttft=500ms", "tpot=100ms"] and found.workload.ramp_s == 0.05
    lengths = {body["max_tokens"] for body in load}
    assert lengths <= set(range(4, 9)) and len(lengths) > 1
    assert {len(body["messages"][0]["content"]) for body in load} == {1, 2, 3}  # 1: no image
    assert all(point.goodput for point in found.speed if point.completed)


def test_a_rate_alone_keeps_nothing_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ["--requests", "4", "--rounds", "1", "--output-tokens", "4", "--image-sizes", "text"]
    with serving() as a, serving() as b:
        common = ["--baseline", a.url, "--candidate", b.url, "--out", str(tmp_path / "out"), "--tasks", "none"]
        assert qvl(monkeypatch, "bench", *common, *fast, "--rate", "50") == 0
    assert {point.load.kind for point in read(tmp_path).speed} == {"open"}


def test_a_preset_is_a_workload_and_options_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as a, serving() as b:
        common = ["--baseline", a.url, "--candidate", b.url, "--out", str(tmp_path / "out"), "--tasks", "none"]
        more = ["--preset", "multi-image", "--output-tokens", "4", "--concurrency", "1", "--requests", "3"]
        assert qvl(monkeypatch, "bench", *common, *more, "--rounds", "1") == 0
        counts = {len(body["messages"][0]["content"]) - 1 for body in a.bodies}
    work = read(tmp_path).workload
    assert (work.preset, work.output_tokens, work.images_per_request) == ("multi-image", "4", "2-6")
    assert work.image_sizes == ["448x448", "336x252", "252x336"]
    # Warm-up shows them all, and a request without images, by which it checks how many tokens images are.
    assert counts == {0, 2, 3, 4, 5, 6}


def test_a_failed_run_says_how_to_go_on_and_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says("x")) as a, serving(says("x")) as b:
        b.behaviour.fail_after = 5
        assert bench(monkeypatch, a, b, tmp_path) == 3
        assert "the same command with --resume goes on" in " ".join(capsys.readouterr().err.split())
        assert bench(monkeypatch, a, b, tmp_path) == 2
        assert "go on with --resume, or start anew with --force" in capsys.readouterr().err
        b.behaviour.fail_after = None
        asked = len(a.bodies)
        assert bench(monkeypatch, a, b, tmp_path, "--seed", "3", "--resume") == 2
        assert "--seed was 0, is 3" in capsys.readouterr().err
        assert bench(monkeypatch, a, b, tmp_path, "--resume") == 0
        again = [body for body in a.bodies[asked:] if not body.get("ignore_eos")]
    assert again == []  # all questions to the first server were answered before, and fidelity is off
    found = read(tmp_path)
    assert found.status == "ok" and found.accuracy is not None and found.accuracy.overall.n == 8
    assert "--resume" not in found.environment.command
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_partial_report_and_exits_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def interrupt(body: dict[str, Any]) -> str | None:
        if body.get("ignore_eos"):
            os.kill(os.getpid(), number)
            return None
        return "x"

    with serving(says("x")) as a, serving(Behaviour(text=interrupt, gap_s=0.05)) as b:
        assert bench(monkeypatch, a, b, tmp_path) == 130
    found = read(tmp_path)
    assert found.status == "partial" and found.accuracy is not None and found.accuracy.overall.n == 8
    assert "blocks of load" in found.verdict.sentence
    error = capsys.readouterr().err
    assert "interrupted; the same command with --resume goes on" in error and "Traceback" not in error


def test_an_existing_report_is_refused_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with serving() as a:
        assert bench(monkeypatch, a, a, tmp_path) == 2
        assert a.bodies == []
    assert "--force" in capsys.readouterr().err


def test_a_server_that_is_not_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as gone:
        pass
    with serving() as a:
        assert bench(monkeypatch, a, gone, tmp_path) == 2
    error = capsys.readouterr().err
    assert "no server answers at" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_compare_exits_by_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, found in {
        "good": report(),
        "slower": report(speed={"candidate": 1.5}),
        "worse": report({"candidate": {f"red-{i}" for i in range(12)}}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(render(found))
    good, slower, worse = (tmp_path / name for name in ("good", "slower", "worse"))
    assert qvl(monkeypatch, "compare", good, good) == 0
    assert qvl(monkeypatch, "compare", good, slower) == 0
    assert "+50%" in capsys.readouterr().out
    assert qvl(monkeypatch, "compare", good, slower / "report.json", "--fail-if", "tpot_p50>+20%") == 1
    assert "regression: tpot_p50>+20%" in capsys.readouterr().err
    assert qvl(monkeypatch, "compare", slower, good, "--fail-if", "tpot_p50>+20%") == 0
    assert qvl(monkeypatch, "compare", good, worse) == 1
    assert "worse beyond chance" in capsys.readouterr().err
    assert qvl(monkeypatch, "compare", good, worse, "--fail-if", "accuracy<-50pt") == 0  # only what was asked for
    assert qvl(monkeypatch, "compare", good, tmp_path / "none") == 2
    assert qvl(monkeypatch, "compare", good, worse, "--fail-if", "accuracy<1") == 2


def test_compare_finds_one_task_that_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*questions(20, tasks=["red"]), *questions(600, tasks=["blue"])]
    for name, wrong in (("a", set[str]()), ("b", {f"red-{i}" for i in range(10)})):
        (tmp_path / name).mkdir()
        found = report({"candidate": wrong}, asked=asked, margin=5.0)
        (tmp_path / name / "report.json").write_text(render(found))
    assert qvl(monkeypatch, "compare", tmp_path / "a", tmp_path / "b") == 1
    said = capsys.readouterr()
    assert "accuracy (red) is worse beyond chance" in said.err and "(all)" not in said.err
    assert [line.split()[0] for line in said.out.splitlines() if line.rstrip().endswith("  worse")] == ["red"]


def test_compare_says_that_a_report_is_of_the_first_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "report.json"
    old.write_text(json.dumps(first_version(report())))
    assert qvl(monkeypatch, "compare", old, old) == 0
    assert "of schema version 1" in capsys.readouterr().err


def test_the_schema_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert qvl(monkeypatch, "schema") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["$schema"].endswith("2020-12/schema") and "TaskAccuracy" in found["$defs"]
    assert found["$defs"]["TaskAccuracy"]["properties"]["verdict"]["enum"] == ["no worse", "worse", "can't tell"]


def test_the_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert qvl(monkeypatch, "bench", "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "--baseline",
        "--candidate",
        "--tasks",
        "--fail-if",
        "--serve-arg",
        "--sequential",
        "--quick",
        "--resume",
        "--sweep",
    ):
        assert option in text
