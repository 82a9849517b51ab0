from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.report.json import render
from bench.report.model import Report
from tests.bench.factory import first_version, questions, report
from tests.bench.fake_server import Behaviour, FakeServer, serving
from toolkit import cli

FAST = [
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


def test_bench_gates_the_candidate_against_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says("x")) as a, serving(says("y")) as b:
        assert bench(monkeypatch, a, b, tmp_path, "--fail-if", "accuracy<-1pt", "--fail-if", "accuracy.t<-1%") == 1
        assert "accuracy<-1pt: accuracy went from 1 to 0" in capsys.readouterr().err
        assert bench(monkeypatch, b, a, tmp_path, "--force", "--fail-if", "accuracy<-1pt") == 0
    assert read(tmp_path).status == "ok"


def test_failed_requests_mark_the_report_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says("x")) as a, serving(Behaviour(fail_after=5)) as b:
        assert bench(monkeypatch, a, b, tmp_path) == 2
    found = read(tmp_path)
    assert found.status == "failed" and found.accuracy is None and found.speed == []
    error = capsys.readouterr().err
    assert "HTTP 500: out of luck" in error and "report.json" in error and "Traceback" not in error
    assert qvl(monkeypatch, "compare", tmp_path / "out", tmp_path / "out") == 2
    assert "marked failed" in capsys.readouterr().err


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
        found = report({"candidate": wrong}, asked=asked, margin=0.05)
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
    for option in ("--baseline", "--candidate", "--tasks", "--fail-if", "--serve-arg", "--sequential", "--quick"):
        assert option in text
