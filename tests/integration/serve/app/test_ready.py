"""Readiness, the probe and the drain before an application of the test's own; tests/e2e does it with vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY, Counter
from starlette.types import ASGIApp

from serve.app.ready import Proof, Ready
from serve.http.middleware import Middleware
from serve.settings.ready import ReadySettings

Behaviour = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]


def good(text: str = "red", logprob: float | None = -0.1) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": [{"logprob": logprob}]}}]}


class Engine:
    """What stands in for vLLM's application: `answer` says what comes out."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.scopes: list[Any] = []

    async def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, good()

    @property
    def probes(self) -> int:
        return sum("circle" in json.dumps(body) for body in self.bodies)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = json.loads((await receive())["body"] or "{}")
        self.bodies.append(body)
        self.scopes.append(scope)
        status, content = await self.answer(body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})


class Guard(Middleware):
    """Something between that refuses all: the probe must not meet it."""

    def __init__(self, app: ASGIApp, refuses: bool) -> None:
        super().__init__(app)
        self._refuses = refuses

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._refuses and scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
        else:
            await self.app(scope, receive, send)


@contextlib.asynccontextmanager
async def running(
    engine: Engine, refuses: bool = False, **settings: Any
) -> AsyncIterator[tuple[Ready, httpx.AsyncClient]]:
    settings = {"every": 0.2, "limit": 0.2, "first_limit": 2.0, **settings}
    app = Ready(Guard(Proof(engine), refuses), ReadySettings(model="m", **settings))
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan", "app": "vllm's"}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    await outbox.get()
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield app, client
    await inbox.put({"type": "lifespan.shutdown"})
    await life
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


async def wait_for(app: Ready, state: str, within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while app.state != state:
        assert time.monotonic() < deadline, (app.state, app.reason)
        await asyncio.sleep(0.01)


async def steadily(act: Callable[[], Awaitable[Any]], seconds: float, gap: float, begin: Callable[[], Any]) -> Any:
    """Act again and again until that was done for so long without a longer gap; return what `begin` said at the start.

    On a busy machine this process itself may stand still for longer than what is tested allows: then it begins anew.
    """
    began = last = time.monotonic()
    said = begin()
    while last - began < seconds:
        await act()
        await asyncio.sleep(0.02)
        now = time.monotonic()
        if now - last > gap:
            began, said = now, begin()
        last = now
    return said


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_ready_once_an_image_question_was_answered() -> None:
    engine, gate = Engine(), asyncio.Event()

    async def slow(body: dict[str, Any]) -> tuple[int, Any]:
        await gate.wait()
        return 200, good("")  # random weights may say nothing

    engine.answer = slow  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine, refuses=True, limit=5.0, began=time.monotonic() - 100) as (app, client):
            before = await client.get("/ready")
            assert before.status_code == 503 and before.json()["state"] == "starting" and before.json()["reason"]
            gate.set()
            await wait_for(app, "ready")
            after = await client.get("/ready")
            assert (after.status_code, after.json()) == (200, {"ready": True, "state": "ready", "failures": 0})
            assert after.headers["cache-control"] == "no-store"
            assert (await client.head("/ready")).content == b""

    run(test)
    (image, text) = engine.bodies[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text["text"]
    assert engine.bodies[0]["model"] == "m" and engine.bodies[0]["logprobs"] is True
    assert engine.scopes[0]["app"] == "vllm's"  # its handlers look there for the engine
    assert 100 < (REGISTRY.get_sample_value("qvl_start_seconds") or 0) < 1000


def test_a_first_answer_that_took_too_long_is_asked_for_again() -> None:
    engine, gate = Engine(), asyncio.Event()

    async def cold(body: dict[str, Any]) -> tuple[int, Any]:
        if len(engine.bodies) == 1:
            await gate.wait()
        return 200, good()

    engine.answer = cold  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine, first_limit=60.0) as (app, _):
            await asyncio.sleep(0.3)  # longer than a later answer may take
            assert app.state == "starting"
            gate.set()
            await wait_for(app, "ready")
            assert engine.probes >= 2

    run(test)


