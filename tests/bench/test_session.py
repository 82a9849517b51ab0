from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.boot import Abort, Start
from bench.inputs import Lengths
from bench.report.model import Report
from bench.run import Plan
from bench.session import Dataset, Settings, dataset, run
from tests.bench.fake_server import Behaviour, FakeServer, serving
from tests.bench.test_datasets import docvqa, picture, write
from toolkit.errors import BenchError, ManifestError, ServerError

PLAN = Plan(
    concurrencies=(1, 2), requests=4, rounds=2, output_tokens=Lengths.fixed(4), image_sizes=((56, 56),), timeout_s=5.0
)


class Booted:
    """What a boot returns, for a fake server."""

    pid = os.getpid()

    def __init__(self, server: FakeServer, directory: Path, log: Path) -> None:
        self.url, self.api_key, self.checkpoint, self.log = server.url, server.behaviour.api_key, directory, log
        self.alive = True

    def stop(self) -> None:
        self.alive = False


class Booter:
    """Boots fake servers for the directories of ``tmp_path``."""

    at_once = True

    def __init__(self, root: Path, **behaviours: Behaviour) -> None:
        self.root, self.behaviours = root, behaviours
        self.booted: list[Booted] = []
        self.most_alive = 0
        self.stack = ExitStack()

    def boot(self, source: str) -> tuple[Start, Abort]:
        def start() -> Booted:
            name = Path(source).name
            server = self.stack.enter_context(serving(self.behaviours.get(name, Behaviour(model=name))))
            log = self.root / f"{name}.log"
            log.write_text("INFO Model loading took 0.25 GiB memory and 1.0 seconds\n")
            self.booted.append(Booted(server, Path(source), log))
            self.most_alive = max(self.most_alive, sum(booted.alive for booted in self.booted))
            return self.booted[-1]

        return start, lambda: None


