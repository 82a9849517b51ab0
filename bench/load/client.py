"""One streamed chat request and the moments at which its pieces arrived.

A chunk is not a token: servers may send several tokens in one chunk, or a chunk without text. Tokens are counted by the
server (``stream_options.include_usage``); chunks only tell when text became visible.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from bench.load.answer import Answer, MalformedError, ServerSaidError, error_text
from serve.http.sse import EventDecoder

__all__ = ["RETRIES", "STALL_S", "ChatRequest", "Failure", "Trace", "ask", "ask_again", "is_whole"]

#: Seconds on a clock that only goes forward; the zero is arbitrary.
Clock = Callable[[], float]

#: Seconds of silence in the middle of an answer that no healthy server shows.
STALL_S = 30.0
CONNECT_S = 10.0
#: A compressed stream would be timed by its compressor's buffer.
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A question about images.

    Attributes:
        text: what is asked; may be empty where ``before`` says all.
        images: URLs or data URLs, in the order in which they stand before the text.
        max_tokens: at most so many tokens are generated.
        fixed_length: generate exactly ``max_tokens``: the end-of-text token is ignored (``ignore_eos``) and special
            tokens are shown, so that each token has text whose arrival can be timed. For speed only, never for
            accuracy.
        before: messages before it, in OpenAI's form: a system's, or earlier turns of the chat.
    """

    text: str
    images: tuple[str, ...] = ()
    max_tokens: int = 64
    fixed_length: bool = False
    before: tuple[dict[str, Any], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Return all messages of the chat so far, in OpenAI's form."""
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        content += [{"type": "text", "text": self.text}] if self.text or not self.before else []
        return [*self.before, {"role": "user", "content": content}] if content else list(self.before)

    def body(self, model: str, *, count_chunks: bool = False) -> bytes:
        """Return the JSON body: streamed, with usage (in every chunk for ``count_chunks``), temperature 0 said."""
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages(),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True} | ({"continuous_usage_stats": True} if count_chunks else {}),
        }
        if self.fixed_length:
            body |= {"ignore_eos": True, "skip_special_tokens": False}
        return json.dumps(body).encode()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer.

    Attributes:
        kind: ``connect`` (no connection, or lost before an answer began), ``timeout`` (not finished in time),
            ``stalled`` (began to answer, then fell silent), ``http`` (a status other than 200), ``server`` (an error
            sent inside the stream), ``malformed`` (not a stream of chat chunks), ``truncated`` (ended before it was
            finished), ``empty`` (nothing to time), ``client`` (a fault on this side).
        message: what happened, in a line.
        status: of ``http``, the status.
        retry_after_s: of ``http``, seconds after which the server asks to be asked again.
    """

    kind: str
    message: str
    status: int | None = None
    retry_after_s: float | None = field(default=None, compare=False)


#: Times that a request is sent again which the server refused for being busy.
RETRIES = 4
#: Seconds to wait before that where the server names no time, doubled from try to try; and at most, whatever it names.
BACKOFF_S, LONGEST_WAIT_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of one request. Times are seconds on the client's clock.

    Attributes:
        scheduled: when the request was due; latencies count from here, so that a client or server that falls behind
            shows.
        started: when it was handed to the HTTP client.
        chunks: arrival of each chunk that carried generated text (an answer, reasoning, a tool's arguments); the first
            is the first token.
        retries: how often it was sent again after the server had refused it for being busy; latencies have the waiting.
        counts: tokens so far at each of them, where the server counts in every chunk; else empty.
        ended: arrival of the stream's last event.
        text: the whole answer.
        prompt_tokens: counted by the server; None when it sent no usage.
        completion_tokens: counted by the server; None when it sent no usage.
        finish_reason: ``stop``, ``length``, ...; None when the server did not say.
        failure: None when the request succeeded.
        held_s: seconds it was kept back, after it was due, because as many as allowed were in flight
        (`bench.load.loops`).
        cached_tokens: of the prompt, those the server had in its prefix cache; None when it does not say.
        queue_s: seconds in the server's own queue; None when it does not say.
        number: which of its block's requests it was, from 0: the same number is the same request to both systems.
        shape: of the request, where a block has several (`bench.load.inputs.Made.shape`).
        asked: exact length of the answer that was asked for; None: none was.
        images: in the request.
        image_tokens: of the prompt's tokens, those that its images became; None where that is not known.
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
    held_s: float = 0.0
    cached_tokens: int | None = None
    queue_s: float | None = None
    retries: int = 0
    counts: tuple[int, ...] = ()
    number: int | None = None
    shape: str = ""
    asked: int | None = None
    images: int = 0
    image_tokens: int | None = None


def is_whole(received: bytes, stream: bool) -> bool:
    """Return whether the body of a chat's answer, streamed or not, came to its end and holds no error.

    By its structure, not by the words in it: a model may say "error".
    """
    events = EventDecoder().feed(received) if stream else [received]
    if stream and (not events or events.pop() != b"[DONE]"):
        return False
    try:
        parsed = [json.loads(event) for event in events]
    except ValueError:
        return False
    if not all(isinstance(each, dict) and "error" not in each for each in parsed):
        return False
    return any(choice.get("finish_reason") for each in parsed for choice in each.get("choices", []))


def _status_failure(status: int, body: bytes) -> Failure:
    try:
        answer = json.loads(body)
        text = error_text(answer.get("error") or answer.get("detail") or answer)
    except (ValueError, AttributeError, RecursionError):
        text = " ".join(body.decode(errors="replace").split())[:300]
    return Failure("http", f"HTTP {status}: {text}" if text else f"HTTP {status}", status)


async def ask(
    http: httpx.AsyncClient,
    body: bytes,
    *,
    timeout_s: float,
    stall_s: float = STALL_S,
    scheduled: float | None = None,
    clock: Clock = time.perf_counter,
) -> Trace:
    """Send one streamed chat request and return its trace; a failed request is a trace with ``failure``, never an
    exception.

    Args:
        http: a client whose base is the server's root (`bench.load.endpoint.http_client`).
        body: `ChatRequest.body`, encoded beforehand so that encoding images is not part of the latency.
        timeout_s: seconds from start to end, after which the request has failed.
        stall_s: seconds without a byte, once text has come, after which it has failed. How long the first token may
            take is up to ``timeout_s``: a full server's queue is no stall.
        scheduled: when the request was due on ``clock``; now when None.
    """
    started = clock()
    answer = Answer()
    watch = _Watch(stall_s)
    try:
        failure = await _exchange(http, body, answer, watch, timeout_s, clock)
    finally:
        watch.stop()
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
        cached_tokens=answer.cached_tokens,
        queue_s=answer.queue_s,
        counts=tuple(answer.counts) if len(answer.counts) == len(answer.chunks) else (),
    )


async def ask_again(
    http: httpx.AsyncClient, body: bytes, *, timeout_s: float, scheduled: float | None = None, retries: int = RETRIES
) -> Trace:
    """Send a request as `ask` does, and again when the server says that it is too busy: a 429, or a 503 with
    ``Retry-After``. It waits as long as the server asks for, else half a second, doubled from try to try.

    Latencies have the waiting; ``Trace.retries`` says how often.

    Args:
        timeout_s: seconds for all of it.
        retries: it is sent again so often at most.
    """
    trace = await ask(http, body, timeout_s=timeout_s, scheduled=scheduled)
    tries = 0
    while (wait_s := _wait_s(trace.failure, tries)) is not None and tries < retries:
        left = timeout_s - (trace.ended - trace.started) - wait_s
        if left <= 0:
            break
        await asyncio.sleep(wait_s)
        tries += 1
        again = await ask(http, body, timeout_s=left, scheduled=trace.scheduled)
        trace = replace(again, started=trace.started, retries=tries)
    return trace


def _wait_s(failure: Failure | None, tries: int) -> float | None:
    """Return for how long to wait before a request is sent again; None: it is not."""
    if failure is None or failure.status not in (429, 503):
        return None
    if failure.retry_after_s is not None:
        return min(failure.retry_after_s, LONGEST_WAIT_S)
    return min(BACKOFF_S * 2**tries, LONGEST_WAIT_S) if failure.status == 429 else None


async def _exchange(
    http: httpx.AsyncClient, body: bytes, answer: Answer, watch: _Watch, timeout_s: float, clock: Clock
) -> Failure | None:
    """Send a request and fill ``answer``; return what went wrong."""
    opened = False
    try:
        async with (
            asyncio.timeout(timeout_s) as limit,
            http.stream(
                "POST",
                "/v1/chat/completions",
                content=body,
                headers=HEADERS,
                # Reads are timed here, for the whole request, and not once more for every chunk.
                timeout=httpx.Timeout(None, connect=min(timeout_s, CONNECT_S)),
            ) as response,
        ):
            opened = True
            if response.status_code != 200:
                failure = _status_failure(response.status_code, await response.aread())
                return replace(failure, retry_after_s=_retry_after_s(response.headers.get("retry-after", "")))
            return _unfinished(answer, await _read(response, answer, watch, limit, clock))
    except TimeoutError:
        if watch.stalled:
            silent = f"silent for {watch.stall_s:g} s after {len(answer.chunks)} chunks of its answer"
            return Failure("stalled", silent)
        seen = f"after {len(answer.chunks)} chunks" if answer.chunks else "before the first token"
        return Failure("timeout", f"no complete answer within {round(timeout_s, 1):g} s ({seen})")
    except (MalformedError, httpx.DecodingError) as error:
        return Failure("malformed", str(error))
    except ServerSaidError as error:
        return Failure("server", str(error))
    except httpx.TransportError as error:
        # After the last event nothing is missing; some servers don't end the body.
        return None if answer.done else Failure("truncated" if opened else "connect", _named(error))
    except Exception as error:  # a fault of this side must not end the run that the request is part of
        return Failure("client", _named(error))


def _retry_after_s(said: str) -> float | None:
    """Read ``Retry-After``, seconds or a date; None where it is neither."""
    said = said.strip()
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


async def _read(response: httpx.Response, answer: Answer, watch: _Watch, limit: asyncio.Timeout, clock: Clock) -> bytes:
    """Take the stream as it comes; return the first that was read of it."""
    decoder = EventDecoder()
    first = b""
    packed = "content-encoding" in response.headers
    async for received in response.aiter_bytes() if packed else response.aiter_raw():
        now = clock()
        for event in decoder.feed(received):
            answer.add(event, now)
        if answer.chunks:
            watch.seen(limit)
        first = first or received
    return first


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _unfinished(answer: Answer, first: bytes) -> Failure | None:
    """Say what is missing from a stream that ended in order; ``first`` is the first that was read of it."""
    if answer.ended is None:
        said = f", but {first[:120].decode(errors='replace')!r}" if first else ""
        return Failure("malformed", f"HTTP 200 without a single event{said}: does the server stream?")
    if not (answer.done or answer.finish_reason):
        return Failure("truncated", "the stream ended before the answer was finished")
    return None


class _Watch:
    """Ends a request that fell silent. One timer looks now and then how long ago something came: setting a timer anew
    for each chunk would cost more than reading the chunk."""

    def __init__(self, stall_s: float) -> None:
        self.stalled = False
        self.stall_s = stall_s
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def seen(self, limit: asyncio.Timeout) -> None:
        """Note that something came just now; ``limit`` is what expires when nothing more does."""
        self._last = time.monotonic()
        if self._timer is None:
            self._look(limit)

    def _look(self, limit: asyncio.Timeout) -> None:
        left = self._last + self.stall_s - time.monotonic()
        loop = asyncio.get_running_loop()
        if left > 0:
            self._timer = loop.call_later(left, self._look, limit)
        else:
            self.stalled = True
            limit.reschedule(loop.time())

    def stop(self) -> None:
        """Look no more."""
        if self._timer:
            self._timer.cancel()
