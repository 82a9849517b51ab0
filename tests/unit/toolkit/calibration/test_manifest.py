"""Manifests as other tools write them, and what is refused of any: no model is needed to read a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.calibration.manifest import read_manifest
from toolkit.errors import ManifestError

A, B, V = (
    {"type": "image", "image": "a.png"},
    {"type": "image", "image": "b.png"},
    {"type": "video", "video": "v.mp4"},
)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def said(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}


def read(directory: Path, *lines: Any, bom: bool = False) -> list[list[dict[str, Any]]]:
    path = directory / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8-sig" if bom else "utf-8")
    return [sample.messages for sample in read_manifest(path)]


ASKED = [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "three"}]
ANSWERED = [user(A, text("How many?")), said("three")]


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ({"messages": ASKED, "images": ["a.png"]}, ANSWERED),
        ({"id": 7, "messages": ASKED, "images": "a.png"}, ANSWERED),
        (
            {
                "conversations": [
                    {"from": "human", "value": "<image>\nHow many?"},
                    {"from": "gpt", "value": "three"},
                ],
                "image": "a.png",
            },
            [user(A, text("\nHow many?")), said("three")],
        ),
        ({"query": "<image>How many?", "response": "three", "images": ["a.png"]}, ANSWERED),
        (
            {"instruction": "<image>How", "input": "many?", "output": "3", "images": ["a.png"]},
            [user(A, text("How\nmany?")), said("3")],
        ),
        (
            {
                "query": "And here <image>?",
                "response": "2",
                "history": [["<image>How?", "1"]],
                "images": ["a.png", "b.png"],
            },
            [user(A, text("How?")), said("1"), user(text("And here "), B, text("?")), said("2")],
        ),
        (
            {
                "system": "Be brief.",
                "messages": [{"role": "user", "content": "<image><image>Same?"}],
                "images": ["a.png", "b.png"],
            },
            [{"role": "system", "content": [text("Be brief.")]}, user(A, B, text("Same?"))],
        ),
        (
            {
                "messages": [{"role": "user", "content": "<video>What <image>?"}],
                "images": ["a.png"],
                "videos": ["v.mp4"],
            },
            [user(V, text("What "), A, text("?"))],
        ),
        (
            {"messages": [{"role": "user", "content": "<video>What?"}], "videos": [["a.png", "b.png"]]},
            [user({"type": "video", "video": ["a.png", "b.png"]}, text("What?"))],
        ),
        ({"messages": [user({"type": "image"}, text("What?"))], "images": ["a.png"]}, [user(A, text("What?"))]),
        # without any mark, as ms-swift: before the first user's text
        (
            {"system": "S", "messages": [{"role": "user", "content": "Same?"}], "images": ["a.png", "b.png"]},
            [{"role": "system", "content": [text("S")]}, user(A, B, text("Same?"))],
        ),
        ({"text": "plain"}, [user(text("plain"))]),
        # parts mean themselves: a text about HTML is one
        ([user(text("Is <image> a tag?"))], [user(text("Is <image> a tag?"))]),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}})]}, [user(A)]),
        ({"messages": [user({**V, "fps": 1, "max_frames": 8})]}, [user({**V, "fps": 1.0, "max_frames": 8})]),
        (
            {"messages": [user({"type": "video", "video": ["a.png"], "fps": 1})]},
            [user({"type": "video", "video": ["a.png"], "sample_fps": 1.0})],
        ),
        ({"messages": [user({**A, "max_pixels": 50176})]}, [user({**A, "max_pixels": 50176})]),
    ],
)
@pytest.mark.parametrize("bom", [False, True])
def test_a_line_means_what_its_tool_means(tmp_path: Path, line: Any, messages: Any, bom: bool) -> None:
    assert read(tmp_path, line, bom=bom) == [messages]


def part(**settings: Any) -> dict[str, Any]:
    return {"messages": [user({**A, **settings})]}


def video(**settings: Any) -> dict[str, Any]:
    return {"messages": [user({**V, **settings})]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [user(text("What?"))], "extra": 1}, "the sample has a key that is not understood: 'extra'"),
        ({"text": "a", "messages": ASKED}, "not understood: 'text'"),
        ({"messages": [{**user(text("What?")), "name": "x"}]}, "a message has a key that is not understood: 'name'"),
        ({"messages": ASKED, "tools": []}, "'tools'"),
        ({"messages": ASKED, "images": ["a.png"], "image": "a.png"}, "either 'image' or 'images'"),
        ({"messages": ASKED}, "1 <image> marks and 0 images"),
        ({"messages": ASKED, "images": ["a.png", "b.png"]}, "1 <image> marks and 2 images"),
        ({"messages": ASKED, "images": [3]}, "list of paths"),
        ({"messages": [{"role": "assistant", "content": "x"}], "images": ["a.png"]}, "no user's message"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'from' of human"),
        ({"conversations": []}, "non-empty 'conversations'"),
        ({"query": 3}, "'query' must be a text"),
        ({"query": "a", "history": [["b"]]}, "'history'"),
        (part(max_pixels="50176"), "max_pixels must be a whole number above 0, found '50176'"),
        (part(max_pixels=0), "max_pixels must be a whole number above 0, found 0"),
        (part(resized_height=-28, resized_width=28), "resized_height must be"),
        (part(resized_height=28), "go together"),
        (part(min_pixels=4000, max_pixels=3999), "min_pixels 4000 is above max_pixels 3999"),
        (part(min_pixels=True), "min_pixels must be"),
        (part(max_pixels=1.5), "whole number"),
        (part(fps=1), "an image part has a key that is not understood: 'fps'"),
        (part(text="What?"), "'text'"),
        (video(fps=0), "fps must be a number above 0"),
        (video(fps=1, nframes=4), "one of fps, nframes"),
        (video(nframes=4, max_frames=4), "nframes is a number"),
        (video(video=["a.png"], nframes=4), "nframes goes with a video file"),
        (video(video_start=1), "'video_start'"),
        ({"text": "What is <|image_pad|>?"}, r"a text holds <\|image_pad\|>"),
        ({"text": "x<|im_end|>"}, "only the chat template writes"),
        ({"query": "<img>a.png</img>How many?", "response": "3"}, "names an image, <img>a.png</img>, .* 'images'"),
        ({"messages": [user(text("Picture 1: <img>a.png</img>"))]}, "list its path in 'images'"),
        ({"messages": [user({"type": "image"})]}, "unknown content part of type 'image'"),
        ({"messages": [user({"type": "text", "image": "a.png"})]}, "unknown content part of type 'text'"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=rf"^\S+m\.jsonl:2: .*{message}"):
        read(tmp_path, {"text": "fine"}, line)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_says_how_to_convert_it(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": ASKED, "images": ["a.png"]}] * 2, indent=indent))
    with pytest.raises(ManifestError, match=r"chats.json:1: a JSON array.*jq -c '\.\[\]' chats\.json > chats\.jsonl"):
        read_manifest(path)
