"""The server that answers by the clock: our client finds in it what it was told to be."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest

from bench.load.client import ChatRequest, ask
from bench.load.endpoint import discover, http_client
from bench.run.boot import free_ports


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_ports(1)[0]
    command = [
        sys.executable,
        "-m",
        "bench.studies",
        "timed-server",
        "--port",
        str(port),
        "--first",
        "200",
        "--between",
        "20",
    ]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while True:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_a_stream_is_never_early_and_counts_its_tokens(url: str) -> None:
    async def go() -> None:
        end = await discover(url)
        async with http_client(end.url) as http:
            trace = await ask(http, ChatRequest("hello", (), 10).body(end.model), timeout_s=30.0)
        assert trace.failure is None
        assert trace.completion_tokens == 10 and trace.text == " w" * 10
        assert trace.chunks[0] - trace.started >= 0.2
        assert trace.ended - trace.started >= 0.2 + 9 * 0.02

    asyncio.run(go())


def test_other_routes_are_refused(url: str) -> None:
    assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 404
