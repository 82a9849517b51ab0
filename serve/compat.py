"""What of other packages is changed while they run: one class of uvicorn's, one function of vLLM's.

Both are no public interface. `UVICORN` and `VLLM` are the releases that this was written against; a test fails when
others are installed, and says what to look at. Packages that are absent or unknown are left as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from serve.http.errors import Refusal

__all__ = ["UVICORN", "VLLM", "bound_headers", "inspect_in_process", "limit_headers"]

UVICORN, VLLM = "0.54", "0.32"

_log = logging.getLogger("qvl.guard")
_METHODS = (
    "connection_made", "connection_lost", "data_received", "handle_websocket_upgrade", "on_body", "on_header",
    "on_headers_complete", "on_message_complete", "on_response_complete", "pause_writing", "resume_writing",
    "send_400_response",
)  # fmt: skip
#: Requests on one connection that may wait for the first to be answered.
_MOST_WAITING = 16
#: Seconds until a client that reads nothing of its answer is left, and one that was answered last.
_STALLED, _LAST_BYTES = 60.0, 5.0


def inspect_in_process() -> None:
    """Let vLLM look at a model's class in this process.

    It does so in a helper process, to keep CUDA uninitialised here. That process is started from a module of vLLM, so
    nothing of ours would mend it (`toolkit.compat`), and a CPU has no CUDA: running the look-up here works and saves
    its start. Upstream: no issue; it is the installation that does not fit, not vLLM.
    """
    from vllm.model_executor.models import registry

    def run(function: Callable[[], Any]) -> Any:
        return function()

    registry._run_in_subprocess = run


def limit_headers(count: Callable[[str], None], connections: int = 4096, address_connections: int = 512) -> bool:
    """Bound what uvicorn takes, see `bound_headers`; returns whether that could be done. Idempotent.

    Where uvicorn uses h11 instead of httptools, h11 has a bound of its own on headers, and the others are not there.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:  # then it uses h11
        return False
    return bound_headers(HttpToolsProtocol, count, connections=connections, address_connections=address_connections)


def bound_headers(
    protocol: type[Any],
    count: Callable[[str], None],
    *,
    max_bytes: int = 64 << 10,
    seconds: float = 10.0,
    connections: int = 4096,
    address_connections: int = 512,
) -> bool:
    """Bound what a protocol class of uvicorn's takes beside bodies; returns whether that could be done. Idempotent.

    uvicorn reads headers with httptools, without a bound on their size or on the time they take, and an ASGI
    application never sees a request without them: one stranger who sends headers for ever holds memory, a thousand who
    send none hold file descriptors. Trailers become headers too, whatever they say and however many they are, and what
    follows an answer on an unfinished message is read for ever. The class is given bounds on all of it, and an answer
    in OpenAI's shape to what is not HTTP. Upstream: https://github.com/Kludex/uvicorn/issues/157, closed without one
    for httptools.

    Args:
        protocol: `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol`, or a subclass of it.
        count: called with the reason of each refusal.
        max_bytes: of a request's line and headers, of its trailers, and of what stands between two pieces of its body;
            up to one read from the socket (256 KiB) more may get in.
        seconds: from the connection, or the first byte of a later request, to the end of the headers.
        connections: open at one time.
        address_connections: open at one time from one address.
    """
    if getattr(protocol, "qvl_bounded", False):
        return True
    if not all(hasattr(protocol, name) for name in _METHODS):
        _log.warning("this release of uvicorn is not known: sizes and times of headers are not limited")
        return False
    bounds = _Bounds(count, max_bytes, seconds, connections, address_connections)
    for methods in (_of_connections, _of_headers, _of_bodies):
        for function in methods(protocol, bounds):
            setattr(protocol, function.__name__, function)
    protocol.qvl_bounded = True
    return True


def _of_connections(protocol: type[Any], bounds: _Bounds) -> list[Callable[..., None]]:
    """Return the methods that take note of a connection's life, in the place of the class's own."""
    made, lost, upgrade = protocol.connection_made, protocol.connection_lost, protocol.handle_websocket_upgrade
    paused, resumed, answered = protocol.pause_writing, protocol.resume_writing, protocol.on_response_complete

    def connection_made(self: Any, transport: Any) -> None:
        made(self, transport)
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, False, False
        self.qvl_timer = self.qvl_stalled = None
        if bounds.enter(self):
            bounds.start_timer(self)

    def connection_lost(self: Any, error: Exception | None) -> None:
        bounds.stop_timer(self)
        bounds.leave(self)
        resume_writing(self)
        lost(self, error)

    def handle_websocket_upgrade(self: Any) -> None:
        bounds.leave(self)  # another protocol has the connection now, and the guard refuses it
        upgrade(self)

    def pause_writing(self: Any) -> None:
        paused(self)
        if self.qvl_stalled is None:
            self.qvl_stalled = self.loop.call_later(_STALLED, self.transport.abort)

    def resume_writing(self: Any) -> None:
        if self.qvl_stalled is not None:
            self.qvl_stalled.cancel()
            self.qvl_stalled = None
        resumed(self)

    def on_response_complete(self: Any) -> None:
        # Behind it nobody reads the message, so nobody would bound it. With requests waiting it is complete.
        if not self.pipeline and self.cycle.more_body:
            bounds.close(self)
        answered(self)

    return [
        connection_made, connection_lost, handle_websocket_upgrade, pause_writing, resume_writing, on_response_complete
    ]  # fmt: skip


