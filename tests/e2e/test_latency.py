"""What a server's latencies are and whether it streams, counts and caches as a measurement needs it to.

Against the shared server of these tests, or with ``pytest --endpoint URL`` against one that runs; the environment's
QVL_API_KEY is its key. ``--slo ttft=500ms,tpot=50ms`` holds every request to objectives.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from bench.load import metrics
from bench.load.client import Trace, ask
from bench.load.endpoint import Endpoint, discover, http_client
from bench.load.inputs import SpeedInputs
from bench.load.loops import closed_loop
from bench.load.workload import ImageSize
from bench.machine.server_metrics import ServerPoint, read
from tests.conftest import TOLD

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]

TOKENS = 16


@pytest.fixture(scope="package")
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    """The server that is measured."""
    url = request.config.getoption("--endpoint")
    if url:
        return asyncio.run(discover(url, os.environ.get("QVL_API_KEY")))
    return asyncio.run(discover(request.getfixturevalue("served")("demo").url))


@dataclass(frozen=True)
class Measured:
    """The requests of a block, its wall time, and what the server counted meanwhile."""

    traces: tuple[Trace, ...]
    wall_s: float
    server: ServerPoint | None


#: (concurrency, requests, image size) -> what was measured.
Measure = Callable[[int, int, ImageSize], Measured]


@pytest.fixture(scope="package")
def latency(endpoint: Endpoint, request: pytest.FixtureRequest) -> Measure:
    """Warm up, measure with requests no cache knows, tell the figures at the end of the session."""
    run = secrets.token_hex(8)

    async def go(concurrency: int, requests: int, size: ImageSize) -> Measured:
        inputs = SpeedInputs(run, (size,), TOKENS)
        label = f"{concurrency}/{requests}/{size}"
        async with http_client(endpoint.url, endpoint.api_key, connections=concurrency) as http:

            async def send(body: bytes, due: float) -> Trace:
                return await ask(http, body, timeout_s=120.0, scheduled=due)

            await closed_loop(send, inputs.bodies(f"{label}/warm-up", 2 * concurrency, endpoint.model), concurrency)
            before = await read(http)
            block = await closed_loop(send, inputs.bodies(label, requests, endpoint.model), concurrency)
            return Measured(block.traces, block.wall_s, ServerPoint.between(before, await read(http)))

    def measure(concurrency: int, requests: int, size: ImageSize) -> Measured:
        measured = asyncio.run(go(concurrency, requests, size))
        found = metrics.summarise(measured.traces, measured.wall_s)
        told = [f"{concurrency} in flight, {'text' if size is None else f'{size[0]}x{size[1]}'}, {requests} requests"]
        for name, spread in (("TTFT", found.ttft), ("TPOT", found.tpot), ("E2E", found.e2e)):
            if spread:
                told.append(f"{name} p50 {1000 * spread.p50:.1f} p99 {1000 * spread.p99:.1f} ms")
        if found.output_tokens_per_s:
            told.append(f"{found.output_tokens_per_s:.0f} tokens/s")
        request.config.stash[TOLD].append(": ".join([told[0], ", ".join(told[1:])]))
        return measured

    return measure


@pytest.mark.parametrize(("concurrency", "size"), [(1, None), (1, (224, 224)), (4, (224, 168))])
def test_answers_are_streamed_counted_and_not_cached(
    latency: Measure, concurrency: int, size: ImageSize, request: pytest.FixtureRequest
) -> None:
    requests = 4 * concurrency
    found = latency(concurrency, requests, size)
    assert [trace.failure for trace in found.traces] == [None] * requests
    for trace in found.traces:
        assert trace.completion_tokens == TOKENS
        assert 1 <= len(trace.chunks) <= TOKENS
        assert trace.scheduled <= trace.started < trace.chunks[0] <= trace.chunks[-1] <= trace.ended
    # As it is written, not all at the end. A server that is short of time may put tokens together, so not of each.
    assert max(len(trace.chunks) for trace in found.traces) > 1
    lengths = [trace.prompt_tokens or 0 for trace in found.traces]
    assert max(lengths) <= 1.25 * min(lengths)  # equal work, but for how a vocabulary splits words
    if found.server:
        assert found.server.finished is None or found.server.finished >= requests
        assert not found.server.image_hits
        if found.server.prefix_queries:
            # What all chats begin with may be cached, in blocks; the requests' own words and images may not.
            assert (found.server.prefix_hits or 0) < 0.5 * found.server.prefix_queries
    objectives = request.config.getoption("--slo")
    if objectives:
        slos = metrics.parse_slos(objectives)
        good = metrics.goodput(found.traces, slos, found.wall_s)
        assert good is not None and good.share == 1.0, f"{good.share:.0%} of the requests met {objectives}"


def test_the_server_counts_what_was_sent(latency: Measure) -> None:
    found = latency(2, 6, (112, 112))
    if found.server is None:
        pytest.skip("this server has no /metrics that is known here")
    # Others may use a server that runs; nobody uses one that these tests booted.
    assert found.server.finished is not None and found.server.finished >= 6
    assert found.server.output_tokens is not None and found.server.output_tokens >= 6 * TOKENS
    assert found.server.prompt_tokens is not None
    assert found.server.prompt_tokens >= sum(trace.prompt_tokens or 0 for trace in found.traces)
    assert found.server.image_queries is not None and found.server.image_queries >= 6
    assert found.server.image_hits == 0 and found.server.preemptions == 0
    assert found.server.kv_tokens is not None and found.server.kv_tokens > 0
    assert found.server.queue_mean_s is not None and 0 <= found.server.queue_mean_s < 60
