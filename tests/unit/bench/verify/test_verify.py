"""Seeded causes: a server that is transformers itself, set up otherwise, and what verify says of it."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bench.run import boot
from bench.verify.compare import Cause, Parting, Rounding, parting, prompt_causes, spread
from bench.verify.reference import Reference
from bench.verify.run import Verified, verify
from bench.verify.samples import QUESTION, Asked, asked
from bench.verify.served import Served
from serve.settings.config import ServerConfig
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.cli import app
from toolkit.errors import ManifestError, MediaError
from toolkit.paths import demo_checkpoint

#: Tokens of an answer.
LENGTH = 6


class Played(Reference):
    """A server's side, made by transformers: all that a test seeds is changed on this object."""

    #: Its own default of sampling.
    default_penalty = 1.0

    def served(self, chat: Asked) -> Served:
        prompt = self.prompt(chat)
        logprobs = self.first(prompt)
        values, ids = logprobs.topk(20)
        return Served(
            prompt.ids,
            self.answer(prompt, LENGTH).ids,
            dict(zip(ids.tolist(), values.tolist(), strict=True)),
            self.answer(prompt, LENGTH, self.default_penalty).ids,
        )


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture(scope="module")
def chats() -> list[Asked]:
    return asked(None, 2)


@pytest.fixture
def server(checkpoint: Checkpoint) -> Played:
    return Played(checkpoint)


def compared(checkpoint: Checkpoint, chats: list[Asked], server: Played, dtype: str = "float16") -> Verified:
    return verify(checkpoint, [(chat, server.served(chat)) for chat in chats], dtype=dtype)


def kinds(found: Verified) -> set[str]:
    return {cause.kind for sample in found.samples for cause in sample.causes}


def messages(found: Verified) -> str:
    return "\n".join(cause.message for sample in found.samples for cause in sample.causes)


@pytest.mark.slow
def test_a_server_that_answers_alike(checkpoint: Checkpoint, chats: list[Asked], server: Played) -> None:
    server.rounded(torch.float16)
    found = compared(checkpoint, chats, server)
    assert found.same and kinds(found) <= {"tie"}
    for sample, chat in zip(found.samples, chats, strict=True):
        assert sample.prompts_equal and sample.first_token is not None
        assert sample.compared >= 1 and sample.images[0].served == sample.images[0].tokens
        assert (sample.images[0].width, sample.images[0].height) == chat.images[0].size
        pixels = checkpoint.family.token_pixels(checkpoint.vision)
        assert sample.images[0].resized[0] * sample.images[0].resized[1] == sample.images[0].tokens * pixels
    assert 0 < found.rounding.found["float16"] < found.rounding.found["bfloat16"]
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_images_that_are_resized_otherwise(checkpoint: Checkpoint, chats: list[Asked], server: Played) -> None:
    size = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    processor = server.processor.image_processor
    processor.size = type(processor.size)(**size) if not isinstance(processor.size, dict) else size
    found = compared(checkpoint, chats, server)
    assert not found.same and kinds(found) == {"image size"}
    image = found.samples[0].images[0]
    assert image.served is not None and image.served <= 4 < image.tokens
    assert f"{image.tokens} tokens in transformers" in messages(found) and "max_pixels" in messages(found)
    assert found.samples[0].first_token is None


@pytest.mark.slow
def test_another_chat_template(checkpoint: Checkpoint, chats: list[Asked], server: Played) -> None:
    template = server.processor.chat_template
    assert isinstance(template, str)
    server.processor.chat_template = template + "{{ 'Answer: ' }}"
    found = compared(checkpoint, chats, server)
    assert not found.same and kinds(found) - {"tie"} == {"chat template"}
    assert "--chat-template" in messages(found)
    # with the server's tokens the answers are the same: the template is all there is
    assert all(sample.first_token is not None and sample.first_token < 0.01 for sample in found.samples)


@pytest.mark.slow
def test_a_server_in_bfloat16(checkpoint: Checkpoint, chats: list[Asked], server: Played) -> None:
    server.rounded(torch.bfloat16)
    found = compared(checkpoint, chats, server)
    assert not found.same and "dtype" in kinds(found)
    assert "bfloat16" in messages(found)
    assert compared(checkpoint, chats, server, "bfloat16").same


