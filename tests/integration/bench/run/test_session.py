from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import report as reports
from bench.report.build import build
from bench.report.render.json_file import read
from bench.report.schema import Report
from bench.run.asked import Dataset, dataset
from bench.run.boot import Abort, Here, Start
from bench.run.config import BenchConfig
from bench.run.progress import Progress
from bench.run.session import Host, measured
from tests.support.factory import config
from tests.support.fake_server import Behaviour, FakeServer, serving
from tests.unit.bench.questions.test_datasets import docvqa, image, write
from toolkit.errors import BenchError, ManifestError, MediaError, ServerError


def run(chosen: BenchConfig, boot: Booter, progress: Progress, **host: Any) -> Report:
    with measured(chosen, Host(boot, **({"write_demo": no_demo} | host)), progress) as outcome:
        return build(outcome, chosen, command="qvl bench")


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


def settings(baseline: str | Path, candidate: str | Path, tasks: str | Path, **changes: Any) -> BenchConfig:
    """Settings of a small run."""
    given = {
        "baseline": str(baseline),
        "candidate": str(candidate),
        "tasks": str(tasks),
        "fidelity": 0,
        "serve_arguments": ("--max-num-seqs=4",),
        "concurrencies": (1, 2),
        "requests": 4,
        "rounds": 2,
        "output_tokens": "4",
        "image_sizes": "56x56",
        "timeout_s": 5.0,
    }
    return config(**(given | changes))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are kept where their settings say: in a directory of this test."""
    monkeypatch.chdir(tmp_path)


def no_demo(directory: Path, per_task: int | None) -> Path:
    raise AssertionError("the demo's questions were not asked for")


def go(chosen: BenchConfig, booter: Booter, **host: Any) -> Report:
    try:
        return run(chosen, booter, lambda *step: None, **host)
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
    report = go(settings(*dirs, questions(tmp_path), sequential=True), booter)
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


def test_a_server_of_this_machine_given_by_url_tells_what_it_holds(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter, log = Booter(tmp_path), tmp_path / "server.log"
    log.write_text("INFO Model loading took 2.50 GiB and 3.1 seconds")
    with serving(Behaviour(model="remote")) as server:
        known = {server.url: Here(os.getpid(), log, dirs[0])}
        report = go(settings(server.url, dirs[1], questions(tmp_path)), booter, find_here=known.get)
    base = report.systems["baseline"]
    assert (base.label, base.source, base.booted, base.serve_arguments) == ("remote", server.url, False, [])
    assert base.disk_bytes and base.memory.host_bytes
    assert base.memory.weights_bytes == round(2.5 * 2**30)


def test_a_failed_request_fails_the_run_and_stops_the_servers(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    for sequential in (False, True):
        booter = Booter(tmp_path, fp16=Behaviour(status=500))
        report = go(settings(*dirs, questions(tmp_path), sequential=sequential), booter)
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
        go(settings(*dirs, "none", concurrencies="none"), Booter(tmp_path))


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
    assert set(found.accuracy.thumbnails) == {sha for item in found.accuracy.items for sha in item.images}


def test_the_demos_images_are_there_when_the_report_is_written(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    def write_demo(directory: Path, per_task: int | None) -> Path:
        (directory / "a.png").write_bytes(image("red")["bytes"])
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


@pytest.mark.parametrize("margin", [0.0, -1.0, 100.0])
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


class Interrupting:
    """Progress that presses Ctrl-C at a step of a phase."""

    def __init__(self, phase: str, done: int) -> None:
        self.at = phase, done

    def __call__(self, phase: str, done: int, total: int, now: str) -> None:
        if (phase, done) == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("phase", "done"), [("questions", 5), ("warm-up", 3), ("load", 1), ("load", 20)])
def test_an_interrupted_run_is_partial_and_goes_on(
    tmp_path: Path, dirs: tuple[Path, Path], phase: str, done: int
) -> None:
    out = tmp_path / "out"
    chosen = settings(*dirs, questions(tmp_path), out=out)
    behaviours = {name: Behaviour(text=echo, model=name) for name in ("fp16", "awq")}
    first = Booter(tmp_path, **behaviours)
    try:
        cut = run(chosen, first, Interrupting(phase, done))
    finally:
        first.stack.close()
    assert cut.status == "partial" and cut.unfinished
    assert (cut.verdict.accuracy is None) == (phase == "questions")
    assert not any(booted.alive for booted in first.booted)
    reports.write(cut, out)
    assert read(out) == cut
    kept = (out / "run.jsonl").read_text().splitlines()
    answered = sum('"kind":"answer"' in line for line in kept)
    assert answered <= 12 and (phase == "questions" or answered == 12)

    second = Booter(tmp_path, **behaviours)
    whole = go(chosen.replaced(resume=True), second)
    assert whole.status == "ok" and whole.unfinished == []
    assert whole.accuracy is not None and whole.accuracy.overall.n == 6
    assert {(p.role, p.concurrency, p.rounds) for p in whole.speed} == {
        (r, c, 2) for r in ("baseline", "candidate") for c in (1, 2)
    }
    assert any("interrupted and went on" in warning for warning in whole.warnings)
    reports.write(whole, out, force=True)
    assert not (out / "run.jsonl").exists()


def test_nothing_is_kept_of_a_run_that_measured_nothing(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter = Booter(tmp_path)
    with booter.stack, pytest.raises(KeyboardInterrupt):
        run(settings(*dirs, "none", out=tmp_path / "out"), booter, Interrupting("warm-up", 1))
    assert not (tmp_path / "out").exists()


def interrupted(tmp_path: Path, dirs: tuple[Path, Path]) -> tuple[BenchConfig, Path]:
    """A run that was interrupted after some questions."""
    out = tmp_path / "out"
    chosen = settings(*dirs, questions(tmp_path), out=out)
    booter = Booter(tmp_path, fp16=Behaviour(text=echo, model="fp16"), awq=Behaviour(text=echo, model="awq"))
    with booter.stack:
        run(chosen, booter, Interrupting("questions", 4))
    return chosen, out


def test_another_command_does_not_go_on(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    chosen, _ = interrupted(tmp_path, dirs)
    for changed, words in (
        (chosen.replaced(seed=7), "--seed was 0, is 7"),
        (chosen.replaced(rounds=3, rates=(2.0,)), "--rate was none, is 2; --rounds was 2, is 3"),
        (chosen.replaced(candidate=str(dirs[0])), "--candidate was"),
    ):
        with pytest.raises(BenchError, match=re.escape(words)):
            go(changed.replaced(resume=True), Booter(tmp_path))
    file = tmp_path / "t.jsonl"
    file.write_text(file.read_text().replace("say 0", "tell 0"))
    with pytest.raises(BenchError, match="the questions' SHA-256 was"):
        go(chosen.replaced(resume=True), Booter(tmp_path))


def test_a_key_may_change_before_a_run_goes_on(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    chosen, out = interrupted(tmp_path, dirs)
    assert go(chosen.replaced(api_key="new", resume=True), Booter(tmp_path)).status == "ok"
    assert "new" not in (out / "run.jsonl").read_text()


def test_a_line_that_was_cut_is_measured_again_and_a_damaged_one_is_said(
    tmp_path: Path, dirs: tuple[Path, Path]
) -> None:
    chosen, out = interrupted(tmp_path, dirs)
    file = out / "run.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert go(chosen.replaced(resume=True), Booter(tmp_path)).status == "ok"
    file.write_bytes(whole.replace(b'"kind":"answer"', b'"kind":"anser"', 1))
    with pytest.raises(BenchError, match=r"run\.jsonl:2: damaged"):
        go(chosen.replaced(resume=True), Booter(tmp_path))


def test_there_must_be_something_to_go_on_with(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    with pytest.raises(BenchError, match="holds no interrupted run"):
        go(settings(*dirs, questions(tmp_path), resume=True), Booter(tmp_path))


def test_a_failed_run_goes_on_once_the_server_is_well(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    chosen = settings(*dirs, questions(tmp_path), out=out)
    ill = Booter(tmp_path, fp16=Behaviour(text=echo, model="fp16", fail_after=4), awq=Behaviour(text=echo, model="awq"))
    failed = go(chosen, ill)
    assert failed.status == "failed" and failed.accuracy is None and failed.speed == []
    well = Booter(tmp_path, fp16=Behaviour(text=echo, model="fp16"), awq=Behaviour(text=echo, model="awq"))
    report = go(chosen.replaced(resume=True), well)
    assert report.status == "ok" and report.failures == []
    assert report.accuracy is not None and report.accuracy.overall.baseline.value == 1.0


def test_fidelity_is_measured_on_ones_own_images(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        (mine / f"{number}.png").write_bytes(image(colour)["bytes"])
    says = {
        name: Behaviour(whole=lambda body, answer=answer: answer, model=name)
        for name, answer in (("fp16", "a square"), ("awq", "a square, perhaps"))
    }
    found = go(settings(*dirs, "none", images=mine, concurrencies=()), Booter(tmp_path, **says))
    assert found.status == "ok" and found.accuracy is None and found.speed == []
    assert found.fidelity is not None
    assert [item.id for item in found.fidelity.items] == ["0.png", "1.png", "2.png"]
    assert {item.prompt for item in found.fidelity.items} == {"Describe this picture."}
    assert found.fidelity.candidate.identical and found.fidelity.candidate.identical.value == 0.0
    assert found.fidelity.noise and found.fidelity.noise.identical and found.fidelity.noise.identical.value == 1.0
    assert any("fidelity: not measured: KL" in warning for warning in found.warnings)  # no prompt_logprobs
    assert str(mine) in found.fidelity.source


def test_an_image_that_cannot_be_read_is_named_before_anything_boots(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "torn.png").write_bytes(image("red")["bytes"][:40])
    booter = Booter(tmp_path)
    with pytest.raises(MediaError, match=r"torn\.png"):
        go(settings(*dirs, "none", images=tmp_path / "mine"), booter)
    assert booter.booted == []


def test_a_clock_that_is_set_meanwhile_is_said_and_changes_no_figure(
    tmp_path: Path, dirs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, began = time.time, time.time()
    # Half a second into the run somebody sets the clock back by an hour.
    monkeypatch.setattr(time, "time", lambda: real() - (3600.0 if real() - began > 0.5 else 0.0))
    behaviour = Behaviour(text=echo, first_s=0.05)
    report = go(settings(*dirs, questions(tmp_path)), Booter(tmp_path, fp16=behaviour))
    assert any("the machine's clock moved by -3600 s" in warning for warning in report.warnings)
    assert 0.5 < report.duration_s < 60
    assert all(point.e2e_ms and 0 < point.e2e_ms.p50 < 60_000 for point in report.speed)


def test_a_clock_that_is_not_set_is_not_mentioned(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    report = go(settings(*dirs, questions(tmp_path)), Booter(tmp_path))
    assert not any("clock" in warning for warning in report.warnings)


def test_copies_of_a_checkpoint_are_the_same_model(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dirs[0], copy)
    assert any(
        "the same model" in w for w in go(settings(dirs[0], copy, questions(tmp_path)), Booter(tmp_path)).warnings
    )
    (copy / "model.safetensors").write_bytes(b"x" * 999 + b"y")
    found = go(settings(dirs[0], copy, questions(tmp_path)), Booter(tmp_path))
    assert not any("the same model" in warning for warning in found.warnings)


def test_two_servers_with_one_models_name_are_doubted(tmp_path: Path) -> None:
    with serving(Behaviour(model="qwen")) as a, serving(Behaviour(model="qwen")) as b:
        report = go(settings(a.url, b.url, questions(tmp_path)), Booter(tmp_path))
    assert any("both servers call their model qwen" in warning for warning in report.warnings)


#: What a server may do wrong, and what comes of it: an outcome of the run, and words that say why.
WRONGS: list[tuple[Behaviour, str]] = [
    (Behaviour(status=429), "HTTP 429"),
    (Behaviour(status=500), "HTTP 500"),
    (Behaviour(raw=b"data: {broken\n\n"), "malformed"),
    (Behaviour(raw=b"<html>welcome</html>"), "does the server stream"),
    (Behaviour(close_after=2), "truncated"),
    (Behaviour(finish=False, done=False), "truncated"),
    (Behaviour(stall_after=1), "no complete answer within"),
    (Behaviour(first_s=30.0), "no complete answer within"),
]


@pytest.mark.parametrize(("behaviour", "words"), WRONGS, ids=[words for _, words in WRONGS])
@pytest.mark.parametrize("tasks", ["questions", "none"])
def test_what_a_server_does_wrong_is_never_a_wrong_answer(
    tmp_path: Path, dirs: tuple[Path, Path], behaviour: Behaviour, words: str, tasks: str
) -> None:
    asked = "none" if tasks == "none" else questions(tmp_path)
    chosen = settings(*dirs, asked, timeout_s=1.0)
    report = go(chosen, Booter(tmp_path, awq=replace(behaviour, model="awq")))
    assert report.status == "failed" and report.accuracy is None and report.speed == []
    assert {failed.role for failed in report.failures} == {"candidate"}
    assert any(words in f"{failed.kind}: {failed.message}" for failed in report.failures)
    assert words in report.verdict.sentence


def test_a_server_that_goes_away_under_load_fails_the_run(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    booter = Booter(tmp_path)

    def progress(phase: str, done: int, total: int, now: str) -> None:
        if phase == "load" and done == 6:
            booter.stack.close()  # both servers are gone

    report = run(settings(*dirs, "none"), booter, progress)
    assert report.status == "failed"
    assert {failed.kind for failed in report.failures} <= {"connect", "truncated"}
    assert "load, " in report.verdict.sentence


def test_a_server_that_ignores_stream_options_is_measured_without_tokens(
    tmp_path: Path, dirs: tuple[Path, Path]
) -> None:
    report = go(settings(*dirs, "none"), Booter(tmp_path, awq=Behaviour(model="awq", usage=False)))
    assert report.status == "ok"
    point = report.point("candidate", "2 in flight")
    assert point and point.ttft_ms and point.tpot_ms is None and point.uncounted == point.requests
    assert any("the candidate's server reports no token counts" in warning for warning in report.warnings)


def test_empty_answers_are_wrong_answers_and_no_failures(tmp_path: Path, dirs: tuple[Path, Path]) -> None:
    empty = Behaviour(text=lambda body: None if body.get("ignore_eos") else "", model="awq")
    report = go(settings(*dirs, questions(tmp_path)), Booter(tmp_path, fp16=Behaviour(text=echo), awq=empty))
    assert report.status == "ok" and report.accuracy is not None
    assert report.accuracy.overall.candidate.value == 0.0 and report.accuracy.overall.difference.lost == 6
