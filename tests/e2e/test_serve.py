"""The real vLLM serves the embedded model: fp16, GEMM and GEMV; it starts, answers and ends as promised."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil
import pytest
import torch

from serve.process import lifecycle, state
from serve.process.repack import servable
from serve.process.status import known_server
from serve.settings.config import ServerConfig
from tests.e2e.conftest import BOOT_SECONDS, Question, Said, Served, chat, free_port, top_logprobs
from tests.support.command import called
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.cli import app
from toolkit.errors import ServerError
from toolkit.paths import demo_checkpoint

#: On one worker with the others that need the shared servers without a guard.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]


def qvl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=BOOT_SECONDS, env={**os.environ, **environment}
    )


def right(question: Question, answer: str) -> bool:
    return answer.strip().lower() in [expected.lower() for expected in question.answers]


def answers(server: lifecycle.Server, questions: list[Question]) -> list[str]:
    return [str(chat(server, question)["message"]["content"]) for question in questions]


def share_right(questions: list[Question], given: list[str]) -> float:
    return sum(right(question, answer) for question, answer in zip(questions, given, strict=True)) / len(questions)


def reference_logprobs(checkpoint: Path, questions: list[Question]) -> list[dict[str, float]]:
    """The log-probability of every first token by transformers in float32, by the token's text."""
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    from PIL import Image
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(checkpoint)
    found = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        with Image.open(question.image) as image, torch.no_grad():
            logits = model(**processor(images=[image.convert("RGB")], text=[text], return_tensors="pt")).logits
        logprobs = logits[0, -1].log_softmax(-1)
        found.append({processor.decode([i]): float(v) for i, v in enumerate(logprobs)})
    return found


def test_fp16_answers_held_out_questions(served: Served, questions: list[Question]) -> None:
    given = answers(served("demo"), questions)
    assert share_right(questions, given) >= 0.8, [(q.task, q.answers, a) for q, a in zip(questions, given, strict=True)]


@pytest.mark.supports("qwen2_vl", "16 bits", "vllm", "CPU")
def test_fp16_agrees_with_transformers_in_float32(served: Served, questions: list[Question]) -> None:
    sample = questions[::4]
    for question, expected in zip(sample, reference_logprobs(demo_checkpoint(), sample), strict=True):
        seen = top_logprobs(served("demo"), question)
        likeliest = max(seen, key=lambda token: seen[token])
        assert seen[likeliest] == pytest.approx(expected[likeliest], abs=5e-3), question
        for token, value in seen.items():
            if value > -8:  # float16 keeps three digits
                assert value == pytest.approx(expected[token], abs=5e-2), (question, token)


@pytest.mark.supports("qwen2_vl", "gemm", "vllm", "CPU")
def test_awq_answers_held_out_questions(ours: Said, questions: list[Question]) -> None:
    assert share_right(questions, ours.answers) >= 0.75


@pytest.mark.supports("qwen2_vl", "gemv", "vllm", "CPU")
def test_gemv_is_served_as_the_same_bytes(awq_gemm: Path, awq_gemv: Path, cache: Path) -> None:
    """What vLLM would read of the GEMV layout; test_mixed.py boots one."""
    twin = servable(Checkpoint.open(awq_gemv))
    assert twin.path.parent == cache / "gemm"
    ours = Checkpoint.open(awq_gemm)
    assert twin.config == ours.config and twin.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(twin.get(name), ours.get(name)) for name in ours.tensors)


@pytest.mark.supports("qwen2_vl", "16 bits", "vllm", "CPU")
@pytest.mark.supports("qwen2_vl", "gemm", "vllm", "CPU")
@pytest.mark.supports("qwen2_vl", "16 bits", "transformers", "CPU")
@pytest.mark.supports("qwen2_vl", "gemm", "transformers", "CPU")
@pytest.mark.parametrize("model", ["demo", "awq"])
def test_verify_finds_that_transformers_answers_alike(
    served: Served, awq_gemm: Path, model: str, tmp_path: Path
) -> None:
    directory = str(awq_gemm) if model == "awq" else "demo"
    server = served(awq_gemm if model == "awq" else "demo")
    found = called(app, "verify", directory, "--url", server.url, "--samples", "4", "--json")
    assert found.returncode == 0, found
    told = json.loads(found.stdout)
    assert told["same"] and told["dtype"] == "float16"
    assert all(sample["prompts_equal"] and sample["compared"] for sample in told["samples"])
    if model == "awq":
        return
    # the same server, held against a copy of the model with another template and other bounds
    copy = tmp_path / "copy"
    shutil.copytree(demo_checkpoint(), copy)
    template = copy / "chat_template.json"
    template.write_text(json.dumps({"chat_template": json.loads(template.read_text())["chat_template"] + "Well: "}))
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    for key in ("size", "min_pixels", "max_pixels"):
        settings.pop(key, None)
    (copy / "preprocessor_config.json").write_text(json.dumps({**settings, "min_pixels": 784, "max_pixels": 3136}))
    found = called(app, "verify", str(copy), "--url", server.url, "--samples", "2", "--json")
    assert found.returncode == 1, found
    causes = {cause["kind"] for sample in json.loads(found.stdout)["samples"] for cause in sample["causes"]}
    assert causes == {"image size", "chat template"}


