from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from bench.inputs import SpeedInputs, parse_sizes
from toolkit.errors import BenchError


def test_sizes_are_read() -> None:
    assert parse_sizes("224x224, 336X252,text,224x224") == ((224, 224), (336, 252), None)


@pytest.mark.parametrize("text", ["", "224", "224x", "x224", "0x0", "20x224", "-28x28", "99999x28", "2.5x28"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="image size"):
        parse_sizes(text)


def test_every_picture_and_prompt_is_unique_and_repeatable() -> None:
    inputs = SpeedInputs("n", ((56, 84), None, (84, 56)), 16)
    requests = [inputs.request(block, i) for block in ("warm-up/1", "load/0/1", "load/1/1") for i in range(30)]
    assert len({request.text for request in requests}) == len(requests)
    pictures = [picture for request in requests for picture in request.images]
    assert len(pictures) == len(set(pictures)) == 60
    pixels = {Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))).tobytes() for p in pictures}
    assert len(pixels) == 60  # a server may key its cache by pixels rather than by bytes
    assert inputs.request("load/0/1", 4) == inputs.request("load/0/1", 4)
    assert inputs.request("load/0/1", 0) != SpeedInputs("other", inputs.sizes, 16).request("load/0/1", 0)


def test_prompts_differ_from_their_first_word_on() -> None:
    inputs = SpeedInputs("n", (None,), 16)
    assert len({inputs.request("b", i).text[:14] for i in range(200)}) == 200


def test_a_block_goes_through_all_sizes() -> None:
    inputs = SpeedInputs("n", ((56, 84), None), 16)
    bodies = [json.loads(body) for body in inputs.bodies("b", 4, "m")]
    assert [len(body["messages"][0]["content"]) for body in bodies] == [2, 1, 2, 1]
    assert all(body["ignore_eos"] and body["max_tokens"] == 16 for body in bodies)
    url = bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (56, 84)
