"""A page at /play to try the server: an image, a question, the answer as it streams, of two servers side by side.

Two ASGI classes for vLLM's --middleware. `Play`, outside the guard, serves the page. `Beside`, inside it, is there when
a second server is compared with: Play takes the page's requests to /play/beside/v1/... for ones to /v1/..., the guard
judges them like any other, and what it lets through Beside sends on to the second server instead of vLLM.

So the page talks to one origin alone: its content security policy can forbid all others, the second server may stay
on an address that only this one reaches, it needs no CORS, and nobody gets to it whom the guard turns away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from importlib import resources

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.guard.hosts import Hosts
from serve.http.errors import Headers, Refusal, error_response
from serve.http.metrics import refusals
from serve.http.middleware import Middleware
from serve.settings.environment import GUARD, PLAY
from serve.settings.limits import Limits
from serve.settings.play import PlayOptions
from toolkit.errors import ServerError

__all__ = ["Beside", "Play"]


_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "png": b"image/png",
    "json": b"application/json",
}
#: Scripts and styles of this server alone, none inline; requests to this server alone; no frames around the page.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_SECURITY: Headers = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]
#: What the page asks of the second server.
_BESIDE = {"/play/beside/v1/models": "GET", "/play/beside/v1/chat/completions": "POST"}
#: Headers of a request and of its answer that pass between the page and the second server.
_REQUEST_HEADERS = (b"authorization", b"content-type", b"x-request-id", b"traceparent", b"tracestate")
_RESPONSE_HEADERS = ("content-type", "retry-after", "x-request-id")
_RESPONSE_TYPES = ("application/json", "text/event-stream")
#: Seconds to connect, and from one piece of an answer to the next. The guard limits the whole.
_CONNECT, _READ = 5.0, 300.0


class Play(Middleware):
    """Serves the page and hands everything else inwards. Settings: QVL_PLAY; the limits it tells of: QVL_GUARD."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app)
        options = PlayOptions.loads(os.environ.get(PLAY, "{}"))
        self._beside = options.beside is not None
        guarded = GUARD in os.environ
        if self._beside and not guarded:
            raise ServerError("--play-beside without the guard would lend the second server to anybody.")
        limits = Limits.loads(os.environ[GUARD]) if guarded else Limits()
        self._hosts = None if limits.needs_key or not guarded else Hosts(limits.hosts, limits.cors_origins)
        self._files = {
            f"/play/{entry.name}": _file(entry.name, entry.read_bytes())
            for entry in resources.files("serve").joinpath("page").iterdir()
        }
        self._files["/play"] = self._files.pop("/play/index.html")
        self._files["/play/settings.json"] = _file("settings.json", _settings(options, limits))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path != "/play" and not path.startswith("/play/"):
            await self.app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            refusals.labels(refusal.reason).inc()
            await _send_all(send, refusal.sends(_SECURITY))
        elif path == "/play/":  # the page's own links are relative to /play
            await _respond(send, 308, [(b"location", b"../play"), (b"content-length", b"0")], b"")
        elif path in self._files:
            await self._send_file(scope, send, *self._files[path])
        elif self._beside and _BESIDE.get(path) == scope["method"]:
            inner = path.removeprefix("/play/beside")
            scope = {**scope, "path": inner, "raw_path": inner.encode(), "query_string": b""}
            scope.setdefault("qvl", {})["beside"] = True
            await self.app(scope, receive, _with_security_headers(send))
        else:
            message = f"There is nothing at {scope['method']} {path}."
            await _send_all(send, error_response(404, message, "invalid_request_error", "route", headers=_SECURITY))

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Return why a page of this server's is not for this request, as the guard would say it."""
        try:
            if self._hosts is not None:
                self._hosts.check(scope)
        except Refusal as refusal:
            return refusal
        return None

    async def _send_file(self, scope: Scope, send: Send, headers: Headers, body: bytes) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _respond(send, 405, [(b"allow", b"GET, HEAD"), (b"content-length", b"0")], b"")
        elif dict(scope["headers"]).get(b"if-none-match") == dict(headers)[b"etag"]:
            await _respond(send, 304, headers, b"")
        else:
            length = (b"content-length", str(len(body)).encode())
            await _respond(send, 200, [*headers, length], b"" if scope["method"] == "HEAD" else body)


class Beside(Middleware):
    """Sends the requests that Play has marked on to the second server, and its answers back as they come."""

    def __init__(self, app: ASGIApp, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(app)
        self._url = PlayOptions.loads(os.environ.get(PLAY, "{}")).beside
        # identity: a compressed stream would be held back until a block of it is full
        self._client = httpx.AsyncClient(
            headers={"accept-encoding": "identity", "user-agent": "qvl-play"},
            timeout=httpx.Timeout(_READ, connect=_CONNECT),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one marked request, or pass it on."""
        if scope["type"] == "lifespan":  # lasts as long as the server
            async with self._client:
                await self.app(scope, receive, send)
            return
        if scope["type"] != "http" or not scope.get("qvl", {}).get("beside"):
            await self.app(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        forward = asyncio.ensure_future(self._forward(scope, body, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((forward, gone), return_when=asyncio.FIRST_COMPLETED)
            if forward.done():
                forward.result()
        finally:  # also when the guard gives the request up: the second server must not answer for nobody
            for task in (forward, gone):
                task.cancel()
            await asyncio.gather(forward, gone, return_exceptions=True)

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name in _REQUEST_HEADERS]
        request = self._client.build_request(
            scope["method"], f"{self._url}{scope['path']}", headers=headers, content=body or None
        )
        started = False
        try:
            response = await self._client.send(request, stream=True)
            async with contextlib.aclosing(response):
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if response.is_redirect or kind not in _RESPONSE_TYPES:
                    await _bad_gateway(send, f"The second server gave no answer of the API ({response.status_code}).")
                    return
                passed = [
                    (name.encode(), response.headers[name].encode())
                    for name in _RESPONSE_HEADERS
                    if name in response.headers
                ]
                await send({"type": "http.response.start", "status": response.status_code, "headers": passed})
                started = True
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx.HTTPError as error:
            if not started:  # else only cutting the response off says that it is not whole
                await _bad_gateway(send, f"The second server can't be reached ({type(error).__name__}).")


def _settings(options: PlayOptions, limits: Limits) -> bytes:
    """Return what the page must know before it asks anything; everybody may read it."""
    settings = {
        "beside": options.beside is not None,
        "token_pixels": options.token_pixels,
        "key": limits.needs_key,
        "images": limits.max_images,
        "image_pixels": limits.max_image_pixels,
        "request_pixels": limits.max_request_pixels,
        "image_bytes": limits.max_image_bytes,
        "body_bytes": limits.max_body_bytes,
        "max_tokens": limits.max_tokens,
    }
    return json.dumps(settings).encode()


def _file(name: str, body: bytes) -> tuple[Headers, bytes]:
    etag = b'"' + hashlib.sha256(body).hexdigest()[:16].encode() + b'"'
    kind = _TYPES[name.rpartition(".")[2]]
    return [(b"content-type", kind), (b"etag", etag), (b"cache-control", b"no-cache")], body


async def _respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    start = {"type": "http.response.start", "status": status, "headers": [*headers, *_SECURITY]}
    await _send_all(send, [start, {"type": "http.response.body", "body": body}])


async def _bad_gateway(send: Send, message: str) -> None:
    await _send_all(send, error_response(502, message, "server_error", "beside"))


async def _send_all(send: Send, messages: Iterable[Message]) -> None:
    for message in messages:
        await send(message)


def _with_security_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_SECURITY]}
        await send(message)

    return sending


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
