from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load import metrics
from bench.load.client import RETRIES, ChatRequest, Trace, ask, ask_again, is_whole
from bench.load.endpoint import http_client
from tests.support.fake_server import Behaviour, serving


def one(url: str, request: ChatRequest | None = None, timeout_s: float = 10.0, stall_s: float = 10.0) -> Trace:
    async def main() -> Trace:
        async with http_client(url, timeout_s=timeout_s) as http:
            return await ask(http, (request or ChatRequest("hi")).body("fake"), timeout_s=timeout_s, stall_s=stall_s)

    return asyncio.run(main())


def mocked(chunks: list[bytes], **ask_arguments: Any) -> Trace:
    """Ask a server that sends exactly these bytes, a tick of the clock each."""

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            for chunk in chunks:
                yield chunk

    ticks = itertools.count()

    async def main() -> Trace:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Stream()))
        async with http_client("http://127.0.0.1:1", transport=transport) as http:
            return await ask(http, b"{}", timeout_s=5, clock=lambda: float(next(ticks)), **ask_arguments)

    return asyncio.run(main())


def event(content: str | None = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    payload = {"choices": [{"delta": delta, "finish_reason": more.pop("finish", None)}], **more}
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5}}\n\n'


def test_the_body_streams_with_usage_at_temperature_0() -> None:
    body = json.loads(ChatRequest("what?", ("data:image/png;base64,xx",), 9).body("m"))
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["max_tokens"] == 9
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert "ignore_eos" not in body


def test_only_speed_requests_ignore_the_end_of_text() -> None:
    assert json.loads(ChatRequest("x", fixed_length=True).body("m"))["ignore_eos"] is True


def test_an_answer_is_whole_whatever_its_words() -> None:
    """The embedded model's vocabulary holds the word; once in 20,000 answers it is a piece by itself."""

    def events(*pieces: dict[str, Any] | str) -> bytes:
        return "".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in pieces).encode()

    text = {"choices": [{"index": 0, "delta": {"content": "error"}, "finish_reason": None}]}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    fault = {"error": {"message": "EngineCore died", "code": 500}}
    assert is_whole(events(text, last, "[DONE]"), stream=True)
    for broken in ((text, last), (text, "[DONE]"), (text, fault, "[DONE]"), (fault, last, "[DONE]"), ("[DONE]",), ()):
        assert not is_whole(events(*broken), stream=True)
    assert not is_whole(events(text, last, "[DONE]")[:-20], stream=True)
    whole = {"choices": [{"message": {"content": "error"}, "finish_reason": "length"}]}
    assert is_whole(json.dumps(whole).encode(), stream=False)
    for answer in (json.dumps(whole)[:-3], json.dumps(fault), "[]", ""):
        assert not is_whole(answer.encode(), stream=False)


def test_times_follow_the_clock() -> None:
    # started = 0; then one tick for each piece received.
    trace = mocked([event(""), event("a"), event("b") + event("c"), event(finish="stop"), USAGE, DONE], scheduled=-1.0)
    assert trace.failure is None
    assert (trace.scheduled, trace.started) == (-1.0, 0.0)
    assert trace.chunks == (2.0, 3.0, 3.0)  # the empty first delta is no token; two events in one read share its time
    assert trace.ended == 6.0
    assert trace.text == "abc"
    assert (trace.prompt_tokens, trace.completion_tokens) == (11, 5)  # from the server, not the number of chunks
    assert trace.finish_reason == "stop"


def test_unscheduled_requests_are_due_when_they_start() -> None:
    assert mocked([event("a"), DONE]).scheduled == 0.0


@given(st.text(), st.integers(1, 7))
def test_any_text_survives_any_split_of_the_bytes(text: str, size: int) -> None:
    data = event("\u2028\x85" + text) + DONE
    trace = mocked([data[i : i + size] for i in range(0, len(data), size)])
    assert trace.failure is None
    assert trace.text == "\u2028\x85" + text


