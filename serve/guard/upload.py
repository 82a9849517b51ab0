"""The body of a request on its way in: bounded in bytes, in time, and in what all requests hold together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from starlette.types import Receive

from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = ["ClientGone", "Held", "Upload"]

#: Bodies held at one time, as multiples of the largest one allowed.
_BODIES_HELD = 16
#: Seconds that the rest of a refused body is read, so that a client still sending it sees the refusal.
_LINGER = 1.0


class ClientGone(Exception):
    """The client left before its request was complete."""


class Held:
    """Bytes of all bodies that one server process holds.

    Attributes:
        size: held now.
        most: that may be held.
    """

    def __init__(self, limits: Limits) -> None:
        self.size = 0
        self.most = _BODIES_HELD * limits.max_body_bytes


class Upload:
    """One request's body.

    Attributes:
        unread: whether some of it may still be on its way.
    """

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, limits: Limits, held: Held) -> None:
        self._headers, self._receive, self._limits, self._held = headers, receive, limits, held
        self._size = 0
        self.unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

    async def read(self) -> bytes:
        """Return the whole body, which counts as held until `let_go`. Raises Refusal, ClientGone."""
        content_type = self._headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if content_type != b"application/json":
            raise Refusal(415, "body_json", "Send JSON, with the header Content-Type: application/json.")
        if self._headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "body_json", "Compressed bodies are not taken. Leave Content-Encoding out.")
        declared = self._headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self._limits.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await self._pieces()
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise Refusal(408, "body_time", f"The request did not arrive within {seconds:g} s.") from None

    async def _pieces(self) -> bytes:
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > self._limits.max_body_bytes:
                raise self._too_large()
            self._size += len(piece)
            self._held.size += len(piece)
            if self._held.size > self._held.most:
                wait = [(b"retry-after", b"1")]
                raise Refusal(429, "concurrency", "Too many large requests are under way.", headers=wait)
            pieces.append(piece)
        self.unread = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_size", f"The request has more than {self._limits.max_body_bytes} bytes.")

    async def skip(self) -> None:
        """Read for a moment what is still on its way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (message := await self._receive())["type"] == "http.request" and message.get("more_body"):
                    pass

    def let_go(self) -> None:
        """Hold it no longer."""
        self._held.size -= self._size
        self._size = 0
