"""Whether the server really answers, and how it ends: /ready, the probe behind it, and draining on SIGTERM.

The probe (`serve.app.probe`) goes past the network, the guard and its limits, through everything else. While real
answers come out of the engine nothing needs to be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import time
from typing import Any, Literal

from prometheus_client import REGISTRY, Counter, Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.app.memory import register as register_memory
from serve.app.probe import Probe, Unfit
from serve.http.errors import error_body, error_response
from serve.http.logs import line, write
from serve.http.metrics import refusals
from serve.http.middleware import Middleware
from serve.settings.environment import READY
from serve.settings.ready import ReadySettings

__all__ = ["PATH", "Proof", "Ready"]

State = Literal["starting", "ready", "stalled", "failed", "draining"]

PATH = "/ready"
#: A successful answer on one of these has come out of the engine: the first bytes are sent with its first token.
_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
#: What a draining server still answers.
_OPEN_WHILE_DRAINING = frozenset({PATH, "/health", "/metrics"})

_READY = Gauge("qvl_ready", "1 when an image question was answered in time and the engine answers still.")
_DRAINING = Gauge("qvl_draining", "1 when no new requests are taken.")
_PROBE_FAILURES = Counter("qvl_probe_failures_total", "Probes without an answer in time.")
_RESTARTS = Gauge("qvl_restarts", "How often the supervisor has restarted the server.")
_START_SECONDS = Gauge("qvl_start_seconds", "Seconds from the command to ready.")


class Ready(Middleware):
    """ASGI middleware that answers /ready, asks the probe and refuses new requests while the server drains."""

    def __init__(self, app: ASGIApp, settings: ReadySettings | None = None) -> None:
        super().__init__(app)
        self.settings = settings or ReadySettings(**json.loads(os.environ[READY]))
        self.state: State = "starting"
        self.reason = "no image question was answered yet"
        #: Probes in a row without an answer in time.
        self.failures = 0
        self._alive_at = time.monotonic()
        self._running: set[asyncio.Task[Any]] = set()
        self._look_now = asyncio.Event()
        self._cut = False
        self._watching: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._probe = Probe(app, self.settings.model)
        register_memory()
        _RESTARTS.set(self.settings.restarts)
        _READY.set(0)
        _DRAINING.set(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer /ready, refuse while draining, pass on what else comes."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == PATH:
            await self._answer(scope, send)
        elif self.state == "draining" and scope["path"] not in _OPEN_WHILE_DRAINING:
            await self._refuse(scope, send)
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and cut it off where the drain has run out of time, with a word of why."""
        started = streams = ended = False

        async def watched(message: Message) -> None:
            nonlocal started, streams, ended
            if message["type"] == "http.response.start":
                started = True
                streams = any(
                    n == b"content-type" and v.startswith(b"text/event-stream") for n, v in message["headers"]
                )
            else:
                ended = not message.get("more_body", False)
            await send(message)

        scope.setdefault("qvl", {})["pulse"] = self._feel
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self._cut:
                raise
            if not started:
                await self._refuse(scope, send)
            elif streams and not ended:
                message = "the server stopped before the answer was complete: try again, at another server or later."
                event = b"data: " + error_body(message, "service_unavailable", "draining") + b"\n\n"
                await send({"type": "http.response.body", "body": event})
            # Any other answer was cut in the middle, which uvicorn shows by closing the connection.
        finally:
            self._running.discard(task)

    def _feel(self, status: int) -> None:
        """Take note of what came out of vLLM: tokens prove that the engine lives, an error is reason to ask it."""
        if status >= 500:
            self._look_now.set()
        else:
            self._prove()

    async def _answer(self, scope: Scope, send: Send) -> None:
        ready = self.state == "ready"
        body: dict[str, Any] = {"ready": ready, "state": self.state, "failures": self.failures}
        if not ready:
            body["reason"] = self.reason
        text = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(text)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200 if ready else 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else text})

    async def _refuse(self, scope: Scope, send: Send) -> None:
        scope.setdefault("qvl", {})["refused"] = "draining"
        refusals.labels("draining").inc()
        wait = str(max(1, math.ceil(self.settings.drain))).encode()
        message = "the server is stopping and takes no new requests: try again, at another server or later."
        headers = [(b"retry-after", wait), (b"connection", b"close")]
        for part in error_response(503, message, "service_unavailable", "draining", headers=headers):
            await send(part)

    # ---- the life of the process

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._probe.host_app = scope.get("app")

        async def watched(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                # vLLM has installed its own handler for SIGTERM and SIGINT by now. This one comes before it.
                with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.begin_drain)
                self._watching = asyncio.create_task(self._watch())

        try:
            await self.app(scope, receive, watched)
        finally:
            if self._watching is not None:
                self._watching.cancel()

    def begin_drain(self) -> None:
        """Take no new requests, let those under way finish or run out of time, then have vLLM end. Idempotent."""
        if self._ending is None:
            self._move("draining", "the server is stopping")
            _DRAINING.set(1)
            if self._watching is not None:
                self._watching.cancel()
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        deadline = time.monotonic() + self.settings.drain
        while self._running and time.monotonic() < deadline:
            await asyncio.wait(self._running, timeout=min(0.2, self.settings.drain))
        if self._running:
            self._log("warning", f"{len(self._running)} requests did not finish within the drain and are cut off")
            self._cut = True
            for task in list(self._running):
                task.cancel()
            await asyncio.wait(self._running, timeout=2)
        await asyncio.sleep(0.05)  # last bytes leave, and requests that were let in before the drain are logged
        os.kill(os.getpid(), signal.SIGINT)  # vLLM's own way to end

    # ---- the probe

    def _prove(self) -> None:
        self._alive_at = time.monotonic()
        self.failures = 0
        if self.state == "stalled":
            self._move("ready", "")

    def _move(self, state: State, reason: str) -> None:
        if state != self.state:
            self._log("warning" if state in ("stalled", "failed") else "info", f"{state}. {reason}".strip())
        self.state, self.reason = state, reason
        _READY.set(state == "ready")

    def _log(self, level: str, message: str) -> None:
        write(line(level, "qvl.ready", message, pid=os.getpid()))

    async def _watch(self) -> None:
        """Ask the first question, then again whenever nothing has proved for a while that the engine answers."""
        settings = self.settings
        await self._ask_first()
        while self.state != "failed":
            wait = self._alive_at + settings.every - time.monotonic()
            if wait > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._look_now.wait(), wait)
                if not self._look_now.is_set():
                    continue  # something else may have proved it meanwhile
            self._look_now.clear()
            asked_at, tokens = time.monotonic(), _tokens()
            problem = await self._probe.ask(settings.limit)
            if problem is None or _tokens() > tokens:  # or it computes for others, whose answers come in one piece
                self._prove()
            elif self._alive_at <= asked_at:  # nobody else got an answer either
                self.failures += 1
                _PROBE_FAILURES.inc()
                self._move("stalled", problem)
                await asyncio.sleep(min(settings.every, 5.0))

    async def _ask_first(self) -> None:
        """Ask until an answer came within the usual limit. An overflow ends it for good."""
        limit = self.settings.first_limit
        while self.state == "starting":
            asked_at = time.monotonic()
            try:
                problem = await self._probe.ask(limit, tokens=8, logprobs=True)
            except Unfit as error:
                self._move("failed", str(error))
                return
            seconds = time.monotonic() - asked_at
            limit = self.settings.limit
            if problem is not None:
                self.failures += 1
                _PROBE_FAILURES.inc()
                self.reason = problem
                await asyncio.sleep(1.0)
            elif seconds <= limit:
                self._alive_at = time.monotonic()
                self.failures = 0
                if self.settings.began is not None:
                    _START_SECONDS.set(round(time.monotonic() - self.settings.began, 3))
                self._move("ready", "")
            else:
                self.reason = f"the first image question took {seconds:.0f} s, and {limit:g} are allowed: asking again"


class Proof(Middleware):
    """ASGI middleware right before vLLM's application that tells `Ready` of answers that have come out of the engine.

    `Ready` itself can't tell: the guard between them answers too, and may put an error at the end of a stream.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; watch the answers of the routes that generate."""
        pulse = scope.get("qvl", {}).get("pulse") if scope["type"] == "http" and scope["path"] in _ROUTES else None
        if pulse is None:
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 500:
                    pulse(status)
            elif status == 200 and message.get("body"):
                pulse(status)
            await send(message)

        await self.app(scope, receive, watched)


def _tokens() -> float:
    """Return how many tokens vLLM says that its engine has computed; 0 where it keeps no statistics."""
    names = ["vllm:generation_tokens_total", "vllm:prompt_tokens_total"]
    metrics = REGISTRY.restricted_registry(names).collect()
    return sum(sample.value for metric in metrics for sample in metric.samples if sample.name in names)