@given(st.lists(st.text(max_size=8), max_size=12), st.booleans())
def test_every_chunk_is_read_as_json_reads_it(texts: list[str], escaped: bool) -> None:
    """Chunks that look like the one before are not parsed; the text must be the same as if they were."""
    pieces = [
        b"data: "
        + json.dumps({"id": "1", "choices": [{"delta": {"content": t}}]}, ensure_ascii=escaped).encode()
        + b"\n\n"
        for t in texts
    ]
    trace = mocked([*pieces, DONE])
    assert trace.failure is None
    assert trace.text == "".join(texts)
    assert trace.chunks == tuple(float(i + 1) for i, text in enumerate(texts) if text)


@pytest.mark.parametrize(
    "tricky",
    [
        {"choices": [{"delta": {"content": "b"}, "logprobs": {"content": [{"token": "b"}]}}]},
        {"choices": [{"logprobs": {"content": [{"token": "x"}]}, "delta": {"content": "b"}}]},
        {"choices": [{"delta": {"role": "assistant", "reasoning_content": "hm", "content": "b"}}]},
        {"choices": [{"delta": {"content": "b"}, "note": '"content":"z"'}]},
        {"note": {"content": "z"}, "choices": [{"delta": {"content": "b"}}]},
        {"choices": [{"delta": {"content": "b"}}, {"delta": {"content": None}}]},
    ],
)
def test_text_is_found_where_it_belongs(tricky: dict[str, Any]) -> None:
    for separators in ((",", ":"), (", ", ": ")):
        line = b"data: " + json.dumps(tricky, separators=separators).encode() + b"\n\n"
        # Other bytes around it than before, then the same with other text: remembered bytes must not mislead.
        changed = line.replace(b'"content":"b"', b'"content":"cc"').replace(b'"content": "b"', b'"content": "cc"')
        assert mocked([event("a"), line, line, changed, line, DONE]).text == "abbccb"


def test_a_finish_or_an_error_in_a_chunk_with_text_is_not_missed() -> None:
    trace = mocked([event("a"), event("b"), event("c", finish="length")])
    assert (trace.text, trace.finish_reason, trace.failure) == ("abc", "length", None)
    failure = mocked([event("a"), event("b"), event("c", error="dead")]).failure
    assert failure is not None
    assert (failure.kind, failure.message) == ("server", "dead")


@pytest.mark.parametrize(
    ("chunks", "kind", "words"),
    [
        ([b"data: {oops\n\n"], "malformed", "not a chat chunk"),
        ([b'data: {"choices": [{}]}\n\n'], "malformed", "not a chat chunk"),
        ([b"data: 3\n\n"], "malformed", "not a chat chunk"),
        ([b'{"choices": []}'], "malformed", "without a single event"),
        ([], "malformed", "without a single event"),
        ([b"data: " + b"[" * 100_000 + b"\n\n"], "malformed", "not a chat chunk"),
        ([b'data: {"choices": 7}\n\n'], "malformed", "not a chat chunk"),
        (
            [event("a"), b'data: {"choices": [{"delta": {"content": "a\xff"}, "finish_reason": null}]}\n\n'],
            "malformed",
            "",
        ),
        ([event("a"), b"data: \xff\xfe\n\n"], "malformed", "not a chat chunk"),
        ([b"<html>busy</html>"], "malformed", "<html>busy</html>"),
        ([event("a"), event("b")], "truncated", "before the answer was finished"),
        ([event("a"), b'data: {"error": {"message": "engine died"}}\n\n'], "server", "engine died"),
    ],
)
def test_a_broken_stream_is_a_failure(chunks: list[bytes], kind: str, words: str) -> None:
    trace = mocked(chunks)
    assert trace.failure is not None
    assert trace.failure.kind == kind
    assert words in trace.failure.message


def test_delays_are_seen_as_they_are() -> None:
    with serving(Behaviour(first_s=0.10, gap_s=0.03, tokens=6)) as server:
        one(server.url)  # opens modules and sockets
        trace = one(server.url)
    # A busy machine only ever adds.
    assert trace.chunks[0] - trace.started >= 0.10
    assert trace.chunks[-1] - trace.started >= 0.10 + 5 * 0.03
    assert list(trace.chunks) == sorted(trace.chunks) and len(trace.chunks) == 6
    assert trace.completion_tokens == 6
    assert trace.ended >= trace.chunks[-1]


