"""The guard of a public server: an ASGI middleware before vLLM's app that lets nothing in which was not thought of.

    client -> key -> route and method -> rate -> body (size, time) -> JSON -> fields, texts, pictures -> vLLM

What fails is refused with an error in OpenAI's shape, counted in `qvl_refusals_total{reason}`, and never reaches vLLM.
What passes is cancelled in the engine when its client leaves or its time is up. Nothing of a request is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from serve.guard.body import Checker, parse
from serve.guard.fetch import Fetcher
from serve.guard.headers import harden
from serve.guard.keys import Keys
from serve.guard.rate import Clients
from serve.guard.retry import Beginning
from serve.http.errors import Refusal, error_body
from serve.http.metrics import refusals
from serve.settings.environment import GUARD
from serve.settings.limits import Limits
from toolkit.errors import ServerError

__all__ = ["Guard"]

Message = dict[str, Any]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Requests that vLLM failed before it answered, and that were sent to it a second time.
retries = Counter("qvl_retries", "Requests given to the engine a second time.")

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
#: Method of each route that a client with a key may use.
_ROUTES = {_CHAT: "POST", _COMPLETIONS: "POST", "/v1/models": "GET", "/metrics": "GET", "/version": "GET"}
#: What load balancers ask, without a key.
_OPEN = frozenset({"/health", "/ready"})
#: Headers that vLLM gets to see. It would let a client choose a data-parallel rank with others.
_INNER_HEADERS = frozenset({b"host", b"content-type", b"accept", b"user-agent", b"authorization", b"x-request-id"})
#: Bodies held at one time, as multiples of the largest one allowed.
_BODIES_HELD = 16
#: Seconds that the rest of a refused body is read, so that a client still sending it sees the refusal.
_LINGER = 1.0
#: Seconds beyond its time after which a request is cancelled by force, if the engine has not let go of it.
_FORCE = 10.0
_DISCONNECT = {"type": "http.disconnect"}


class _Gone(Exception):
    """The client left before its request was complete."""


class Guard:
    """ASGI middleware; its settings are the environment variable QVL_GUARD, see `serve.settings.limits.Limits`.

    Raises ServerError when that is absent or the key file can't be read: no server is better than an open one.
    """

    def __init__(self, app: App, limits: Limits | None = None, fetcher: Fetcher | None = None) -> None:
        if limits is None:
            if GUARD not in os.environ:
                raise ServerError(f"{GUARD} is not set: start the server with `qvl serve`.")
            limits = Limits.loads(os.environ[GUARD])
        self._app, self._limits = app, limits
        path = None if limits.api_key_file is None else Path(limits.api_key_file)
        self._keys = Keys(path, limits.api_key) if limits.needs_key else None
        self._clients = Clients(limits.rate_per_minute, limits.max_concurrency)
        self._checker = Checker(limits)
        self._fetcher = fetcher or Fetcher(limits.image_hosts, limits.max_image_bytes, limits.image_fetch_seconds)
        self._routes = _ROUTES | {path: method for method, _, path in (r.partition(" ") for r in limits.allow_routes)}
        self._origins = frozenset(origin.encode() for origin in limits.cors_origins)
        self._held = 0
        _harden_uvicorn()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of any kind that ASGI knows."""
        if scope["type"] == "http":
            await _Request(self, scope, receive, send).serve()
        elif scope["type"] == "websocket":
            await self._refuse_websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @staticmethod
    async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
        refusals.labels("route").inc()
        await receive()  # its opening
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # not accepted yet: the client sees a bare 403
            return
        for message in Refusal(403, "route", "There are no websockets here.").sends():
            await send(message | {"type": f"websocket.{message['type']}"})


def _harden_uvicorn() -> None:
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:  # then it uses h11
        return
    harden(HttpToolsProtocol, lambda reason: refusals.labels(reason).inc())


