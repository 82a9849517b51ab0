"""Limits on what comes before a request is one: its headers. An ASGI application never sees a request without them.

uvicorn reads headers with httptools, without a bound on their size or on the time they take: one stranger who sends
headers for ever holds memory, a thousand who send none hold file descriptors. Its protocol class is given both bounds
here, and an answer in OpenAI's shape to what is not HTTP. Where uvicorn uses h11 instead, h11 has a bound of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from serve.http.errors import Refusal

__all__ = ["harden"]

_log = logging.getLogger("qvl.guard")
_METHODS = ("connection_made", "connection_lost", "data_received", "on_headers_complete", "on_message_complete")


def harden(
    protocol: type[Any],
    count: Callable[[str], None],
    *,
    max_bytes: int = 64 << 10,
    seconds: float = 10.0,
) -> bool:
    """Bound the headers that a protocol class of uvicorn's takes; returns whether that could be done. Idempotent.

    Args:
        protocol: `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol`, or a subclass of it.
        count: called with the reason of each refusal.
        max_bytes: of a request's line and headers; up to one read from the socket (256 KiB) more may get in.
        seconds: from the connection, or the first byte of a later request, to the end of the headers.
    """
    if getattr(protocol, "qvl_hardened", False):
        return True
    if not all(hasattr(protocol, name) for name in (*_METHODS, "send_400_response")):
        _log.warning("this release of uvicorn is not known: sizes and times of headers are not limited")
        return False
    made, lost, received, headers, message = (getattr(protocol, name) for name in _METHODS)

    def refuse(self: Any, refusal: Refusal) -> None:
        count(refusal.reason)
        start, body = refusal.sends([(b"connection", b"close")])
        head = f"HTTP/1.1 {start['status']} {HTTPStatus(start['status']).phrase}\r\n".encode()
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in start["headers"])
        self.transport.write(head + lines + b"\r\n" + body["body"])
        self.transport.close()

    def stop_timer(self: Any) -> None:
        if self.qvl_timer is not None:
            self.qvl_timer.cancel()
            self.qvl_timer = None

    def start_timer(self: Any) -> None:
        text = f"The request's headers did not arrive within {seconds:g} s."
        self.qvl_timer = self.loop.call_later(seconds, refuse, self, Refusal(408, "header", text))

    def connection_made(self: Any, transport: Any) -> None:
        made(self, transport)
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, False, False
        start_timer(self)

    def connection_lost(self: Any, error: Exception | None) -> None:
        stop_timer(self)
        lost(self, error)

    def data_received(self: Any, data: bytes) -> None:
        self.qvl_ended = False
        received(self, data)
        if self.qvl_ended or self.qvl_within or self.transport.is_closing():
            return
        self.qvl_bytes += len(data)
        if self.qvl_bytes > max_bytes:
            refuse(self, Refusal(431, "header", f"The request's headers have more than {max_bytes} bytes."))
        elif self.qvl_timer is None:
            start_timer(self)

    def on_headers_complete(self: Any) -> None:
        stop_timer(self)
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, True, True
        headers(self)

    def on_message_complete(self: Any) -> None:
        self.qvl_within, self.qvl_ended = False, True
        message(self)

    def send_400_response(self: Any, msg: str) -> None:
        stop_timer(self)
        refuse(self, Refusal(400, "header", "The request is not HTTP/1.1 as it should be."))

    for function in (connection_made, connection_lost, data_received, on_headers_complete, on_message_complete):
        setattr(protocol, function.__name__, function)
    protocol.send_400_response = send_400_response
    protocol.qvl_hardened = True
    return True
