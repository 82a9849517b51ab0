"""What of other packages is changed while they run: one class of uvicorn's, one function of vLLM's.

Both are no public interface. `UVICORN` and `VLLM` are the releases that this was written against; a test fails when
others are installed, and says what to look at. Packages that are absent or unknown are left as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from serve.http.errors import Refusal

__all__ = ["UVICORN", "VLLM", "bound_headers", "inspect_in_process", "limit_headers"]

UVICORN, VLLM = "0.54", "0.32"

_log = logging.getLogger("qvl.guard")
_METHODS = (
    "connection_made", "connection_lost", "data_received", "on_headers_complete", "on_message_complete",
    "send_400_response",
)  # fmt: skip


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


def limit_headers(count: Callable[[str], None]) -> bool:
    """Bound the headers that uvicorn takes, see `bound_headers`; returns whether that could be done. Idempotent.

    Where uvicorn uses h11 instead of httptools, h11 has a bound of its own.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:  # then it uses h11
        return False
    return bound_headers(HttpToolsProtocol, count)


def bound_headers(
    protocol: type[Any],
    count: Callable[[str], None],
    *,
    max_bytes: int = 64 << 10,
    seconds: float = 10.0,
) -> bool:
    """Bound the headers that a protocol class of uvicorn's takes; returns whether that could be done. Idempotent.

    uvicorn reads headers with httptools, without a bound on their size or on the time they take, and an ASGI
    application never sees a request without them: one stranger who sends headers for ever holds memory, a thousand who
    send none hold file descriptors. The class is given both bounds, and an answer in OpenAI's shape to what is not
    HTTP. Upstream: https://github.com/Kludex/uvicorn/issues/157, closed without one for httptools.

    Args:
        protocol: `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol`, or a subclass of it.
        count: called with the reason of each refusal.
        max_bytes: of a request's line and headers; up to one read from the socket (256 KiB) more may get in.
        seconds: from the connection, or the first byte of a later request, to the end of the headers.
    """
    if getattr(protocol, "qvl_bounded", False):
        return True
    if not all(hasattr(protocol, name) for name in _METHODS):
        _log.warning("this release of uvicorn is not known: sizes and times of headers are not limited")
        return False
    made, lost, received, headers, message, _ = (getattr(protocol, name) for name in _METHODS)
    bounds = _Bounds(count, max_bytes, seconds)

    def connection_made(self: Any, transport: Any) -> None:
        made(self, transport)
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, False, False
        bounds.start_timer(self)

    def connection_lost(self: Any, error: Exception | None) -> None:
        bounds.stop_timer(self)
        lost(self, error)

    def data_received(self: Any, data: bytes) -> None:
        self.qvl_ended = False
        received(self, data)
        if not (self.qvl_ended or self.qvl_within or self.transport.is_closing()):
            bounds.more(self, len(data))

    def on_headers_complete(self: Any) -> None:
        bounds.stop_timer(self)
        self.qvl_bytes, self.qvl_within, self.qvl_ended = 0, True, True
        headers(self)

    def on_message_complete(self: Any) -> None:
        self.qvl_within, self.qvl_ended = False, True
        message(self)

    def send_400_response(self: Any, msg: str) -> None:
        bounds.stop_timer(self)
        bounds.refuse(self, Refusal(400, "header", "The request is not HTTP/1.1 as it should be."))

    ours = (connection_made, connection_lost, data_received, on_headers_complete, on_message_complete)
    for function in (*ours, send_400_response):
        setattr(protocol, function.__name__, function)
    protocol.qvl_bounded = True
    return True


@dataclass(frozen=True)
class _Bounds:
    """What the changed methods do. Each connection has a protocol object, which carries its timer and its counts."""

    count: Callable[[str], None]
    max_bytes: int
    seconds: float

    def refuse(self, protocol: Any, refusal: Refusal) -> None:
        """Answer, and close the connection."""
        self.count(refusal.reason)
        start, body = refusal.sends([(b"connection", b"close")])
        head = f"HTTP/1.1 {start['status']} {HTTPStatus(start['status']).phrase}\r\n".encode()
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in start["headers"])
        protocol.transport.write(head + lines + b"\r\n" + body["body"])
        protocol.transport.close()

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
        """Take note of bytes of headers that are not complete yet."""
        protocol.qvl_bytes += size
        if protocol.qvl_bytes > self.max_bytes:
            text = f"The request's headers have more than {self.max_bytes} bytes."
            self.refuse(protocol, Refusal(431, "header", text))
        elif protocol.qvl_timer is None:
            self.start_timer(protocol)