class _Request:
    """One HTTP request on its way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.limits = guard, guard._limits
        self.scope, self.receive, self.send = scope, receive, send
        self.state: dict[str, Any] = scope.setdefault("qvl", {"id": "", "key": None, "refused": None})
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        self.headers: dict[bytes, bytes] = {}
        self.repeated: set[bytes] = set()
        for name, value in scope["headers"]:
            if name in self.headers:
                self.repeated.add(name)
            self.headers[name] = value
        self.cors = self._cors()
        #: Whether a body may still be on its way.
        self.unread = b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"
        self.held = 0
        #: What vLLM gets, until it answers.
        self.body = b""
        self.started = self.streams = self.finished = self.late = self.gone = False
        self.deadline = 0.0

    async def serve(self) -> None:
        """Refuse the request or hand it on."""
        try:
            await self._serve()
        except Refusal as refusal:
            await self._refuse(refusal)
        except _Gone:
            pass
        finally:
            self._let_go()

    async def _serve(self) -> None:
        method: str = self.scope["method"]
        if self.path in _OPEN and method in ("GET", "HEAD"):
            await self.guard._app(self.scope | {"method": "GET"}, self.receive, self.send)
            return
        if method == "OPTIONS" and self.cors and b"access-control-request-method" in self.headers:
            await self._preflight()
            return
        name = self._client()
        expected = self.guard._routes.get(self.path)
        if expected is None:
            raise Refusal(404, "route", "There is no such route here.")
        if method != expected and not (method == "HEAD" and expected == "GET"):
            allowed = expected if expected == "POST" else "GET, HEAD"
            raise Refusal(
                405, "method", f"This route takes {allowed} only.", headers=[(b"allow", allowed.encode())]
            )  # fmt: skip
        if expected == "GET":
            # Answered by vLLM in no time, without its engine. uvicorn leaves out the body where HEAD was asked.
            await self.guard._app(self._inner_scope("GET"), self.receive, self._out)
            return
        self.guard._clients.enter(name)
        try:
            await self._post()
        finally:
            self.guard._clients.leave(name)

    def _client(self) -> str:
        """Return under which name the request's client is counted; refuse one without a key that is let in."""
        keys = self.guard._keys
        if keys is None:
            client = self.scope.get("client")
            return client[0] if client else ""
        scheme, _, key = self.headers.get(b"authorization", b"").partition(b" ")
        name = keys.name_of(key.strip())
        if name is None or scheme.lower() != b"bearer" or b"authorization" in self.repeated:
            raise Refusal(
                401,
                "key",
                "Give a key that this server knows in the header: Authorization: Bearer KEY.",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        self.state["key"] = name
        return name

    async def _post(self) -> None:
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + self.limits.request_seconds
        body = await self._read()
        request = parse(body, self.limits)
        checker = self.guard._checker
        if self.path == _CHAT:
            body = await checker.chat(request, body, self.guard._fetcher.fetch)
        elif self.path == _COMPLETIONS:
            checker.completion(request)
        else:
            checker.other(request)
        del request
        self.body = body
        inner = self._inner_scope("POST", len(body))
        del body
        try:
            async with asyncio.timeout_at(self.deadline + _FORCE):
                beginning = Beginning(self._out)
                try:
                    await self._answer(inner, beginning)
                except Exception:  # vLLM has sent its error, and raises it too
                    await beginning.release()
                    raise
                if beginning.failed and not (self.late or self.gone):
                    retries.inc()
                    await self._answer(inner, self._out)
                else:
                    await beginning.release()
        except TimeoutError:
            if not self.late:
                raise
        finally:
            if self.late:
                await self._end_late()

    async def _answer(self, inner: Scope, send: Send) -> None:
        """Have vLLM answer."""
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": self.body, "more_body": False}
            return await self._leaves()

        # A scope of its own: vLLM's application writes into it.
        await self.guard._app(dict(inner), replay, send)

    def _inner_scope(self, method: str, length: int | None = None) -> Scope:
        headers = [header for header in self.scope["headers"] if header[0] in _INNER_HEADERS]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        return self.scope | {"method": method, "headers": headers}

    async def _read(self) -> bytes:
        """Return the whole body."""
        content_type = self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if content_type != b"application/json":
            raise Refusal(415, "body_json", "Send JSON, with the header Content-Type: application/json.")
        if self.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "body_json", "Compressed bodies are not taken. Leave Content-Encoding out.")
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self.limits.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return await self._pieces()
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise Refusal(408, "body_time", f"The request did not arrive within {seconds:g} s.") from None

    async def _pieces(self) -> bytes:
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self.receive()
            if message["type"] != "http.request":
                raise _Gone
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > self.limits.max_body_bytes:
                raise self._too_large()
            self.held += len(piece)
            self.guard._held += len(piece)
            if self.guard._held > _BODIES_HELD * self.limits.max_body_bytes:
                raise Refusal(
                    429, "concurrency", "Too many large requests are under way.", headers=[(b"retry-after", b"1")]
                )  # fmt: skip
            pieces.append(piece)
        self.unread = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_size", f"The request has more than {self.limits.max_body_bytes} bytes.")

    def _let_go(self) -> None:
        self.guard._held -= self.held
        self.held = 0

    async def _leaves(self) -> Message:
        """Return when the client leaves or its time is up: for vLLM both mean to abort."""
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
                self.gone = message["type"] == "http.disconnect"
                return message
        except TimeoutError:
            self.late = not self.finished
            return _DISCONNECT

    async def _out(self, message: Message) -> None:
        if self.late:  # vLLM answers nobody, as it believes
            return
        if message["type"] == "http.response.start":
            self.started = True
            self.body = b""  # vLLM has read it
            self._let_go()
            headers = list(message["headers"])
            self.streams = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
            message = message | {"headers": headers + self.cors} if self.cors else message
        elif not message.get("more_body", False):
            self.finished = True
        await self.send(message)

    async def _end_late(self) -> None:
        """Tell the client that its time is up."""
        self._count("timeout")
        text = f"The answer was not complete after {self.limits.request_seconds:g} s."
        if not self.started:
            for message in Refusal(504, "timeout", text).sends(self.cors):
                await self.send(message)
        elif self.streams:
            event = b"data: " + error_body(text, "timeout_error", "timeout") + b"\n\n"
            await self.send({"type": "http.response.body", "body": event})
        # Else the answer was cut in the middle, which uvicorn shows by closing the connection.

    def _count(self, reason: str) -> None:
        self.state["refused"] = reason
        refusals.labels(reason).inc()

    async def _refuse(self, refusal: Refusal) -> None:
        self._count(refusal.reason)
        self._let_go()
        headers = [*self.cors, (b"connection", b"close")] if self.unread else self.cors
        start, body = refusal.sends(headers)
        await self.send(start)
        if not self.unread or refusal.reason == "body_time":
            await self.send(body)
            return
        await self.send(body | {"more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (message := await self.receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await self.send({"type": "http.response.body", "body": b""})

    def _cors(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that let a page of another origin read the answer, if its origin is one that may."""
        origin = self.headers.get(b"origin")
        if origin is None or origin not in self.guard._origins:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]

    async def _preflight(self) -> None:
        headers = [
            *self.cors,
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})