@pytest.mark.parametrize(
    ("status", "content"),
    [(200, good("!!!!!!!!")), (200, good("red", float("nan"))), (200, good("red", None)), (500, "Out of range float")],
)
def test_overflow_ends_the_boot(status: int, content: Any) -> None:
    engine = Engine()

    async def overflown(body: dict[str, Any]) -> tuple[int, Any]:
        return status, content

    engine.answer = overflown  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine) as (app, client):
            await wait_for(app, "failed")
            said = (await client.get("/ready")).json()
            assert "--dtype bfloat16" in said["reason"] and not said["ready"]
            await asyncio.sleep(0.5)
            assert app.state == "failed" and engine.probes == 1

    run(test)


def test_a_refused_first_question_names_what_may_be_missing() -> None:
    engine = Engine()

    async def refuse(body: dict[str, Any]) -> tuple[int, Any]:
        return 400, {"error": {"message": "no chat template"}}

    engine.answer = refuse  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine) as (app, _):
            await wait_for(app, "failed")
            assert "no chat template" in app.reason and "qvl inspect" in app.reason

    run(test)


def test_it_flips_when_the_engine_stops_answering_and_back() -> None:
    engine = Engine()
    hung = asyncio.Event()

    async def maybe(body: dict[str, Any]) -> tuple[int, Any]:
        if hung.is_set():
            await asyncio.sleep(3600)
        return 200, good()

    engine.answer = maybe  # type: ignore[method-assign]
    failures = REGISTRY.get_sample_value("qvl_probe_failures_total") or 0.0

    async def test() -> None:
        async with running(engine) as (app, client):
            await wait_for(app, "ready")
            assert REGISTRY.get_sample_value("qvl_ready") == 1
            hung.set()
            await wait_for(app, "stalled")
            assert REGISTRY.get_sample_value("qvl_ready") == 0
            said = (await client.get("/ready")).json()
            assert said["failures"] >= 1 and "has not answered an image question within 0.2 s" in said["reason"]
            deadline = time.monotonic() + 60
            while app.failures < 3:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            hung.clear()
            await wait_for(app, "ready")
            assert app.failures == 0

    run(test)
    assert (REGISTRY.get_sample_value("qvl_probe_failures_total") or 0) >= failures + 3


def test_real_answers_make_the_probe_needless() -> None:
    engine = Engine()

    async def test() -> None:
        async with running(engine, every=1.0) as (app, client):
            await wait_for(app, "ready")
            before = await steadily(
                lambda: client.post("/v1/chat/completions", json={}), 1.5, 0.5, lambda: engine.probes
            )
            assert engine.probes == before
            began = time.monotonic()
            while engine.probes == before:  # these do not come out of the engine
                assert time.monotonic() - began < 30
                await client.get("/v1/models")
                await asyncio.sleep(0.05)

    run(test)


def test_what_the_guard_answers_proves_nothing() -> None:
    engine = Engine()

    async def test() -> None:
        async with running(engine, refuses=True) as (app, client):
            await wait_for(app, "ready")
            began = time.monotonic()
            while engine.probes < 3:
                assert time.monotonic() - began < 30
                assert (await client.post("/v1/chat/completions", json={})).status_code == 401
                await asyncio.sleep(0.05)

    run(test)


def test_an_error_of_the_engine_is_looked_into_at_once() -> None:
    engine = Engine()
    dead = asyncio.Event()

    async def dying(body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {}) if dead.is_set() else (200, good())

    engine.answer = dying  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine, every=3600) as (app, client):
            await wait_for(app, "ready")
            dead.set()
            await client.post("/v1/chat/completions", json={})
            await wait_for(app, "stalled")

    run(test)


def test_a_slow_probe_under_load_is_no_failure() -> None:
    """The probe waits its turn behind others whose answers keep coming: slow is not dead."""
    engine = Engine()

    async def busy(body: dict[str, Any]) -> tuple[int, Any]:
        if "circle" in json.dumps(body) and len(engine.bodies) > 1:
            await asyncio.sleep(3600)
        return 200, good()

    engine.answer = busy  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine, limit=1.0) as (app, client):
            await wait_for(app, "ready")
            while engine.probes < 2:
                await asyncio.sleep(0.01)
            before = await steadily(
                lambda: client.post("/v1/chat/completions", json={}), 1.5, 0.5, lambda: app.failures
            )
            assert app.state == "ready" and app.failures <= before

    run(test)


