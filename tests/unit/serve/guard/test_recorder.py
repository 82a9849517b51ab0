"""What a server writes down of its requests, and what it does not."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serve.guard.recorder import WAITING, Recorder
from serve.settings.environment import RECORD
from serve.settings.recording import Recording
from tests.support.guard_app import KEY, App, Client, chat
from toolkit.errors import ServerError

ANSWER = b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}'


def image(width: int = 40, height: int = 30, orientation: int | None = None) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), (width, height, 0)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue(), f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def recorded(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *bodies: bytes, answer: bytes = ANSWER, **settings: Any
) -> list[dict[str, Any]]:
    """Send requests through a guard that records them; return the lines."""
    monkeypatch.setenv(RECORD, Recording(record=directory, **settings).dumps())

    async def run() -> None:
        client = Client(app=App(chunks=(answer,)))
        for body in bodies:
            await client.ask(body=body)
        assert client.guard._recorder is not None
        client.guard._recorder.close()

    asyncio.run(run())
    trace = directory / "trace.jsonl"
    return [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []


def asked(text: str, url: str | None = None, **more: Any) -> bytes:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    content += [{"type": "image_url", "image_url": {"url": url}}] if url else []
    return chat(messages=[{"role": "user", "content": content}], **more)


def test_by_default_texts_are_hashed_and_images_are_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, url = image()
    secret = "the patient is called Schmidt"
    lines = recorded(monkeypatch, tmp_path / "r", asked(secret, url), asked(secret), asked("another"))
    first = lines[0]["messages"][0]["content"]
    assert lines[0]["output_tokens"] == 7 and lines[0].keys() == {"at", "messages", "output_tokens"}
    assert first[0].keys() == {"type", "hash", "characters"} and first[0]["characters"] == len(secret)
    assert first[1].keys() == {"type", "hash", "width", "height"}
    assert (first[1]["width"], first[1]["height"]) == (40, 30)
    same, other = (line["messages"][0]["content"][0]["hash"] for line in lines[1:])
    assert same == first[0]["hash"] != other
    written = b"".join(file.read_bytes() for file in (tmp_path / "r").rglob("*") if file.is_file())
    for hidden in ("Schmidt", KEY, "192.0.2.1", base64.b64encode(data).decode()[:60]):
        assert hidden.encode() not in written
    assert not (tmp_path / "r" / "images").exists()


def test_a_hash_can_t_be_tried_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Another run of the server has another key.
    hashes = {
        line["messages"][0]["content"][0]["hash"]
        for _ in range(2)
        for line in recorded(monkeypatch, tmp_path / "r", asked("yes"))
    }
    assert len(hashes) == 2


def test_what_is_kept_is_readable_by_the_owner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, url = image(orientation=6)
    settings = {"record_texts": "kept", "record_images": "kept"}
    lines = recorded(monkeypatch, tmp_path / "r", asked("What?", url), asked("Who?", url), **settings)
    parts = [line["messages"][0]["content"] for line in lines]
    assert [part[0]["text"] for part in parts] == ["What?", "Who?"]
    assert parts[0][1] == parts[1][1]
    kept = tmp_path / "r" / parts[0][1]["image"]
    assert kept.read_bytes() == data and len(list(kept.parent.iterdir())) == 1
    for path in (kept, tmp_path / "r" / "trace.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_an_image_has_the_size_that_the_model_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [line] = recorded(monkeypatch, tmp_path / "r", asked("What?", image(40, 30, orientation=6)[1]))
    found = line["messages"][0]["content"][1]
    assert (found["width"], found["height"]) == (30, 40)


def test_roles_are_those_of_a_manifest_and_calls_of_tools_are_texts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    [line] = recorded(monkeypatch, tmp_path / "r", chat(messages=messages), record_texts="kept")
    assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant", "user"]
    assert json.loads(line["messages"][2]["content"][0]["text"]) == [call]


def test_what_was_refused_or_has_no_answer_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = chat(messages=[])
    assert recorded(monkeypatch, tmp_path / "r", bad) == []
    assert recorded(monkeypatch, tmp_path / "r", chat(), answer=b'{"error": {}}') == []
    assert len(recorded(monkeypatch, tmp_path / "r", chat())) == 1


def test_recording_ends_at_its_limit_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "old").write_bytes(b"x" * (2**20 - 400))
    lines = recorded(monkeypatch, tmp_path / "r", *[asked("w" * 50)] * 5, record_limit=1)
    assert 0 < len(lines) < 5
    assert "requests are no longer recorded" in (said := capfd.readouterr().err) and said.count("no longer") == 1
    total = sum(file.stat().st_size for file in (tmp_path / "r").rglob("*") if file.is_file())
    assert total <= 2**20


def test_no_link_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "other").write_text("")
    (tmp_path / "r" / "trace.jsonl").symlink_to(tmp_path / "other")
    recorded(monkeypatch, tmp_path / "r", chat())
    assert (tmp_path / "other").read_text() == ""


def test_requests_that_come_too_fast_are_left_out_and_held_up_by_nothing(tmp_path: Path) -> None:
    recorder = Recorder(Recording(record=tmp_path))
    messages = [{"role": "user", "content": "Hi"}]
    begun = [recorder.begin(messages) for _ in range(WAITING + 3)]  # none of them has ended
    assert sum(one is None for one in begun) == 3
    for one in begun:
        recorder.end(one, 3)
    recorder.close()
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == WAITING


def test_nothing_is_recorded_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RECORD, raising=False)
    assert Client().guard._recorder is None
    assert Recording().check() is None


def test_settings_that_can_t_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="--record-texts plain: give hashed or kept"):
        Recording(record=tmp_path, record_texts="plain")
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="can't be written to"):
        Recording(record=tmp_path / "file").check()
    said = Recording(record=tmp_path / "new", record_images="kept").check()
    assert said and "hashes and lengths of their texts, their images as they are" in said
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
