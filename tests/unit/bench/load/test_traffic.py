"""The user's own requests: read, made new for a server, replayed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.load import traffic
from bench.load.traffic import Traffic, TrafficInputs, read
from bench.load.workload import Lengths
from toolkit.errors import BenchError, QvlError

PROMPT = "Describe this."


def image_file(path: Path, size: tuple[int, int] = (60, 40), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def manifest(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def says(text: str, *images: str, role: str = "user") -> dict[str, Any]:
    shown = [{"type": "image", "image": each} for each in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def inputs(found: Traffic, **more: Any) -> TrafficInputs:
    return TrafficInputs("nonce", found, Lengths.fixed(9), **more)


def sent(made: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(made.request.body("m"))["messages"]
    return messages


def pixels(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_manifest_of_calibration_is_a_load(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    file = manifest(
        tmp_path / "chats.jsonl",
        {"messages": [says("What is this?", "a.png"), {"role": "assistant", "content": "A square."}]},
        {"text": "Tell me a story."},
        {"query": "<image>And this?", "images": ["a.png"]},
    )
    found = read(file, PROMPT)
    assert len(found.chats) == 3 and not found.timed and "3 chats of chats.jsonl" in found.source
    made = inputs(found, whole=True).made("b", 3)
    bodies = [json.loads(one.request.body("m")) for one in made]
    assert all(body["max_tokens"] == 9 and body["ignore_eos"] for body in bodies)
    content = bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"] and content[1]["text"].endswith("What is this?")
    assert len(bodies[0]["messages"]) == 1  # the answer is the server's to give
    assert [one.shape for one in made] == ["1 image", "text", "1 image"]
    assert [one.sizes for one in made] == [((60, 40),), (), ((60, 40),)]


def test_a_directory_of_images_is_a_load(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image_file(tmp_path / "b.jpg")
    image_file(tmp_path / "in" / "a.webp", (80, 20))
    (tmp_path / "notes.txt").write_text("no image")
    found = read(tmp_path, PROMPT)
    assert f"2 images of {tmp_path.name}" == found.source
    made = inputs(found, whole=True).made("b", 2)
    assert [one.sizes for one in made] == [((60, 40),), ((80, 20),)]
    kinds = [sent(one)[0]["content"][0]["image_url"]["url"].split(";")[0] for one in made]
    assert kinds == ["data:image/jpeg", "data:image/webp"]


def test_no_pass_knows_another_and_a_pass_shares_what_the_traffic_shares(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    system = {"role": "system", "content": "You are brief."}
    chats = [{"messages": [system, says(f"Question {number}", "a.png")]} for number in range(4)]
    found = inputs(read(manifest(tmp_path / "c.jsonl", *chats), PROMPT), whole=True)
    made = found.made("b", 8)  # twice through the file
    beginnings = [sent(one)[0]["content"][0]["text"] for one in made]
    assert len(set(beginnings[:4])) == 1 and len(set(beginnings)) == 2
    images = [sent(one)[1]["content"][0]["image_url"]["url"] for one in made]
    assert len(set(images[:4])) == 1 and len(set(images)) == 2
    # Another block, another run: other pixels, not other bytes alone.
    other = sent(found.made("c", 1)[0])[1]["content"][0]["image_url"]["url"]
    assert np.asarray(pixels(other)).tobytes() != np.asarray(pixels(images[0])).tobytes()
    assert pixels(other).size == (60, 40)
    assert [one.request for one in found.made("b", 8)] == [one.request for one in made]


def test_blocks_begin_anywhere_in_the_file_and_all_of_it_is_used(tmp_path: Path) -> None:
    found = inputs(read(manifest(tmp_path / "c.jsonl", *({"text": f"No {n}"} for n in range(50))), PROMPT))
    first = [sent(found.made(f"b/{block}", 1)[0])[0]["content"][0]["text"].split()[-1] for block in range(40)]
    assert len(set(first)) > 15


def test_a_chat_of_several_turns_is_sent_turn_by_turn_or_as_its_last(tmp_path: Path) -> None:
    turns = [says("One?"), says("1", role="assistant"), says("Two?"), says("2", role="assistant"), says("Three?")]
    found = inputs(read(manifest(tmp_path / "c.jsonl", {"messages": turns}, {"text": "Alone."}), PROMPT), whole=True)
    assert found.turns == 3
    made = found.made("b", 5, chats=True)
    assert [one.follows for one in made] == [False, True, True, False, False]
    assert [len(sent(one)) for one in made] == [1, 3, 5, 1, 1]
    assert sent(made[2])[:3] == sent(made[1])  # a beginning that the server has seen
    assert [len(sent(one)) for one in found.made("b", 2)] == [5, 1]


# --- traces -----------------------------------------------------------------------------------------------------------


def line(at: float, text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"at": at, "messages": [says(text)], "output_tokens": 5} | more


def test_a_trace_is_replayed_at_its_own_times_and_lengths(tmp_path: Path) -> None:
    times = [1000.0, 1000.5, 1003.0, 1010.0, 1010.25, 1020.0]
    lines = [line(at, f"No {index}", output_tokens=index) for index, at in enumerate(times)]
    (tmp_path / "trace").mkdir()
    manifest(tmp_path / "trace" / traffic.TRACE, *lines[::-1])  # written as they ended
    found = read(tmp_path / "trace", PROMPT)
    assert found.timed and found.tells_lengths and found.source == "6 recorded requests of trace"
    assert found.due(1.0) == (0.0, 0.5, 3.0, 10.0, 10.25, 20.0)
    assert found.due(2.0)[-1] == 10.0
    second = found.stretch(1, 2)
    assert second.due(1.0) == (0.0, 0.25, 10.0)
    made = inputs(second, whole=True).made("b", 3)
    assert [one.request.max_tokens for one in made] == [3, 4, 5]
    assert [one.request.max_tokens for one in inputs(found, whole=True).made("b", 2)] == [2, 2]  # one has no TPOT
    with pytest.raises(BenchError, match="6 requests can't be shared out over 7 rounds; lower --rounds"):
        found.stretch(0, 7)
    stretches = [found.stretch(number, 4).chats for number in range(4)]
    assert [chat for part in stretches for chat in part] == list(found.chats)


def test_what_a_trace_tells_by_hash_is_made_again(tmp_path: Path) -> None:
    def hashed(key: str, characters: int, image: str) -> dict[str, Any]:
        parts = [
            {"type": "text", "hash": key, "characters": characters},
            {"type": "image", "hash": image, "width": 70, "height": 50},
        ]
        return {"at": 1.0, "messages": [{"role": "user", "content": parts}], "output_tokens": 4}

    file = manifest(tmp_path / "t.jsonl", hashed("k1", 200, "i1"), hashed("k1", 200, "i1"), hashed("k2", 31, "i2"))
    made = inputs(read(file, PROMPT), whole=True).made("b", 3)
    contents = [sent(one)[0]["content"] for one in made]
    assert contents[0] == contents[1] != contents[2]
    bare = contents[0][0]["text"].split(" ", 8)[-1]
    assert 190 <= len(bare) <= 200
    assert pixels(contents[0][1]["image_url"]["url"]).size == (70, 50)
    assert [one.sizes for one in made] == [((70, 50),)] * 3


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "holds no request"),
        (["no object"], "messages"),
        ([{"messages": [says("Hi", role="assistant")]}], "c.jsonl:1: no user's message"),
        ([line(1.0), {"text": "Hi"}], "1 of 2 lines have 'at'"),
        ([line(float("nan"))], "'at' must be a number of seconds"),
        ([line(1.0, output_tokens=-1)], "'output_tokens' must be a whole number"),
        ([line(1.0, output_tokens=True)], "'output_tokens' must be a whole number"),
        ([line(1.0, model="m")], "a key that is not understood: 'model'"),
        ([{"messages": [says("Hi", "missing.png")]}], "c.jsonl:1: no file at"),
        ([{"messages": [{"role": "user", "content": [{"type": "text", "hash": "k"}]}]}], "something is missing"),
        ([{"messages": [{"role": "user", "content": [{"type": "video", "hash": "k"}]}]}], "a text or an image"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "hash": "k", "width": 0, "height": 5}]}]}],
            "each side must be 1 to",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "video", "video": ["a.png"]}]}]}],
            "give frames as images",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 9}]}]}],
            "max_pixels can't be asked of a server",
        ),
    ],
)
def test_what_can_t_be_a_load_is_refused_with_its_line(tmp_path: Path, lines: list[Any], words: str) -> None:
    image_file(tmp_path / "a.png")
    with pytest.raises(QvlError, match=words):
        read(manifest(tmp_path / "c.jsonl", *lines), PROMPT)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QvlError, match="no such file; give a JSONL file of chats or a directory of images"):
        read(tmp_path / "nowhere", PROMPT)
    with pytest.raises(QvlError, match="no images in it"):
        read(tmp_path, PROMPT)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    with pytest.raises(QvlError, match="not an image that can be read"):
        read(tmp_path, PROMPT)


def test_a_warm_up_shows_the_sizes_of_the_traffic_and_none_of_it(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png", (60, 40))
    image_file(tmp_path / "b.png", (90, 30))
    file = manifest(
        tmp_path / "c.jsonl", {"messages": [says("Two", "a.png", "b.png")]}, {"messages": [says("None at all")]}
    )
    found = inputs(read(file, PROMPT))
    warm = found.warm_up()
    assert {size for made in warm for size in made.sizes} == {(60, 40), (90, 30)}
    assert {len(made.sizes) for made in warm} == {0, 2}
    said = json.dumps([sent(made) for made in warm])
    assert "None at all" not in said and "Two" not in said
