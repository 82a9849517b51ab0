"""Logs of lmms-eval, and the verdict on two runs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.questions.lmms_logs import Pairs, pair, read_logs
from toolkit.cli import app
from toolkit.errors import BenchError


def line(number: int, **more: Any) -> dict[str, Any]:
    shared = {"doc_id": number, "target": "7", "filtered_resps": ["7"], "doc_hash": f"h{number}", "prompt_hash": "p"}
    return {name: value for name, value in (shared | {"anls": 1.0} | more).items() if value is not None}


def write(path: Path, *lines: dict[str, Any], task: str = "docvqa_val") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (path / f"20261127_101010_samples_{task}.jsonl").write_text(text)
    return path


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ({"anls": 0.75}, 0.75),
        ({"anls": None, "exact_match": True}, 1.0),
        ({"anls": None, "mme_perception_score": {"question_id": "a", "category": "OCR", "score": 0.0}}, 0.0),
        ({"anls": None, "mmmu_acc": {"answer": "B", "parsed_pred": "B"}, "submission": {"x": 1}}, 1.0),
        ({"anls": None, "mmmu_acc": {"answer": "B", "parsed_pred": "A"}}, 0.0),
        ({"anls": None, "mmmu_acc": {"answer": ["0.5", "1/2"], "parsed_pred": "1/2"}}, 1.0),
    ],
)
def test_what_tasks_call_a_score(tmp_path: Path, metric: dict[str, Any], score: float) -> None:
    (read,) = read_logs(write(tmp_path, line(0, **metric))).values()
    assert [sample.score for sample in read[1].values()] == [score]


def test_runs_are_paired_by_question_whatever_their_order(tmp_path: Path) -> None:
    old = read_logs(write(tmp_path / "a" / "model", line(0), line(1, anls=0.0)))
    new = read_logs(write(tmp_path / "b", line(1, anls=0.5), line(0)))
    assert pair(old, new) == {"docvqa_val": Pairs("anls", (1.0, 0.0), (1.0, 0.5))}


def test_the_metric_that_every_line_has_or_the_one_asked_for(tmp_path: Path) -> None:
    lines = line(0, anls=None, overall=1.0, human=1.0), line(1, anls=None, overall=0.0, augmented=0.0)
    path = write(tmp_path, *lines, task="chartqa")
    assert read_logs(path)["chartqa"][0] == "overall"
    both = write(tmp_path / "both", line(0, exact=1.0), line(1, exact=0.0))
    with pytest.raises(BenchError, match=r"anls, exact in every line; choose: --metric docvqa_val=NAME"):
        read_logs(both)
    assert read_logs(both, ["docvqa_val=exact"])["docvqa_val"][0] == "exact"
    assert read_logs(both, ["exact", "other=anls"])["docvqa_val"][0] == "exact"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line(0), line(0)], "line 2: doc_id 0 again"),
        ([line(0), line(1, anls=37.5)], "line 2: anls holds no score between 0 and 1: 37.5"),
        ([{"target": "x"}], "line 1: no sample of lmms-eval"),
        ([line(0, anls=None)], "nothing in some lines alone"),
        ([], "no samples in it"),
    ],
)
def test_a_log_that_is_none_is_named(tmp_path: Path, lines: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        read_logs(write(tmp_path, *lines))


def test_no_log_a_broken_one_and_two_of_a_task_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="run lmms-eval with --log_samples"):
        read_logs(tmp_path)
    write(tmp_path / "one", line(0))
    write(tmp_path / "two", line(0))
    with pytest.raises(BenchError, match="docvqa_val was run twice"):
        read_logs(tmp_path)
    (file,) = (tmp_path / "one").iterdir()
    file.write_text('{"doc_id": 0}\n{oops\n')
    with pytest.raises(BenchError, match="line 2: no JSON"):
        read_logs(file)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([line(0)], "2 questions in the first run, 1 in the second, 1 of them in one alone"),
        ([line(0), line(1, doc_hash="other")], "doc_id 1 is another question"),
        ([line(0, anls=None, f1=1.0), line(1, anls=None, f1=1.0)], "scored by anls in the first run, by f1"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(tmp_path: Path, other: list[dict[str, Any]], words: str) -> None:
    old = read_logs(write(tmp_path / "a", line(0), line(1)))
    with pytest.raises(BenchError, match=words):
        pair(old, read_logs(write(tmp_path / "b", *other)))
    with pytest.raises(BenchError, match="no task in common"):
        pair(old, read_logs(write(tmp_path / "c", line(0), task="chartqa")))


def test_the_verb_judges_and_exits_with_1_on_a_loss(tmp_path: Path) -> None:
    right = [line(number) for number in range(400)]
    write(tmp_path / "a", *right)
    write(tmp_path / "a", line(0), task="alone")
    write(tmp_path / "same", *right)
    write(tmp_path / "lost", *right[:370], *(line(number, anls=0.0) for number in range(370, 400)))
    told = CliRunner().invoke(
        app, ["judge", str(tmp_path / "a"), str(tmp_path / "same"), "--json", str(tmp_path / "j")]
    )
    assert told.exit_code == 0 and "no worse" in told.output and "alone is left out" in told.output
    figures = json.loads((tmp_path / "j").read_text())["tasks"]["docvqa_val"]
    assert (figures["n"], figures["lost"], figures["verdict"]) == (400, 0, "no worse")
    told = CliRunner().invoke(app, ["judge", str(tmp_path / "a"), str(tmp_path / "lost")])
    assert told.exit_code == 1 and "docvqa_val: worse beyond chance" in told.output
    told = CliRunner().invoke(app, ["judge", str(tmp_path / "a"), str(tmp_path / "lost"), "--margin", "20"])
    assert told.exit_code == 0 and "no worse" in told.output  # 7.5 points are fewer
    told = CliRunner().invoke(app, ["judge", str(tmp_path / "a"), str(tmp_path / "lost"), "--margin", "200"])
    assert isinstance(told.exception, BenchError)