@pytest.mark.slow
def test_other_weights(checkpoint: Checkpoint, chats: list[Asked], server: Played) -> None:
    with torch.no_grad():
        for layer in server.model.model.language_model.layers:
            layer.mlp.down_proj.weight *= 0.5
    found = compared(checkpoint, chats, server)
    assert not found.same and "kernel or weights" in kinds(found)


@pytest.mark.slow
def test_other_sampling_by_default(checkpoint: Checkpoint, chats: list[Asked], server: Played) -> None:
    server.default_penalty = 5.0
    found = compared(checkpoint, chats, server)
    assert not found.same and kinds(found) - {"tie"} == {"sampling defaults"}
    assert "--generation-config" in messages(found)


@pytest.mark.slow
def test_what_may_be_read_in_two_ways_is_said(
    checkpoint: Checkpoint, chats: list[Asked], server: Played, tmp_path: Path
) -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (0, 0, 60, 100))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "b.png")
    (tmp_path / "c.txt").write_text("no image")
    turned, clear = asked(tmp_path, 9)
    assert turned.images[0].size == (100, 200) and "turned by its EXIF data" in turned.remarks[0]
    assert "transparent" in clear.remarks[0] and clear.messages[0]["content"][1]["text"] == QUESTION
    lying = dataclasses.replace(turned, images=[turned.images[0].transpose(Image.Transpose.ROTATE_90)])
    found = verify(checkpoint, [(turned, server.served(lying))], dtype="float16")
    assert not found.same and "image reading" in kinds(found)