def _of_headers(protocol: type[Any], bounds: _Bounds) -> list[Callable[..., None]]:
    """Return the methods that take note of bytes and headers, in the place of the class's own."""
    received, header, headers = protocol.data_received, protocol.on_header, protocol.on_headers_complete

    def data_received(self: Any, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.qvl_ended = False
        received(self, data)
        if not (self.qvl_ended or self.transport.is_closing()):
            bounds.more(self, len(data))

    def on_header(self: Any, name: bytes, value: bytes) -> None:
        if not self.qvl_within:  # a trailer is no header: it comes after what headers decide
            header(self, name, value)

    def on_headers_complete(self: Any) -> None:
        bounds.stop_timer(self)
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, True, True
        if self.transport.is_closing():
            return
        headers(self)
        if len(self.pipeline) > _MOST_WAITING:
            bounds.close(self)

    return [data_received, on_header, on_headers_complete]


def _of_bodies(protocol: type[Any], bounds: _Bounds) -> list[Callable[..., None]]:
    """Return the methods that take note of bodies and their end, in the place of the class's own."""
    piece, message = protocol.on_body, protocol.on_message_complete

    def on_body(self: Any, body: bytes) -> None:
        self.qvl_bytes, self.qvl_ended = 0, True
        if not self.transport.is_closing():
            piece(self, body)

    def on_message_complete(self: Any) -> None:
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, False, True
        if not self.transport.is_closing():
            message(self)

    def send_400_response(self: Any, msg: str) -> None:
        bounds.stop_timer(self)
        bounds.refuse(self, Refusal(400, "header", "The request is not HTTP/1.1 as it should be."))

    return [on_body, on_message_complete, send_400_response]


@dataclass(frozen=True)
class _Bounds:
    """What the changed methods do. Each connection has a protocol object, which carries its timer and its counts."""

    count: Callable[[str], None]
    max_bytes: int
    seconds: float
    connections: int
    address_connections: int
    #: Connections by address; those without one (Unix sockets) under "".
    open: Counter[str] = field(default_factory=Counter)

    def enter(self, protocol: Any) -> bool:
        """Count a connection in, or refuse it."""
        address = protocol.client[0] if protocol.client else ""
        protocol.qvl_address = None
        if self.open.total() >= self.connections or (address and self.open[address] >= self.address_connections):
            text = "Too many connections are open. Close some, or try again in a moment."
            self.refuse(protocol, Refusal(429, "connections", text, headers=[(b"retry-after", b"1")]))
            return False
        self.open[address] += 1
        protocol.qvl_address = address
        return True

    def leave(self, protocol: Any) -> None:
        """Count a connection out, once."""
        address, protocol.qvl_address = protocol.qvl_address, None
        if address is not None:
            self.open[address] -= 1
            if not self.open[address]:
                del self.open[address]

    def refuse(self, protocol: Any, refusal: Refusal) -> None:
        """Answer, and close the connection."""
        self.count(refusal.reason)
        cycle = protocol.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            start, body = refusal.sends([(b"connection", b"close")])
            head = f"HTTP/1.1 {start['status']} {HTTPStatus(start['status']).phrase}\r\n".encode()
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in start["headers"])
            protocol.transport.write(head + lines + b"\r\n" + body["body"])
        self.close(protocol)

    @staticmethod
    def close(protocol: Any) -> None:
        """Close a connection when what is written has left, and soon even if the client does not read it."""
        protocol.transport.close()
        protocol.loop.call_later(_LAST_BYTES, protocol.transport.abort)

    def start_timer(self, protocol: Any) -> None:
        """Refuse the request unless its headers are complete in time."""
        text = f"The request's headers did not arrive within {self.seconds:g} s."
        refusal = Refusal(408, "header", text)
        protocol.qvl_timer = protocol.loop.call_later(self.seconds, self.refuse, protocol, refusal)

    @staticmethod
    def stop_timer(protocol: Any) -> None:
        """The headers are complete, or nobody waits for them."""
        if protocol.qvl_timer is not None:
            protocol.qvl_timer.cancel()
            protocol.qvl_timer = None

    def more(self, protocol: Any, size: int) -> None:
        """Take note of bytes that are neither of a body nor the end of headers."""
        protocol.qvl_bytes += size
        if protocol.qvl_bytes > self.max_bytes:
            what = "trailers" if protocol.qvl_within else "headers"
            self.refuse(
                protocol, Refusal(431, "header", f"The request's {what} have more than {self.max_bytes} bytes.")
            )
        elif protocol.qvl_timer is None and not protocol.qvl_within:
            self.start_timer(protocol)