def test_ask_streams_the_answer(served: Served, questions: list[Question]) -> None:
    server = served("demo")
    word = next(question for question in questions if "word" in question.task)
    expected = answers(server, [word])[0]
    asked = qvl("ask", "--url", server.url, "--image", str(word.image), word.question)
    assert (asked.returncode, asked.stdout) == (0, f"{expected}\n"), asked
    two = qvl(
        "ask", "--url", server.url, "--image", str(word.image), "--image", str(word.image), "--json", word.question
    )
    printed = json.loads(two.stdout)
    assert printed["model"] == "demo" and printed["completion_tokens"] >= 1
    assert 0 < printed["first_token_seconds"] <= printed["seconds"]


def test_errors_of_the_api(served: Served) -> None:
    server = served("demo")
    for arguments, message in (
        (["--max-tokens", "100000", "Why?"], "answers 400"),
        (["--model", "nobody", "Why?"], "answers 404"),
        (["--image", "http://127.0.0.1:9/none.png", "Why?"], "answers "),
    ):
        asked = called(app, "ask", "--url", server.url, *arguments)
        assert asked.returncode == 2 and message in asked.stderr and "Traceback" not in asked.stderr, asked


def test_more_images_than_allowed(served: Served, questions: list[Question]) -> None:
    server = served("demo")
    images = [part for _ in range(9) for part in ("--image", str(questions[0].image))]
    asked = called(app, "ask", "--url", server.url, *images, "Why?")
    assert asked.returncode == 2 and "answers 400" in asked.stderr and "8" in asked.stderr


def test_status_knows_it_and_its_port_is_refused(served: Served) -> None:
    server = served("demo")
    known = known_server(server.port)
    assert known.state == "ready" and known.pid == server.pid and known.model_name == "demo"
    assert known.memory is not None and 300 << 20 < known.memory < 6 << 30
    listed = json.loads(qvl("status", "--json").stdout)
    assert server.port in [entry["port"] for entry in listed]
    again = qvl("serve", "demo", "--port", str(server.port))
    assert again.returncode == 2 and f"port {server.port} is taken by qvl's server of demo" in again.stderr


def test_vllm_that_dies_while_booting() -> None:
    port = free_port()
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-flag 3") as died:
        lifecycle.start("demo", ServerConfig(port=port, timeout=BOOT_SECONDS, extra=("--no-such-flag", "3")))
    assert len(str(died.value).splitlines()) <= 6
    assert state.load(port) is None


def test_not_ready_in_time() -> None:
    port = free_port()
    with pytest.raises(ServerError, match=r"not ready after 2 s: it was still \w+"):
        lifecycle.start("demo", ServerConfig(port=port, timeout=2))
    assert state.load(port) is None


class Foreground:
    """A `qvl serve` in the foreground, as a terminal would run it."""

    def __init__(self, output: TextIO, port: int, *arguments: str) -> None:
        self.port = port
        self._output = Path(output.name)
        command = [sys.executable, "-m", "toolkit.cli", "serve", "demo", "--port", str(port), *arguments]
        self.process = subprocess.Popen(command, stdout=output, stderr=output)

    @property
    def printed(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while text not in self.printed:
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.1)

    def members(self) -> list[psutil.Process]:
        known = state.load(self.port)
        assert known is not None
        return state.group_members(known)

    def members_with_an_engine(self) -> list[psutil.Process]:
        """Return its processes once a second one has begun to import torch."""
        deadline = time.monotonic() + BOOT_SECONDS
        while sum(map(imports_torch, self.members())) < 2:
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.05)
        return self.members()


def imports_torch(process: psutil.Process) -> bool:
    try:
        return "/libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def foreground(tmp_path: Path, *arguments: str) -> Iterator[Foreground]:
    with (tmp_path / "output").open("w") as output:
        server = Foreground(output, free_port(), *arguments)
        try:
            yield server
        finally:
            known = state.load(server.port)
            if server.process.poll() is None:
                server.process.kill()
            server.process.wait()
            if known is not None:
                state.end_group(known, grace=0)


def gone(processes: list[psutil.Process], within: float) -> bool:
    deadline = time.monotonic() + within
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_ctrl_c_while_booting_leaves_no_process(tmp_path: Path) -> None:
    with foreground(tmp_path) as server:
        server.wait_for("starting the engine")
        members = server.members_with_an_engine()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=180) == 130
        assert len(members) >= 2
        assert gone(members, within=0.5)
        assert state.load(server.port) is None
        assert "Traceback" not in server.printed


def test_killed_while_booting_leaves_no_process(tmp_path: Path) -> None:
    with foreground(tmp_path) as server:
        server.wait_for("starting the engine")
        members = server.members_with_an_engine()
        server.process.kill()
        assert len(members) >= 2
        assert gone(members, within=30)