class TestAsked:
    def line(self, tmp_path: Path, *messages: dict[str, Any]) -> list[Asked]:
        Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
        file = tmp_path / "m.jsonl"
        file.write_text(json.dumps({"messages": list(messages)}))
        return asked(file, 4)

    def test_a_manifest_of_calibration(self, tmp_path: Path) -> None:
        image = {"type": "image_url", "image_url": {"url": "a.png"}}
        text = {"type": "text", "text": "What?"}
        found = self.line(
            tmp_path, {"role": "user", "content": [image, text]}, {"role": "assistant", "content": "A square."}
        )
        assert len(found) == 1 and [turn["role"] for turn in found[0].turns] == ["user"]
        assert found[0].turns[0]["content"] == [{"type": "image"}, text]
        assert found[0].messages[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")

    @pytest.mark.parametrize(
        ("message", "said"),
        [
            ({"role": "assistant", "content": "Yes."}, "no question, only answers"),
            ({"role": "user", "content": [{"type": "video", "video": ["a.png"]}]}, "a video"),
            (
                {"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 900}]},
                "bounds of its own",
            ),
        ],
    )
    def test_what_is_not_asked(self, tmp_path: Path, message: dict[str, Any], said: str) -> None:
        with pytest.raises(ManifestError, match=said):
            self.line(tmp_path, message)

    def test_bad_images(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match="holds no images"):
            asked(tmp_path, 1)
        (tmp_path / "a.png").write_bytes(b"no image")
        with pytest.raises(MediaError, match=r"a\.png"):
            asked(tmp_path, 1)


class TestCompare:
    def test_where_answers_part(self) -> None:
        margins = [1.0, 0.5, 0.1]
        assert parting([1, 2, 3], margins, [1, 2, 3], [9]) is None
        assert parting([1, 2, 3], margins, [1, 4, 3], [9]) == Parting(1, 2, 4, 0.5)
        assert parting([1, 2, 9], margins, [1, 2], [9]) is None  # the end token may be left out
        assert parting([1, 2, 3], margins, [1, 2], [9]) == Parting(2, 3, None, 0.1)
        assert parting([1, 9], margins[:2], [1, 9, 5], [9]) == Parting(2, None, 5, 0.5)
        assert parting([1, 2], margins[:2], [1, 2, 5], [9]) is None  # cut off at the length that was asked

    def test_a_prompt_without_its_image(self) -> None:
        causes = list(prompt_causes([1, 7, 7, 2], [1, 2], 7, 784, str))
        assert [cause.kind for cause in causes] == ["chat template"] and "1 and 0 images" in causes[0].message
        assert list(prompt_causes([1, 7, 7, 2], [1, 7, 7, 2], 7, 784, str)) == []

    def test_the_furthest_token_counts(self) -> None:
        ours = {1: -0.1, 2: -3.0, 3: -20.0}
        assert spread(ours, {1: -0.2, 2: -3.5}) == pytest.approx(0.5)
        assert spread(ours, {}) == 0.0

    def test_rounding_names_the_precision(self) -> None:
        rounding = Rounding({"float16": 0.01, "bfloat16": 0.1})
        assert rounding.explains(0.03, "float16") is None
        told = [rounding.explains(distance, "float16") for distance in (0.2, 2.0)]
        assert [cause.kind for cause in told if isinstance(cause, Cause)] == ["dtype", "kernel or weights"]
        assert rounding.explains(0.2, "bfloat16") is None
        exact = rounding.explains(0.03, "float32")
        assert exact is not None and exact.kind == "dtype" and "float16" in exact.message


class _Handler(BaseHTTPRequestHandler):
    answers: dict[str, Any]

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._send(200, {"/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": "0.32.0"}}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if "image_url" in part)
        found = self.answers.get(url)
        if found is None:
            self._send(400, {"error": {"message": "return_token_ids is not taken"}})
            return
        neutral = "repetition_penalty" in body
        likely = [{"token": f"token_id:{token}", "logprob": value} for token, value in found.first.items()]
        choice = {"token_ids": found.tokens if neutral else found.default}
        if body.get("logprobs"):
            assert body["return_tokens_as_token_ids"] and body["top_logprobs"] == 20
            choice["logprobs"] = {"content": [{"top_logprobs": likely}]}
        self._send(200, {"prompt_token_ids": found.prompt, "choices": [choice]})

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url(server: Played, chats: list[Asked]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers as `Played` does, over HTTP."""
    server.rounded(torch.float16)
    answers: dict[str, Any] = {}
    for chat in chats:
        answers[chat.messages[-1]["content"][0]["image_url"]["url"]] = server.served(chat)
    handler = type("Handler", (_Handler,), {"answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", answers
        httpd.shutdown()
        thread.join()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", "demo", "--samples", "2", "--tokens", str(LENGTH), *arguments])


@pytest.mark.slow
def test_the_verb(url: tuple[str, dict[str, Any]]) -> None:
    root, answers = url
    result = run("--url", root, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "transformers and the server answer alike" in result.stdout
    first = next(iter(answers))
    answers[first] = dataclasses.replace(answers[first], first=dict.fromkeys(answers[first].first, -5.0))
    result = run("--url", root, "--json", "--device", "cpu")
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    assert told["same"] is False and told["server"] == "0.32.0"
    assert [cause["kind"] for cause in told["samples"][0]["causes"]] == ["kernel or weights"]
    result = run("--url", root, "--device", "cpu")
    assert result.exit_code == 1 and "kernel or weights" in result.stdout


@pytest.mark.slow
def test_without_an_address_a_server_is_started_and_stopped(
    url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    server = SimpleNamespace(url=url[0], api_key=None, stop=lambda: said.append("stopped"))

    def server_of(source: str, options: ServerConfig, on_phase: Any) -> Any:
        said.append(f"{source} in {options.dtype}")
        return (lambda: server), (lambda: None)

    monkeypatch.setattr(boot, "server_of", server_of)
    result = run("--device", "cpu", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert said == ["demo in float16", "stopped"]


@pytest.mark.slow
def test_mistakes_are_one_line(url: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    root, answers = url
    answers.clear()
    for arguments, said in (
        (("--url", root), "refuses .*return_token_ids is not taken"),
        (("--url", root, "--name", "other"), "does not serve 'other'"),
        (("--url", "http://127.0.0.1:9"), "no server answers"),
        (("--url", root, "--images", str(tmp_path / "none.jsonl")), "no calibration manifest"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0 and isinstance(result.exception, Exception)
        assert re.search(said, str(result.exception)), result.exception
    assert run("--tokens", "0").exit_code == 2
