"""What the end-to-end tests share: the embedded model, quantized once, and servers, each booted at most once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.lifecycle import Server, start
from serve.media import image_url
from serve.options import ServeOptions
from toolkit.demo import write_tasks
from toolkit.formats.convert import convert
from toolkit.quantize import quantize

#: Boots a model, or returns the server that was booted before.
Served = Callable[[Path | str], Server]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, for these tests and the commands they run."""
    directory = tmp_path_factory.mktemp("cache")
    before = os.environ.get("QVL_CACHE")
    os.environ["QVL_CACHE"] = str(directory)
    yield directory
    if before is None:
        del os.environ["QVL_CACHE"]
    else:
        os.environ["QVL_CACHE"] = before


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def awq_gemm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in AWQ, GEMM layout."""
    out: Path = quantize("demo", tmp_path_factory.mktemp("gemm") / "demo-awq", samples=32)
    return out


@pytest.fixture(scope="session")
def awq_gemv(awq_gemm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in GEMV layout."""
    return convert(awq_gemm, tmp_path_factory.mktemp("gemv") / "demo-awq-gemv", "gemv")


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """Boot models, each once; all are stopped when the session ends."""
    servers: dict[str, Server] = {}

    def boot(model: Path | str) -> Server:
        if str(model) not in servers:
            servers[str(model)] = start(str(model), ServeOptions(port=free_port(), timeout=180))
        return servers[str(model)]

    yield boot
    for server in servers.values():
        server.stop(drain=False)


@dataclass(frozen=True)
class Question:
    """A held-out picture question."""

    task: str
    image: Path
    question: str
    answers: list[str]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Four held-out questions of every task."""
    file = write_tasks(tmp_path_factory.mktemp("tasks"), per_task=4)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [Question(x["task"], file.parent / x["image"], x["question"], x["answers"]) for x in lines]


def chat(server: Server, question: Question, **settings: Any) -> dict[str, Any]:
    """Ask without streaming; returns the first choice. `settings` go into the request."""
    content = [
        {"type": "image_url", "image_url": {"url": image_url(str(question.image))}},
        {"type": "text", "text": question.question},
    ]
    body = {
        "model": server.model_name,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 32,
        **settings,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice
