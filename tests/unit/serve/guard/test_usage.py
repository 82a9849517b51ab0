"""Tokens read off answers as they pass, and what a client sees of that: what it asked for."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from serve.guard.keyfile import key_of
from serve.guard.usage import Ledger, Usage, images_in
from serve.http.errors import Refusal

STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; x")]}
WHOLE = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


def counts(completion: int, prompt: int = 7) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def event(text: str | None, **more: Any) -> bytes:
    """An event as vLLM sends it when it counts along."""
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return b"data: " + json.dumps({"id": "c", "choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"


ANSWER = [event("a", usage=counts(1)), event("b", usage=counts(2)), event(None, usage=counts(2)), b"data: [DONE]\n\n"]
PLAIN = [event("a"), event("b"), event(None, usage=counts(2)), b"data: [DONE]\n\n"]


def passed(request: dict[str, Any], start: dict[str, Any], *bodies: bytes) -> tuple[Usage, list[bytes], dict[str, Any]]:
    """Return the usage, what the client got, and what vLLM was asked."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    usage = Usage(send)
    asked = json.loads(usage.counting(request, json.dumps(request).encode() + b" \n"))

    async def go() -> None:
        await usage.send(start)
        for body in bodies:
            await usage.send({"type": "http.response.body", "body": body, "more_body": True})
        await usage.send({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(go())
    return usage, sent, asked


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, [PLAIN[0], PLAIN[1], b"", PLAIN[3]]),
        ({}, [PLAIN[0], PLAIN[1], b"", PLAIN[3]]),
        ({"include_usage": False}, [PLAIN[0], PLAIN[1], b"", PLAIN[3]]),
        ({"include_usage": True}, PLAIN),
        ({"include_usage": True, "continuous_usage_stats": True}, ANSWER),
    ],
)
def test_a_client_sees_what_it_asked_for(options: Any, expected: list[bytes]) -> None:
    usage, sent, asked = passed({"stream": True, "stream_options": options}, STREAM, *ANSWER)
    assert asked["stream_options"] == {**(options or {}), "include_usage": True, "continuous_usage_stats": True}
    assert sent == [*expected, b""]
    assert (usage.prompt, usage.completion) == (7, 2)


def test_an_answer_that_is_cut_has_cost_what_came_of_it() -> None:
    usage, _, _ = passed({"stream": True}, STREAM, ANSWER[0])
    assert (usage.prompt, usage.completion) == (7, 1)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_events_may_come_in_pieces(size: int, end: bytes) -> None:
    whole = b"".join(ANSWER).replace(b"\n\n", end)
    usage, sent, _ = passed({"stream": True}, STREAM, *(whole[i : i + size] for i in range(0, len(whole), size)))
    assert b"".join(sent) == b"".join(PLAIN[:2] + PLAIN[3:]).replace(b"\n\n", end)
    assert usage.completion == 2


def test_an_answer_in_one_piece_stays_as_it_is() -> None:
    body = json.dumps({"choices": [{"message": {"content": '"usage":{'}}], "usage": counts(5), "more": 1}).encode()
    usage, sent, asked = passed({"n": 1}, WHOLE, body)
    assert sent == [body, b""] and asked == {"n": 1}
    assert (usage.prompt, usage.completion) == (7, 5)


@pytest.mark.parametrize("text", ['"usage":{"prompt_tokens":1}', '","usage":{"completion_tokens":9', "\\\\", "\n\n"])
def test_what_an_answer_says_is_no_count(text: str) -> None:
    usage, sent, _ = passed({"stream": True}, STREAM, event(text, usage=counts(3)), event(text))
    assert sent == [event(text), event(text), b""]
    assert (usage.prompt, usage.completion) == (7, 3)


@pytest.mark.parametrize("broken", [b'data: {"usage":{"prompt\n\n', b'data: "usage":[]\n\n', b"no event", b"\xff\n\n"])
def test_what_is_no_answer_passes(broken: bytes) -> None:
    usage, sent, _ = passed({"stream": True}, STREAM, broken)
    assert b"".join(sent) == broken and (usage.prompt, usage.completion) == (None, None)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"stream": 1}, "stream"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": [1]}, "stream_options"),
    ],
)
def test_a_request_says_whether_it_wants_a_stream(request_: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        Usage(None).counting(request_, b"{}")  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.param) == ("field", param)


def test_a_count_may_stand_anywhere() -> None:
    body = b'data: {"usage":{"prompt_tokens":7,"completion_tokens":1},"choices":[{}]}\n\n'
    _, sent, _ = passed({"stream": True}, STREAM, body)
    assert sent == [b'data: {"choices":[{}]}\n\n', b""]


def test_images_are_counted() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "image_url"}]
    assert images_in({"messages": [{"content": "x"}, {"content": parts}, {"content": None}, {"content": parts}]}) == 4
    assert images_in({"prompt": "x"}) == 0


def used(prompt: int | None, completion: int | None) -> Usage:
    usage = Usage(None)  # type: ignore[arg-type]
    usage.prompt, usage.completion = prompt, completion
    return usage


def test_a_budget_is_a_days_and_a_names() -> None:
    now = [86_400.0 * 20_000 + 3600]
    ledger = Ledger(lambda: now[0])
    old, new = (replace(key_of(text), name="ann", tokens_per_day=100) for text in ("old", "new"))
    other = replace(key_of("other"), name="bob", tokens_per_day=100)
    ledger.add("ann", used(60, 39))
    ledger.check(old)
    ledger.add("ann", used(1, None))
    for key in (old, new):
        with pytest.raises(Refusal, match="The 100 tokens") as caught:
            ledger.check(key)
        assert (caught.value.status, caught.value.reason) == (429, "tokens")
        assert dict(caught.value.headers)[b"retry-after"] == str(23 * 3600).encode()
    ledger.check(other)
    ledger.check(replace(old, tokens_per_day=101))  # a larger budget in the file counts at once
    ledger.check(replace(old, tokens_per_day=None))
    now[0] += 23 * 3600
    ledger.check(old)
    assert ledger.used("ann") == 0


def test_usage_is_in_the_metrics() -> None:
    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"key": "carol", **labels})

    ledger = Ledger()
    ledger.add("carol", used(60, 39))
    ledger.add("carol", used(None, None))
    assert value("qvl_key_requests_total") == 2
    assert (value("qvl_key_tokens_total", kind="prompt"), value("qvl_key_tokens_total", kind="completion")) == (60, 39)
