"""The outermost middleware: gives each request an id, writes one JSON line about it and counts it.

A line never holds a prompt, an image, a key, a query string or a header of the client, but for the request's id and
that of the trace (https://www.w3.org/TR/trace-context/) that it belongs to.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Any

from prometheus_client import Counter, Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import Headers
from serve.http.logs import line, write
from serve.http.middleware import Middleware
from serve.settings.environment import REQUEST_LOG

__all__ = ["ROUTES", "RequestLog"]

#: Routes that are told apart; a stranger's paths must not become labels.
ROUTES = frozenset(
    {
        "/health",
        "/ready",
        "/metrics",
        "/play",
        "/version",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
    }
)
#: Asked for every few seconds by machines: counted, and logged only when something is wrong. /ready not even then:
#: what changes its answer is logged where it happens.
_POLLED = frozenset({"/health", "/ready", "/metrics"})
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Version 00 of the header: trace, span and flags. All zeros is no id.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACE_HEADERS = frozenset({b"traceparent", b"tracestate"})
_MOST_TRACESTATE = 512
#: What nginx logs where the client went away before the answer.
_CLIENT_GONE = 499

#: What those inside may know of a request.
_NOTED = ("key", "images", "prompt_tokens", "completion_tokens", "trace", "refused")

_REQUESTS = Counter("qvl_requests_total", "Requests by route and status.", ["route", "status"])
_IN_FLIGHT = Gauge("qvl_in_flight", "Requests under way.")


class RequestLog(Middleware):
    """ASGI middleware. Puts `scope["qvl"]` with what its line is to say, which the middleware inside it fills in."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app)
        self._logs = os.environ.get(REQUEST_LOG) == "1"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its id; write its line when it has ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        asked = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        number = asked if _SAFE_ID.fullmatch(asked) else uuid.uuid4().hex
        notes: dict[str, Any] = {"id": number, **dict.fromkeys(_NOTED)}
        notes["trace"], headers = _traced([each for each in scope["headers"] if each[0] != b"x-request-id"])
        scope = {**scope, "qvl": notes, "headers": [*headers, (b"x-request-id", number.encode())]}
        status, bytes_in, bytes_out = 0, 0, 0

        async def counted_receive() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
                others = [(name, value) for name, value in message.get("headers", ()) if name != b"x-request-id"]
                message = {**message, "headers": [*others, (b"x-request-id", number.encode())]}
            bytes_out += len(message.get("body", b""))
            await send(message)

        _IN_FLIGHT.inc()
        failed = False
        try:
            await self.app(scope, counted_receive, marked_send)
        except Exception:
            failed = True
            raise
        finally:
            _IN_FLIGHT.dec()
            status = status or (500 if failed else _CLIENT_GONE)
            route = _route(scope["path"])
            _REQUESTS.labels(route, str(status)).inc()
            if self._logs and route != "/ready" and not (route in _POLLED and status < 400):
                seconds = round(time.perf_counter() - began, 6)
                more = {
                    "id": number,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": seconds,
                    "bytes_in": bytes_in,
                    "bytes_out": bytes_out,
                    **{name: notes[name] for name in _NOTED},
                }
                write(line("error" if status >= 500 else "info", "qvl.requests", "request", **more))


def _traced(headers: Headers) -> tuple[str | None, Headers]:
    """Return the id of the trace that a request belongs to, and its headers; without those of a trace if they are not
    as they should be: strangers send them, and they go on to whatever collects traces.
    """
    parents = [value for name, value in headers if name == b"traceparent"]
    states = [value for name, value in headers if name == b"tracestate"]
    found = _TRACEPARENT.fullmatch(parents[0].decode("latin-1")) if len(parents) == 1 else None
    if found is None:
        return None, [each for each in headers if each[0] not in _TRACE_HEADERS]
    if sum(map(len, states)) > _MOST_TRACESTATE or not all(state.isascii() for state in states):
        headers = [each for each in headers if each[0] != b"tracestate"]
    return found[1], headers


def _route(path: str) -> str:
    if path.startswith("/play/"):
        return "/play"
    return path if path in ROUTES else "other"
