"""The user's own traffic as load: `qvl bench --traffic` and `--replay`, and traces that a guard recorded."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.load.traffic import TRACE, read
from bench.report.render import json_file
from bench.report.schema import Report
from serve.settings.environment import RECORD
from serve.settings.recording import Recording
from tests.support.command import exit_code
from tests.support.fake_server import Behaviour, Body, FakeServer, serving
from tests.support.guard_app import App, Client, chat
from toolkit.cli import app
from toolkit.models.image_rule import RULES

RULE = RULES["Qwen2-VL, Qwen2.5-VL"]


def parts(body: Body) -> list[dict[str, Any]]:
    return [part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]]


def like_qwen(body: Body) -> int:
    """Count a prompt as vLLM does: a token a word, an image's and the two around it, and those of the template."""
    total = 12
    for part in parts(body):
        if part["type"] == "text":
            total += len(part["text"].split())
        else:
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            total += RULE.tokens(*Image.open(io.BytesIO(data)).size) + 2
    return total


def bench(a: FakeServer, b: FakeServer, out: Path, *more: str) -> int | str:
    """Run the verb; return what it exits with."""
    common = ["--baseline", a.url, "--candidate", b.url, "--tasks", "none", "--out", str(out)]
    return exit_code(app, "bench", *common, *more)


def found(out: Path) -> Report:
    return json_file.read(out)


def chats(directory: Path, count: int, **times: Any) -> Path:
    """Write a manifest of chats about images of two sizes, and texts."""
    directory.mkdir()
    for name, size in (("a.png", (84, 56)), ("b.jpg", (112, 84))):
        Image.new("RGB", size, "red").save(directory / name)
    lines = []
    for number in range(count):
        image = ("a.png", "b.jpg", None)[number % 3]
        content: list[dict[str, Any]] = [{"type": "text", "text": f"Question {number}"}]
        content += [{"type": "image", "image": image}] if image else []
        line: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        lines.append(line | {key: of(number) for key, of in times.items()})
    file = directory / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def asked(server: FakeServer, text: str = "Question") -> list[Body]:
    return [body for body in server.bodies if any(text in part.get("text", "") for part in parts(body))]


