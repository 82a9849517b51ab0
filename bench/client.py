"""One streamed chat request and the moments at which its pieces arrived.

A chunk is not a token: servers may send several tokens in one chunk, or a chunk without text. Tokens are counted by the
server (``stream_options.include_usage``); chunks only tell when text became visible.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["ChatRequest", "EventDecoder", "Failure", "Trace", "ask"]

#: Seconds on a clock that only goes forward; the zero is arbitrary.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A question about pictures.

    Attributes:
        text: what is asked.
        images: URLs or data URLs, in the order in which they stand before the text.
        max_tokens: at most so many tokens are generated.
        fixed_length: generate exactly ``max_tokens``: the end-of-text token is ignored (``ignore_eos``) and special
            tokens are shown, so that each token has text whose arrival can be timed. For speed only, never for
            accuracy.
    """

    text: str
    images: tuple[str, ...] = ()
    max_tokens: int = 64
    fixed_length: bool = False

    def body(self, model: str) -> bytes:
        """Return the JSON body: streamed, with usage, temperature 0 said explicitly."""
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        content.append({"type": "text", "text": self.text})
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.fixed_length:
            body |= {"ignore_eos": True, "skip_special_tokens": False}
        return json.dumps(body).encode()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer.

    Attributes:
        kind: ``connect`` (no connection, or lost), ``timeout``, ``http`` (a status other than 200), ``server`` (an
            error sent inside the stream), ``malformed`` (not a stream of chat chunks), ``truncated`` (ended before it
            was finished), ``empty`` (nothing to time).
        message: what happened, in a line.
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of one request. Times are seconds on the client's clock.

    Attributes:
        scheduled: when the request was due; latencies count from here, so that a client or server that falls behind
            shows.
        started: when it was handed to the HTTP client.
        chunks: arrival of each chunk that carried text; the first is the first token.
        ended: arrival of the stream's last event.
        text: the whole answer.
        prompt_tokens: counted by the server; None when it sent no usage.
        completion_tokens: counted by the server; None when it sent no usage.
        finish_reason: ``stop``, ``length``, ...; None when the server did not say.
        failure: None when the request succeeded.
    """

    scheduled: float
    started: float
    ended: float
    chunks: tuple[float, ...] = ()
    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    failure: Failure | None = None


class EventDecoder:
    """Splits the bytes of a ``text/event-stream`` into the data of its events.

    Works on bytes and splits at line feeds alone: answers may hold characters such as U+2028 or U+0085 that string
    functions (and httpx's ``aiter_lines``) take for line ends, which would cut an event's JSON in two.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Take bytes as they arrive; return the data of each event completed by them."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class _MalformedError(Exception):
    """An event that is not a chat chunk."""


class _ServerSaidError(Exception):
    """An error the server sent inside the stream."""


@dataclass(slots=True)
class _Answer:
    """What has arrived so far."""

    pieces: list[str] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    ended: float | None = None
    done: bool = False
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def add(self, event: bytes, now: float) -> None:
        """Take the data of one event that arrived at ``now``."""
        self.ended = now
        if event == b"[DONE]":
            self.done = True
            return
        try:
            chunk = json.loads(event)
            if error := chunk.get("error"):
                raise _ServerSaidError(_error_text(error))
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    self.pieces.append(text)
                    self.chunks.append(now)
                if reason := choice.get("finish_reason"):
                    self.finish_reason = reason
            if usage := chunk.get("usage"):
                self.prompt_tokens = int(usage["prompt_tokens"])
                self.completion_tokens = int(usage["completion_tokens"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _MalformedError(f"not a chat chunk: {event[:120].decode(errors='replace')}") from error


def _error_text(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error
    return " ".join(str(error).split())[:300]


def _status_failure(status: int, body: bytes) -> Failure:
    try:
        answer = json.loads(body)
        text = _error_text(answer.get("error") or answer.get("detail") or answer)
    except (ValueError, AttributeError):
        text = " ".join(body.decode(errors="replace").split())[:300]
    return Failure("http", f"HTTP {status}: {text}" if text else f"HTTP {status}")


async def ask(
    http: httpx.AsyncClient,
    body: bytes,
    *,
    timeout_s: float,
    scheduled: float | None = None,
    clock: Clock = time.perf_counter,
) -> Trace:
    """Send one streamed chat request and return its trace; a failed request is a trace with ``failure``, never an
    exception.

    Args:
        http: a client whose base is the server's root (`bench.endpoint.http_client`).
        body: `ChatRequest.body`, encoded beforehand so that encoding pictures is not part of the latency.
        timeout_s: seconds from start to end, after which the request has failed.
        scheduled: when the request was due on ``clock``; now when None.
    """
    started = clock()
    answer = _Answer()
    failure: Failure | None = None
    try:
        async with (
            asyncio.timeout(timeout_s),
            http.stream(
                "POST", "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            ) as response,
        ):
            if response.status_code != 200:
                failure = _status_failure(response.status_code, await response.aread())
            else:
                decoder = EventDecoder()
                async for received in response.aiter_bytes():
                    now = clock()
                    for event in decoder.feed(received):
                        answer.add(event, now)
                if answer.ended is None:
                    failure = Failure("malformed", "HTTP 200 without a single event: does the server stream?")
                elif not (answer.done or answer.finish_reason):
                    failure = Failure("truncated", "the stream ended before the answer was finished")
    except (TimeoutError, httpx.TimeoutException):
        seen = f"after {len(answer.chunks)} chunks" if answer.chunks else "before the first token"
        failure = Failure("timeout", f"no complete answer within {timeout_s:g} s ({seen})")
    except _MalformedError as error:
        failure = Failure("malformed", str(error))
    except _ServerSaidError as error:
        failure = Failure("server", str(error))
    except httpx.HTTPError as error:
        kind = "truncated" if answer.chunks else "connect"
        failure = Failure(kind, f"{type(error).__name__}: {error}".rstrip(": "))
    return Trace(
        scheduled=started if scheduled is None else scheduled,
        started=started,
        ended=clock() if answer.ended is None or failure else answer.ended,
        chunks=tuple(answer.chunks),
        text="".join(answer.pieces),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason,
        failure=failure,
    )
