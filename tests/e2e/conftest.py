"""What the end-to-end tests share: the embedded model, quantized once, and servers, each booted at most once.

Servers that tests start by `lifecycle.start` are forked by a zygote (tests/support/zygote.py), those that they start by
a command (`qvl serve`, `qvl bench`) boot as a user's do. Fixtures are of this package's scope, not of the session's: a
worker that goes on with other tests stops its servers first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.http.images import image_url
from serve.process import launch
from serve.process.lifecycle import Server, start
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits
from tests.conftest import TOLD
from tests.support.leftovers import Leftovers
from tests.support.zygote import Zygote
from toolkit.formats.convert import convert
from toolkit.quantize import quantize
from toolkit.tasks.manifests import write_tasks

#: Longest that a boot may take: on an idle machine a few seconds, beside much else minutes.
BOOT_SECONDS = 600.0

#: Boots a model, or returns the server that was booted before.
Served = Callable[[Path | str], Server]


@pytest.fixture(scope="package", autouse=True)
def leftovers() -> Iterator[Leftovers]:
    """Ends what these tests have started, when they are killed."""
    with Leftovers() as watched:
        yield watched


@pytest.fixture(scope="package", autouse=True)
def cache(leftovers: Leftovers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of their own, for these tests and the commands they run."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVL_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="package", autouse=True)
def zygote(cache: Path, pytestconfig: pytest.Config) -> Iterator[Zygote | None]:
    """Imports vLLM once for all servers that this process starts, on a CPU: CUDA does not outlive a fork."""
    if ServerConfig().on_gpu:
        yield None
        return
    with Zygote() as started, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "spawn", started.spawn(launch.spawn))
        yield started
    if started.differed:
        names = ", ".join(sorted(started.differed))
        pytestconfig.stash[TOLD].append(f"servers were booted the slow way, which takes 15 s more: {names} differed")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the directory ``name`` that ``make`` writes, made once for all workers of a session."""
    shared = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        if not (shared / name).exists():
            make(shared / name)
    return shared / name


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def booted(model: Path | str, config: ServerConfig) -> Iterator[Server]:
    """A server that is killed at the end, which saves the seconds of a drain; test_ready.py has servers drain."""
    server = start(str(model), config)
    try:
        yield server
    finally:
        server.stop(drain=False)


@pytest.fixture(scope="package")
def awq_gemm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in AWQ, GEMM layout; whichever worker needs it first makes it for all."""
    return once(tmp_path_factory, "demo-awq", lambda out: quantize("demo", out, samples=32))


@pytest.fixture(scope="package")
def awq_gemv(awq_gemm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in GEMV layout."""
    return convert(awq_gemm, tmp_path_factory.mktemp("gemv") / "demo-awq-gemv", "gemv")


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    """Boot models, each once; all are stopped at the end."""
    servers: dict[str, Server] = {}

    def boot(model: Path | str) -> Server:
        if str(model) not in servers:
            servers[str(model)] = start(str(model), ServerConfig(port=free_port(), timeout=BOOT_SECONDS))
        return servers[str(model)]

    yield boot
    for server in servers.values():
        server.stop(drain=False)


@dataclass(frozen=True)
class Guarded:
    """Two servers behind the guard."""

    #: demo-awq, with /play and the other beside it.
    url: str
    #: demo; no more than two requests of a key at once.
    narrow_url: str
    key: str = "k-0123456789"


@pytest.fixture(scope="package")
def guarded(awq_gemm: Path) -> Iterator[Guarded]:
    """The embedded model in AWQ and in fp16, as `qvl serve --play --play-beside` has them."""
    ends = Guarded(*(f"http://127.0.0.1:{free_port()}" for _ in range(2)))
    beside = ServerConfig(
        port=int(ends.narrow_url.rpartition(":")[2]),
        timeout=BOOT_SECONDS,
        guard=Limits(api_key=ends.key, max_concurrency=2),
    )
    options = ServerConfig(
        port=int(ends.url.rpartition(":")[2]),
        timeout=BOOT_SECONDS,
        guard=Limits(api_key=ends.key),
        play=True,
        play_beside=ends.narrow_url,
        extra=("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    )
    with booted("demo", beside), booted(awq_gemm, options):
        yield ends


@dataclass(frozen=True)
class Said:
    """What a server says to the held-out questions, and with what probability it begins to say it."""

    answers: list[str]
    #: Of every fourth question: the log-probabilities of the likeliest first tokens.
    first: list[dict[str, float]]


def said(server: Server, questions: list[Question]) -> Said:
    """Ask it all questions, one after the other: answers depend on what is computed together."""
    answers = [str(chat(server, question)["message"]["content"]) for question in questions]
    return Said(answers, [top_logprobs(server, question) for question in questions[::4]])


def top_logprobs(server: Server, question: Question, **settings: Any) -> dict[str, float]:
    """The likeliest first tokens and their log-probabilities."""
    first = chat(server, question, max_tokens=1, logprobs=True, top_logprobs=5, **settings)["logprobs"]["content"][0]
    return {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]}


@pytest.fixture(scope="package")
def ours(served: Served, awq_gemm: Path, questions: list[Question]) -> Said:
    """What the embedded model in AWQ says."""
    return said(served(awq_gemm), questions)


#: Limits of the server that is attacked, in seconds.
BODY_SECONDS, REQUEST_SECONDS = 2.0, 15.0


@dataclass(frozen=True)
class Public:
    """A server as it would stand on a public address."""

    url: str
    pid: int
    log: Path
    key_file: Path
    keys: tuple[str, str]


@pytest.fixture(scope="package")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    """The embedded model behind the guard, with keys in a file."""
    keys = ("first-key-0123456789abcdef", "second-key-0123456789abcdef")
    key_file = tmp_path_factory.mktemp("keys") / "keys"
    key_file.write_text("# of the tests\n" + "\n".join(keys) + "\n")
    limits = Limits(
        api_key_file=str(key_file),
        body_seconds=BODY_SECONDS,
        request_seconds=REQUEST_SECONDS,
        image_hosts=("localhost",),
        max_decoded_pixels=100_000_000,
    )
    with booted("demo", ServerConfig(port=free_port(), timeout=BOOT_SECONDS, guard=limits)) as server:
        yield Public(server.url, server.pid, server.log, key_file, keys)


@dataclass(frozen=True)
class Question:
    """A held-out image question."""

    task: str
    image: Path
    question: str
    answers: list[str]


@pytest.fixture(scope="package")
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