def test_both_sides_get_the_users_own_requests(tmp_path: Path) -> None:
    file = chats(tmp_path / "in", 5)
    more = ["--traffic", str(file), "--concurrency", "1,3", "--requests", "6", "--rounds", "2", "--output-tokens", "4"]
    with serving(Behaviour(prompt=like_qwen)) as a, serving(Behaviour(prompt=like_qwen)) as b:
        assert bench(a, b, tmp_path / "out", *more) == 0
        assert sorted(a.raw_bodies) == sorted(b.raw_bodies)
        assert len(set(a.raw_bodies)) == len(a.raw_bodies)
        own = asked(a)
    assert len(own) == 2 * 3 + 2 * 9
    assert {part["type"] for body in own for part in parts(body)} == {"text", "image_url"}
    report = found(tmp_path / "out")
    assert report.workload.traffic == "5 chats of chats.jsonl" and len(report.workload.traffic_sha256) == 64
    point = report.point("candidate", "3 in flight")
    assert point and set(point.by_shape) == {"text", "1 image"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "5 chats of chats.jsonl" in page and "no cache knows" in page


def test_prompt_tokens_are_told_by_kind_and_agree_with_what_the_server_counts(
    tmp_path: Path,
) -> None:
    more = ["--concurrency", "1", "--requests", "8", "--rounds", "2", "--output-tokens", "4"]
    more += ["--image-sizes", "448x448,336x252", "--export", "csv"]
    with serving(Behaviour(prompt=like_qwen)) as a, serving(Behaviour()) as b:
        assert bench(a, b, tmp_path / "out", *more) == 0
    report = found(tmp_path / "out")
    [one, other] = report.speed
    assert one.completed == 8 and one.image_tokens == 4 * 256 + 4 * 108
    assert one.prompt_tokens == one.image_tokens + 8 * (12 + 16 + 2)
    assert other.image_tokens is None  # it counts every prompt alike
    assert "Image tokens a prompt" in (tmp_path / "out" / "report.md").read_text()
    assert ",1,256," in (tmp_path / "out" / "requests.csv").read_text()


def test_tokens_of_images_by_an_unknown_rule_are_not_told(tmp_path: Path) -> None:
    more = [
        "--concurrency",
        "1",
        "--requests",
        "2",
        "--rounds",
        "1",
        "--output-tokens",
        "4",
        "--image-sizes",
        "448x448",
    ]
    strange = Behaviour(prompt=lambda body: 900 if any(part["type"] == "image_url" for part in parts(body)) else 20)
    with serving(strange) as a, serving(Behaviour(prompt=like_qwen)) as b:
        assert bench(a, b, tmp_path / "out", *more) == 0
    report = found(tmp_path / "out")
    assert [point.image_tokens for point in report.speed] == [None, 3 * 256]
    [said] = [line for line in report.warnings if "no rule that is known" in line]
    assert "the baseline's server counts 880 tokens for an image of 448x448" in said


def test_a_trace_is_replayed_against_both(tmp_path: Path) -> None:
    file = chats(tmp_path / "in", 8, at=lambda each: 100 + each / 10, output_tokens=lambda each: 3 + each % 2)
    more = ["--traffic", str(file), "--replay", "1,4", "--rounds", "2"]
    with serving(Behaviour(gap_s=0.001)) as a, serving(Behaviour(gap_s=0.001)) as b:
        assert bench(a, b, tmp_path / "out", *more) == 0
        own = asked(a)
        assert sorted(a.raw_bodies) == sorted(b.raw_bodies)
    # Once at each speed, each request in one round.
    numbers = [re.search(r"Question (\d)", json.dumps(body["messages"])) for body in own]
    assert sorted(int(match[1]) for match in numbers if match) == sorted([*range(8), *range(8)])
    assert {body["max_tokens"] for body in own} == {3, 4}
    report = found(tmp_path / "out")
    points = [point for point in report.speed if point.role == "candidate"]
    assert [(point.load.name, point.load.kind, point.load.speed) for point in points] == [
        ("replay 1x", "replay", 1.0),
        ("replay 4x", "replay", 4.0),
    ]
    assert [point.offered_per_s for point in points] == pytest.approx([10.0, 40.0])
    assert [point.completed for point in points] == [8, 8]
    assert report.workload.replays == [1.0, 4.0] and report.workload.output_tokens == "as in the traffic"
    assert not any("instead" in line for line in report.warnings)
    assert all(point.kept is not None for point in points)
    # A rate that is kept has no ratio of throughput.
    kept = {point.load.name for point in report.speed} - {p.load.name for p in report.speed if not p.kept}
    assert all(r.metric in ("ttft", "tpot", "itl", "e2e") for r in report.speed_ratios if r.load in kept)


def test_chats_of_several_turns_are_sent_one_after_the_other(tmp_path: Path) -> None:
    more = ["--turns", "3", "--shared-prefix", "30", "--concurrency", "2", "--requests", "12", "--rounds", "2"]
    more += ["--output-tokens", "4", "--image-sizes", "56x56"]
    with serving(Behaviour(gap_s=0.002)) as a, serving(Behaviour(gap_s=0.002)) as b:
        assert bench(a, b, tmp_path / "out", *more) == 0
    load = a.bodies[-12:]
    assert sorted(len(body["messages"]) for body in load) == [2] * 4 + [4] * 4 + [6] * 4
    seen: list[str] = []
    for body in load:
        said = json.dumps(body["messages"])
        if len(body["messages"]) > 2:  # its beginning was asked before
            assert any(said.startswith(earlier[:-1]) for earlier in seen)
        seen.append(said)
    report = found(tmp_path / "out")
    point = report.point("baseline", "2 in flight")
    assert point and set(point.by_shape) == {"turn 1", "turn 2", "turn 3"} and point.completed == 12
    assert (report.workload.turns, report.workload.shared_prefix) == (3, 30)
    assert "chats of 3 turns" in (tmp_path / "out" / "report.md").read_text()


def test_bursts_are_gamma_distributed_arrivals(tmp_path: Path) -> None:
    more = ["--rate", "50", "--burstiness", "0.3", "--requests", "8", "--rounds", "2", "--output-tokens", "4"]
    with serving() as a, serving() as b:
        assert bench(a, b, tmp_path / "out", *more, "--image-sizes", "text") == 0
    work = found(tmp_path / "out").workload
    assert (work.arrivals, work.burstiness) == ("gamma", 0.3)
    assert "gamma arrivals, burstiness 0.3" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--replay", "1"], "--replay without --traffic: give the recorded trace"),
        (["--traffic", "IN", "--replay", "1"], "does not say when its requests came"),
        (["--traffic", "IN", "--replay", "0"], "--replay: each speed must be more than 0"),
        (["--traffic", "IN", "--replay", "fast"], "write speeds with commas"),
        (["--traffic", "IN", "--image-sizes", "56x56"], "--traffic has requests of its own: leave out --image-sizes"),
        (["--traffic", "IN", "--turns", "2"], "leave out --turns"),
        (["--traffic", "nowhere.jsonl"], "no such file; give a JSONL file of chats or a directory of images"),
        (["--turns", "2", "--rate", "4"], "neither --rate nor --sweep waits for"),
        (["--burstiness", "0.5"], "give --rate or --sweep too"),
        (["--burstiness", "0", "--rate", "4"], "--burstiness 0: must be more than 0"),
        (["--burstiness", "0.5", "--rate", "4", "--arrivals", "constant"], "give one of the two"),
        (["--arrivals", "gamma", "--rate", "4"], "--arrivals gamma: give --burstiness"),
    ],
)
def test_mistakes_are_said_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    file = chats(tmp_path / "in", 3)
    with serving() as a:
        given = [str(file) if each == "IN" else each for each in more]
        assert bench(a, a, tmp_path / "out", *given) == 2
        assert a.bodies == []
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_guard_recorded_can_be_replayed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (140, 84), "blue").save(buffer, "PNG")
    image = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"},
    }
    system = {"role": "system", "content": "You answer in one word."}
    settings: dict[str, Any] = {"record_texts": "kept", "record_images": "kept"} if kept else {}
    monkeypatch.setenv(RECORD, Recording(record=tmp_path / "trace", **settings).dumps())
    usage = b'{"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 6}}'

    async def record() -> None:
        client = Client(app=App(chunks=(usage,)))
        for number in range(4):
            content = [image, {"type": "text", "text": f"What colour is number {number}?"}]
            await client.ask(body=chat(messages=[system, {"role": "user", "content": content}]))
        assert client.guard._recorder is not None
        client.guard._recorder.close()

    asyncio.run(record())
    trace = read(tmp_path / "trace", "")
    assert (tmp_path / "trace" / TRACE).is_file() and trace.timed and trace.tells_lengths and len(trace.chats) == 4
    with serving() as a, serving() as b:
        code = bench(a, b, tmp_path / "out", "--traffic", str(tmp_path / "trace"), "--replay", "50", "--rounds", "2")
        assert code == 0
    own = [body for body in a.bodies if len(body["messages"]) == 2]
    assert len(own) == 4 and all(body["max_tokens"] == 6 for body in own)
    for body in own:
        url = next(part["image_url"]["url"] for part in parts(body) if part["type"] == "image_url")
        assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (140, 84)
    said = json.dumps([body["messages"] for body in own])
    assert ("What colour is number 3?" in said) == kept
    # The beginning that requests shared they share again, in each round.
    assert len({json.dumps(body["messages"][0]) for body in own}) == 2