def test_an_engine_that_computes_for_others_is_alive() -> None:
    """All slots are taken by long answers that come in one piece: only vLLM's count of tokens shows that it works."""
    engine = Engine()
    tokens = Counter("vllm:generation_tokens", "Stands for vLLM's own.", ["engine"])

    async def full(body: dict[str, Any]) -> tuple[int, Any]:
        if len(engine.bodies) > 1:
            await asyncio.sleep(3600)
        return 200, good()

    engine.answer = full  # type: ignore[method-assign]

    async def test() -> None:
        async with running(engine, every=0.1, limit=1.0) as (app, _):
            await wait_for(app, "ready")

            async def compute() -> None:
                tokens.labels("0").inc(7)

            await steadily(compute, 2.5, 0.4, lambda: None)
            assert app.state == "ready" and app.failures == 0 and engine.probes >= 2
            await wait_for(app, "stalled")  # it has stopped computing

    try:
        run(test)
    finally:
        REGISTRY.unregister(tokens)


#: A server that answers when there is a file, some of it at once if asked; like vLLM it ends by itself on SIGINT.
_SERVER = """
import asyncio, json, os, sys, uvicorn
from serve.app.ready import Proof, Ready
from serve.settings.ready import ReadySettings
from tests.integration.serve.app.test_ready import Engine, good

class Slow(Engine):
    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            return await super().__call__(scope, receive, send)
        kind = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b'data: {"begun": 1}' + bytes([10, 10]), "more_body": True})
        await self.wait()

    async def answer(self, body):
        if "circle" not in json.dumps(body):
            await self.wait()
        return 200, good("done")

    async def wait(self):
        print("arrived", flush=True)
        while not os.path.exists(sys.argv[3]):
            await asyncio.sleep(0.01)

app = Ready(Proof(Slow()), ReadySettings(model="m", drain=float(sys.argv[2]), limit=60.0))
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


@contextlib.contextmanager
def serving(drain: float, go: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-c", _SERVER, str(port), str(drain), str(go)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    break
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ask_in_thread(process: subprocess.Popen[bytes], url: str, **options: Any) -> tuple[threading.Thread, list[Any]]:
    """Ask, and return when the server has the request."""
    answers: list[Any] = []

    def go() -> None:
        try:
            answers.append(httpx.post(url, timeout=120, trust_env=False, **options))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    assert process.stdout is not None and process.stdout.readline() == b"arrived\n"
    return thread, answers


@pytest.mark.slow
def test_drain(tmp_path: Path) -> None:
    with serving(100, tmp_path / "go") as (process, url):
        thread, answers = ask_in_thread(process, f"{url}/v1/chat/completions", json={})
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready", trust_env=False).json()["state"] != "draining":
            time.sleep(0.01)
        refused = httpx.post(f"{url}/v1/chat/completions", json={}, trust_env=False)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "100"
        assert refused.headers["connection"] == "close" and refused.json()["error"]["code"] == "draining"
        ready = httpx.get(f"{url}/ready", trust_env=False)
        assert ready.status_code == 503 and ready.json()["state"] == "draining"
        (tmp_path / "go").touch()
        thread.join()
        assert answers[0].json()["choices"][0]["message"]["content"] == "done"
        process.wait(timeout=120)


@pytest.mark.slow
def test_what_does_not_finish_within_the_drain_is_told_so(tmp_path: Path) -> None:
    with serving(1, tmp_path / "go") as (process, url):
        thread, answers = ask_in_thread(process, f"{url}/v1/chat/completions", json={})
        stream, streamed = ask_in_thread(process, f"{url}/v1/completions", content=b"text/event-stream; charset=utf-8")
        whole, cut = ask_in_thread(process, f"{url}/v1/completions", content=b"application/json")
        process.send_signal(signal.SIGTERM)
        for each in (thread, stream, whole):
            each.join()
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "draining"
        begun, last, rest = streamed[0].text.split("\n\n")
        assert (begun, rest) == ('data: {"begun": 1}', "")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "draining" and "before the answer was complete" in error["message"]
        assert isinstance(cut[0], httpx.RemoteProtocolError)  # only a connection that breaks says that it is not whole
        process.wait(timeout=120)
