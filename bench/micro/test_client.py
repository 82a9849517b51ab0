"""What the client itself costs: it shares the machine with the clock, and sometimes with the server."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.load import metrics
from bench.load.client import ChatRequest, Trace, ask
from bench.load.endpoint import http_client
from bench.load.inputs import SpeedInputs
from bench.load.loops import Block, open_loop, schedule
from bench.load.wire import Wire
from bench.run.config import BenchConfig
from serve.http.sse import EventDecoder

ROOT = Path(__file__).parents[2]
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


@contextmanager
def mock_server(**delays: float) -> Iterator[str]:
    """Run the tests' server in a process of its own, which takes no time of the client's; yield its URL."""
    options = [f"--{name}={seconds}" for name, seconds in delays.items()]
    command = [sys.executable, "-m", "tests.support.fake_server", *options]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


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


class BareSocket:
    """The least that a client can do: write the request, note when the first text comes, read to the end."""

    def __init__(self, url: str) -> None:
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, body: bytes, due: float) -> Trace:
        """Ask and return the trace; tokens are counted where they are read."""
        started = time.perf_counter()
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        chunks = []
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received = await reader.read(65536)
            if b'"content": "x' in received:
                chunks.append(time.perf_counter())
        self.idle.append((reader, writer))
        return Trace(due, started, time.perf_counter(), tuple(chunks), completion_tokens=len(chunks))

    async def close(self) -> None:
        """Close every connection."""
        for _, writer in self.idle:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize("tokens_per_s", [2500, 5000])
@pytest.mark.parametrize("client", ["bare socket", "httpx", "wire"])
def test_added_latency_under_load(benchmark: BenchmarkFixture, client: str, tokens_per_s: int) -> None:
    """A paced server streams so many tokens a second to one client: by how much its TTFT exceeds the server's own.

    The server notes its time from a request's last byte to its first token. The rest is the sockets', the scheduler's,
    the server's event loop's, as the bare socket shows, and beyond that the client's: `ask` with httpx's own transport
    and with `bench.load.wire`. Read it on a machine that does nothing else.
    """
    length = 50
    moments = schedule(tokens_per_s / length, duration_s=3.0, ramp_s=1.0, seed=1)
    bodies = SpeedInputs("micro", ((448, 448),), length).bodies("load", len(moments), "fake")
    above: list[float] = []
    busy: list[float] = []
    blocks: list[Block] = []

    async def load(url: str) -> None:
        async with http_client(url, connections=1024, transport=Wire() if client == "wire" else None) as http:

            async def send(body: bytes, due: float) -> Trace:
                return await ask(http, body, timeout_s=60, scheduled=due)

            bare = BareSocket(url)
            cpu, begun = time.process_time(), time.perf_counter()
            block = await open_loop(bare.send if client == "bare socket" else send, bodies, moments)
            busy.append((time.process_time() - cpu) / (time.perf_counter() - begun))
            await bare.close()
            served = (await http.get("/served")).json()
            own = statistics.median(trace.chunks[0] - trace.scheduled for trace in (*block.ramp, *block.traces))
            above.append(1000 * (own - statistics.median(served)))
            blocks.append(block)

    with mock_server(first=0.05, gap=0.02) as url:
        benchmark.pedantic(lambda: asyncio.run(load(url)), rounds=1)  # type: ignore[no-untyped-call]
    assert not blocks[-1].failed
    figures = [metrics.summarise(block.traces, block.wall_s, loop_lag=block.loop_lag) for block in blocks]
    rates = [metrics.steady([*b.ramp, *b.traces], b.begun, b.traces[-1].scheduled) for b in blocks]
    benchmark.extra_info["ttft_p50_above_the_servers_ms"] = [round(ms, 3) for ms in above]
    benchmark.extra_info["share_of_a_core"] = round(statistics.median(busy), 3)
    benchmark.extra_info["streamed_tokens_per_s"] = [round(r.output_tokens_per_s or 0) for r in rates if r]
    benchmark.extra_info["client_lag_p50_ms"] = [round(1000 * f.client_lag.p50, 3) for f in figures if f.client_lag]
    benchmark.extra_info["loop_lag_p50_ms"] = [round(1000 * f.loop_lag.p50, 3) for f in figures if f.loop_lag]


@pytest.mark.parametrize("wire", [False, True])
def test_most_tokens(benchmark: BenchmarkFixture, wire: bool) -> None:
    """A server that sends as fast as it can: the most tokens a second that one client takes."""
    streams = 8
    body = ChatRequest("What is this?", max_tokens=TOKENS, fixed_length=True).body("fake")

    async def take(http: httpx.AsyncClient) -> int:
        traces = await asyncio.gather(*(ask(http, body, timeout_s=60) for _ in range(streams)))
        return sum(len(trace.chunks) for trace in traces)

    with mock_server() as url, asyncio.Runner() as runner:
        http = http_client(url, connections=streams, transport=Wire() if wire else None)
        assert benchmark(lambda: runner.run(take(http))) == streams * TOKENS
        runner.run(http.aclose())
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_s"] = round(streams * TOKENS / benchmark.stats.stats.median)


def test_making_an_image_request(benchmark: BenchmarkFixture) -> None:
    """448x448, made before a block starts; at 100 requests/s it would take a part of the 10 ms even so."""
    inputs = SpeedInputs("micro", ((448, 448),), 128)
    indices = iter(range(10**9))
    assert benchmark(lambda: len(inputs.request("b", next(indices)).body("demo"))) > 1000
    if benchmark.stats is not None:
        benchmark.extra_info["requests_per_s"] = round(1 / benchmark.stats.stats.median)


def test_making_a_page_request(benchmark: BenchmarkFixture) -> None:
    """1092x1540, the largest image of the presets."""
    config = BenchConfig(baseline="a", candidate="b", out=Path("out"), preset="ocr-document")
    inputs = config.inputs("micro")
    indices = iter(range(10**9))
    assert benchmark(lambda: len(inputs.request("b", next(indices)).body("demo"))) > 1000
