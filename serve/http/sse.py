"""Server-sent events, decoded as their bytes arrive: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

__all__ = ["EventDecoder"]

#: As numbers: Python finds a byte several times as fast as bytes of length one.
_CR, _LF = 0x0D, 0x0A


class EventDecoder:
    """Splits the bytes of a ``text/event-stream`` into the data of its events.

    Works on bytes and splits at CR, LF and CRLF alone, as the standard has it: answers may hold characters such as
    U+2028 or U+0085 that string functions (and httpx's ``iter_lines``) take for line ends, which would cut an event's
    JSON in two. Names, ids and comments are passed over; so is an event that the stream ends in the middle of.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, received: bytes) -> list[bytes]:
        """Take bytes as they arrive; return the data of each event completed by them."""
        if self._after_cr or _CR in received:
            received = self._with_line_feeds(received)
        if not self._rest and not self._data and received.startswith(b"data: "):
            # One whole event in one read: what nearly every read of a paced stream is.
            end = received.find(_LF)
            if end == len(received) - 2 and received.endswith(b"\n\n"):
                return [received[6:end]]
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def _with_line_feeds(self, received: bytes) -> bytes:
        """Return the bytes with LF for every line end; the LF of a CRLF may come in the next read."""
        if not received:
            return received
        ends = received.endswith(b"\r")
        if self._after_cr:
            received = received.removeprefix(b"\n")
        self._after_cr = ends
        return received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