@pytest.fixture
def dirs(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    for name, size in (("fp16", 1000), ("awq", 300)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * size)
        quantized = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
        config = {"torch_dtype": "float16"} | ({"quantization_config": quantized} if name == "awq" else {})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    yield tmp_path / "fp16", tmp_path / "awq"


def questions(tmp_path: Path, count: int = 6) -> Path:
    file = tmp_path / "t.jsonl"
    lines = [
        {"id": f"{i}", "task": "ab"[i % 2], "images": [], "question": f"say {i}", "answers": [f"say {i}"]}
        for i in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def echo(body: dict[str, Any]) -> str | None:
    return None if body.get("ignore_eos") else body["messages"][0]["content"][-1]["text"]


def settings(baseline: str | Path, candidate: str | Path, tasks: str | Path, **changes: Any) -> Settings:
    return replace(
        Settings(
            sources={"baseline": str(baseline), "candidate": str(candidate)},
            plan=PLAN,
            tasks=str(tasks),
            per_task=None,
            images=None,
            image_prompt="Describe this picture.",
            fidelity=0,
            margin=0.01,
            seed=0,
            side_by_side=True,
            api_key=None,
            serve_arguments=("--max-num-seqs=4",),
            command="qvl bench",
        ),
        **changes,
    )


def no_demo(directory: Path, per_task: int | None) -> Path:
    raise AssertionError("the demo's questions were not asked for")


def go(chosen: Settings, booter: Booter, **more: Any) -> Report:
    try:
        return run(chosen, boot=booter, write_demo=more.pop("write_demo", no_demo), progress=lambda *step: None, **more)
    finally:
        booter.stack.close()


def test_two_directories_are_booted_measured_and_stopped(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter = Booter(
        tmp_path, fp16=Behaviour(text=echo, model="fp16", api_key="k"), awq=Behaviour(text=echo, model="awq")
    )
    logs: list[Path] = []
    report = go(settings(*dirs, questions(tmp_path)), booter, logs=logs)
    assert report.status == "ok"
    assert report.accuracy is not None
    assert [row.task for row in report.accuracy.tasks] == ["a", "b"]
    assert report.accuracy.overall.candidate.value == 1.0
    assert {(p.role, p.concurrency) for p in report.speed} == {
        (r, c) for r in ("baseline", "candidate") for c in (1, 2)
    }
    assert [booted.alive for booted in booter.booted] == [False, False]
    assert booter.most_alive == 2
    base, cand = report.systems["baseline"], report.systems["candidate"]
    assert (base.label, base.quantization, base.disk_weights_bytes) == ("fp16", "float16", 1000)
    assert (cand.label, cand.quantization, cand.disk_weights_bytes) == ("awq", "awq 4 bits, group 128, gemm", 300)
    assert cand.disk_bytes == 300 + (dirs[1] / "config.json").stat().st_size
    assert cand.memory.weights_bytes == 2**28
    assert (cand.memory.host_bytes or 0) > 2**20
    assert cand.serve_arguments == ["--max-num-seqs=4"]
    assert len(logs) == 2
    assert report.workload.interleaved


def test_one_at_a_time_when_both_do_not_fit(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter = Booter(tmp_path)
    report = go(settings(*dirs, questions(tmp_path), side_by_side=False), booter)
    assert report.status == "ok"
    assert booter.most_alive == 1
    assert not report.workload.interleaved
    assert any("one after the other" in warning for warning in report.warnings)
    assert len(report.speed) == 4


def test_a_server_given_by_url_is_left_alone(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter = Booter(tmp_path)
    with serving(Behaviour(model="remote")) as server:
        url = server.url.replace("://", "://user:secret@") + "/v1"
        report = go(settings(url, dirs[1], questions(tmp_path), api_key="k"), booter)
    base = report.systems["baseline"]
    assert (base.label, base.booted, base.disk_bytes, base.memory.host_bytes) == ("remote", False, None, None)
    assert "secret" not in report.model_dump_json()
    assert len(booter.booted) == 1


def test_a_failed_request_fails_the_run_and_stops_the_servers(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    for side_by_side in (True, False):
        booter = Booter(tmp_path, fp16=Behaviour(status=500))
        report = go(settings(*dirs, questions(tmp_path), side_by_side=side_by_side), booter)
        assert report.status == "failed"
        assert report.accuracy is None and report.speed == []
        assert not any(booted.alive for booted in booter.booted)
        assert report.systems["candidate"].label == "awq"


def test_a_server_that_is_down_is_found_before_anything_boots(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    with serving() as server:
        url = server.url
    booter = Booter(tmp_path)
    with pytest.raises(ServerError, match="no server answers"):
        go(settings(dirs[0], url, questions(tmp_path)), booter)
    assert booter.booted == []


def test_broken_questions_are_found_before_anything_boots(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter = Booter(tmp_path)
    (tmp_path / "t.jsonl").write_text("{\n")
    with pytest.raises(ManifestError, match=r"t\.jsonl:1"):
        go(settings(*dirs, tmp_path / "t.jsonl"), booter)
    assert booter.booted == []


def test_nothing_to_measure(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    with pytest.raises(BenchError, match="nothing to measure"):
        go(settings(*dirs, "none", plan=replace(PLAN, concurrencies=())), Booter(tmp_path))


def test_the_demo_writes_its_own_questions(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    written: list[Any] = []

    def write(directory: Path, per_task: int | None) -> Path:
        written.append((directory, per_task))
        return questions(directory)

    report = go(settings(*dirs, "demo", per_task=3), Booter(tmp_path), write_demo=write)
    assert report.workload.tasks_source == "demo"
    assert written[0][1] == 3
    assert not written[0][0].exists()


def test_a_file_is_sampled_per_task(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    report = go(settings(*dirs, questions(tmp_path, 20), per_task=2), Booter(tmp_path))
    assert report.workload.questions == 4


@pytest.mark.parametrize(
    ("text", "source", "split"),
    [
        ("docvqa", "lmms-lab/DocVQA", "validation"),
        ("docvqa@test", "lmms-lab/DocVQA", "test"),
        ("docvqa:someone/docs", "someone/docs", "validation"),
        ("docvqa:someone/docs@dev", "someone/docs", "dev"),
        ("docvqa:sets/docs@v2", "sets/docs@v2", "validation"),  # a directory of that name is there
        ("docvqa:sets/docs@v2@dev", "sets/docs@v2", "dev"),
    ],
)
def test_sets_are_named_with_source_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, source: str, split: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sets/docs@v2").mkdir(parents=True)
    Path("test").mkdir()  # has nothing to do with the split
    assert dataset(text) == Dataset("docvqa", source, split)


@pytest.mark.parametrize("text", ["demo", "none", "docvqa.jsonl", "docvqas", "sets/docvqa", "my docvqa:x"])
def test_other_names_are_no_sets(text: str) -> None:
    assert dataset(text) is None


@pytest.mark.parametrize("text", ["docvqa:", "docvqa@", "docvqa:@test", "docvqa:x/y@"])
def test_half_a_name_of_a_set_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"write docvqa\[:DIR or hub id\]\[@SPLIT\]"):
        dataset(text)


def test_a_set_is_read_from_a_directory_asked_and_shown(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    rows = [docvqa(number, ["red", "blue"][number % 2], answers=["yes"]) for number in range(6)]
    source = write(tmp_path / "docs", "docvqa", rows, split="dev")
    says = {
        name: Behaviour(text=lambda body, t=text: None if body.get("ignore_eos") else t, model=name)
        for name, text in (("fp16", "yes"), ("awq", "no"))
    }
    found = go(settings(*dirs, f"docvqa:{source}@dev", per_task=4), Booter(tmp_path, **says))
    assert found.status == "ok" and found.accuracy is not None
    assert found.workload.tasks_source == f"docvqa, split dev of {source}"
    assert [row.task for row in found.accuracy.tasks] == ["docvqa"]
    assert (found.accuracy.overall.n, found.accuracy.overall.difference.lost) == (4, 4)
    assert {item.cluster for item in found.accuracy.items} <= {f"docvqa {14000 + doc}" for doc in range(3)}
    assert set(found.accuracy.thumbnails) == {sha for item in found.accuracy.items for sha in item.pictures}


def test_the_demos_pictures_are_there_when_the_report_is_written(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    def write_demo(directory: Path, per_task: int | None) -> Path:
        (directory / "a.png").write_bytes(picture("red")["bytes"])
        line = {"id": "1", "task": "t", "image": "a.png", "question": "What?", "answers": ["nothing it says"]}
        (directory / "t.jsonl").write_text(json.dumps(line))
        return directory / "t.jsonl"

    booter = Booter(
        tmp_path,
        fp16=Behaviour(text=lambda body: None if body.get("ignore_eos") else "nothing it says", model="fp16"),
        awq=Behaviour(text=echo, model="awq"),
    )
    found = go(settings(*dirs, "demo"), booter, write_demo=write_demo)
    assert found.accuracy is not None and len(found.accuracy.thumbnails) == 1


@pytest.mark.parametrize("margin", [0.0, -0.01, 1.0])
def test_a_margin_is_above_nothing(tmp_path: Path, margin: float) -> None:
    with pytest.raises(BenchError, match="--margin"):
        settings("a", "b", "none", margin=margin)


@pytest.mark.parametrize(("pair", "words"), [((0, 0), "the same model"), (None, "one server")])
def test_comparing_a_thing_with_itself_is_doubted(
    tmp_path: Path, dirs: tuple[Path, Path], pair: tuple[int, int] | None, words: str
) -> None:
    with serving() as server:
        a, b = (server.url, server.url + "/v1") if pair is None else (str(dirs[pair[0]]), str(dirs[pair[1]]))
        report = go(settings(a, b, questions(tmp_path)), Booter(tmp_path))
    assert any(words in warning for warning in report.warnings)
    labels = [report.systems["baseline"].label, report.systems["candidate"].label]
    assert [label.split(" ")[-1] for label in labels] == ["(baseline)", "(candidate)"]
