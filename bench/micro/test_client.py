"""What the client itself costs: it shares the machine with the clock, and sometimes with the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
from pytest_benchmark.fixture import BenchmarkFixture

from bench.client import ChatRequest, EventDecoder, Trace, ask
from bench.endpoint import http_client
from bench.inputs import SpeedInputs

TOKENS = 256


def events(count: int = TOKENS) -> list[bytes]:
    """A stream as vLLM sends it, one token a chunk."""
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1763876000,
        "model": "demo",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
    }
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": count + 9}}
    lines = [json.dumps(chunk)] * count + [json.dumps(usage), "[DONE]"]
    return [f"data: {line}\n\n".encode() for line in lines]


def test_decoding_a_stream(benchmark: BenchmarkFixture) -> None:
    """Splitting bytes into events, without reading their JSON."""
    data = events()

    def decode() -> int:
        decoder = EventDecoder()
        return sum(len(decoder.feed(piece)) for piece in data)

    assert benchmark(decode) == TOKENS + 2
    benchmark.extra_info["events"] = TOKENS + 2


def test_one_streamed_request(benchmark: BenchmarkFixture) -> None:
    """All of `ask` without a network: what is left of a token's latency when the server takes no time."""
    data = events()

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in data:
                yield piece

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Stream()))
    body = ChatRequest("What is this?", max_tokens=TOKENS).body("demo")
    with asyncio.Runner() as runner:
        http = http_client("http://127.0.0.1:1", transport=transport)

        def once() -> Trace:
            return runner.run(ask(http, body, timeout_s=60))

        trace = benchmark(once)
        runner.run(http.aclose())
    assert trace.failure is None
    assert (trace.completion_tokens, len(trace.chunks)) == (TOKENS, TOKENS)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["tokens_per_s"] = round(TOKENS / benchmark.stats.stats.median)


def test_making_a_picture_request(benchmark: BenchmarkFixture) -> None:
    """Made before a block starts, not while it runs; still what a long sweep spends between blocks."""
    inputs = SpeedInputs("micro", ((448, 448),), 128)
    indices = iter(range(10**9))
    assert benchmark(lambda: len(inputs.request("b", next(indices)).body("demo"))) > 1000