def test_a_chunk_is_not_a_token() -> None:
    with serving(Behaviour(tokens=8, per_chunk=4)) as server:
        trace = one(server.url)
    assert len(trace.chunks) == 2
    assert trace.completion_tokens == 8


def test_a_server_without_usage_leaves_the_count_unknown() -> None:
    with serving(Behaviour(usage=False)) as server:
        trace = one(server.url)
    assert trace.failure is None
    assert trace.completion_tokens is None


def test_usage_says_what_was_cached_and_queued() -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 11, "prompt_tokens_details": {"cached_tokens": 4}}}\n\n'
    trace = mocked([event("a"), usage, DONE])
    assert (trace.prompt_tokens, trace.completion_tokens, trace.cached_tokens) == (11, None, 4)
    queued = b'data: {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 1, "queue_time": 0.25}}\n\n'
    assert mocked([event("a"), queued, DONE]).queue_s == 0.25
    with serving(Behaviour(slots=1, queue_time=True)) as server:
        assert (one(server.url).queue_s or 0.0) >= 0.0


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning": "hm"},
        {"reasoning_content": "hm"},
        {"refusal": "no"},
        {"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
    ],
)
def test_whatever_a_model_generates_is_output(delta: dict[str, Any]) -> None:
    """Reasoning and a tool's arguments are tokens like others, and no part of the answer: without them TPOT halves."""
    line = b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}).encode() + b"\n\n"
    trace = mocked([event(""), line, line, event("a"), event("b"), line, event(finish="stop"), USAGE, DONE])
    assert trace.chunks == (2.0, 3.0, 4.0, 5.0, 6.0)
    assert (trace.text, trace.completion_tokens) == ("ab", 5)
    assert metrics.ttft(trace) == 2.0 and metrics.tpot(trace) == pytest.approx((9.0 - 2.0) / 4)


def test_a_chunk_with_an_empty_tool_call_is_none() -> None:
    empty = {"choices": [{"delta": {"tool_calls": [{"index": 0}], "reasoning": None, "content": None}}]}
    assert mocked([b"data: " + json.dumps(empty).encode() + b"\n\n", event("a"), DONE]).chunks == (2.0,)


def test_tokens_counted_in_every_chunk_are_kept() -> None:
    def counted(text: str, tokens: int) -> bytes:
        return event(text, usage={"prompt_tokens": 7, "completion_tokens": tokens})

    assert mocked([counted("a", 1), counted("bcd", 4), USAGE, DONE]).counts == (1, 4)
    assert mocked([event("a"), counted("bcd", 4), DONE]).counts == ()  # not of every chunk


def patient(url: str, timeout_s: float = 10.0, **more: Any) -> Trace:
    async def main() -> Trace:
        async with http_client(url, timeout_s=timeout_s) as http:
            return await ask_again(http, ChatRequest("hi").body("fake"), timeout_s=timeout_s, scheduled=-1.0, **more)

    return asyncio.run(main())


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    with serving(Behaviour(busy=3, retry_after="0")) as server:
        trace = patient(server.url)
    assert (trace.failure, trace.retries, trace.scheduled) == (None, 3, -1.0)
    assert len(server.bodies) == 4
    assert trace.started < trace.chunks[0]
    once = Behaviour(busy=1, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")  # a date that has passed
    with serving(once) as server:
        assert patient(server.url).retries == 1
    with serving(Behaviour(fail_every=1, fail_status=503, retry_after="0")) as server:
        assert (patient(server.url).retries, len(server.bodies)) == (RETRIES, RETRIES + 1)


@pytest.mark.parametrize(("status", "after"), [(500, "0"), (503, None), (400, None)])
def test_other_refusals_are_not_asked_again(status: int, after: str | None) -> None:
    with serving(Behaviour(fail_every=1, fail_status=status, retry_after=after)) as server:
        trace = patient(server.url)
        assert (trace.retries, len(server.bodies)) == (0, 1)
    assert trace.failure and trace.failure.status == status


def test_a_server_that_stays_busy_is_asked_a_bounded_number_of_times() -> None:
    with serving(Behaviour(busy=1000, retry_after="0")) as server:
        trace = patient(server.url)
        assert len(server.bodies) == RETRIES + 1
    assert trace.failure and trace.failure.status == 429 and trace.retries == RETRIES
    with serving(Behaviour(busy=1000, retry_after="3600")) as server:  # later than the request may take
        assert patient(server.url).retries == 0


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (429, None, "HTTP 429: out of luck"),
        (429, b"<b>slow\ndown</b>", "HTTP 429: <b>slow down</b>"),
        (500, b"", "HTTP 500"),
        (503, b"\xff", "HTTP 503: \ufffd"),
        (400, b'{"detail": "no"}', "HTTP 400: no"),
        (422, b"[1]", "HTTP 422: [1]"),
    ],
)
def test_an_error_status_keeps_what_the_server_said(status: int, error: bytes | None, message: str) -> None:
    with serving(Behaviour(status=status, error=error)) as server:
        failure = one(server.url).failure
    assert failure is not None
    assert (failure.kind, failure.status, failure.message) == ("http", status, message)


def test_a_stream_that_is_too_slow_times_out() -> None:
    with serving(Behaviour(gap_s=30.0)) as server:
        failure = one(server.url, timeout_s=0.3).failure
    assert failure is not None
    assert failure.kind == "timeout"
    assert "after 1 chunks" in failure.message


def test_a_stream_that_falls_silent_has_stalled() -> None:
    with serving(Behaviour(stall_after=3)) as server:
        trace = one(server.url, stall_s=0.2)
    assert trace.failure is not None
    assert trace.failure.kind == "stalled"
    assert "0.2 s after 3 chunks" in trace.failure.message
    assert trace.ended - trace.chunks[-1] >= 0.2


def test_a_slow_first_token_and_a_slow_steady_stream_are_no_stalls() -> None:
    with serving(Behaviour(first_s=1.2, gap_s=0.25, tokens=6)) as server:
        assert one(server.url, stall_s=1.0).failure is None


def test_a_step_of_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.cycle([0.0, 1e9, -1e9])
    monkeypatch.setattr("time.time", lambda: next(steps))
    with serving(Behaviour(first_s=0.02, gap_s=0.005)) as server:
        trace = one(server.url)
    assert trace.failure is None
    assert 0.02 <= trace.chunks[0] - trace.started < 1e6  # a step is a thousand times that
    assert list(trace.chunks) == sorted(trace.chunks)


@pytest.mark.parametrize(
    "error", [RuntimeError("loop is gone"), OSError(24, "too many open files"), httpx.ReadError("")]
)
def test_no_fault_below_escapes(error: Exception) -> None:
    class Broken(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise error

    async def main() -> Trace:
        async with http_client("http://127.0.0.1:1", transport=Broken()) as http:
            return await ask(http, b"{}", timeout_s=5)

    failure = asyncio.run(main()).failure
    assert failure is not None
    assert failure.kind == ("connect" if isinstance(error, httpx.HTTPError) else "client")
    assert type(error).__name__ in failure.message


def test_a_connection_lost_after_the_last_event_loses_nothing() -> None:
    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            yield event("a") + DONE
            raise httpx.RemoteProtocolError("incomplete chunked read")

    async def main() -> Trace:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Stream()))
        async with http_client("http://127.0.0.1:1", transport=transport) as http:
            return await ask(http, b"{}", timeout_s=5)

    trace = asyncio.run(main())
    assert (trace.text, trace.failure) == ("a", None)


def test_a_server_that_says_nothing_times_out() -> None:
    with serving(Behaviour(first_s=30.0)) as server:
        failure = one(server.url, timeout_s=0.3).failure
    assert failure is not None
    assert "before the first token" in failure.message


def test_a_dropped_connection_is_no_answer() -> None:
    with serving(Behaviour(gap_s=0.05, close_after=2)) as server:
        failure = one(server.url).failure
    assert failure is not None
    assert failure.kind == "truncated"


def test_nobody_listening() -> None:
    with serving() as server:
        url = server.url
    failure = one(url).failure
    assert failure is not None
    assert failure.kind == "connect"


def test_an_empty_answer_is_an_answer() -> None:
    with serving(Behaviour(text=lambda body: "")) as server:
        trace = one(server.url)
    assert trace.failure is None
    assert trace.text == ""
    assert trace.chunks == ()
