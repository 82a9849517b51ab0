"""What the guard costs: the same server with and without it, in turns. `python -m bench.studies guard-cost --out DIR`.

Three engines, each behind the guard and bare: one that answers at once, so that nothing but the HTTP server and the
guard takes time; one as fast as a 7B model on a data-centre GPU; and, with --real, vLLM itself with the embedded model.
32 clients send one request after the other; rounds of both servers alternate (A B B A ...) and are compared in pairs.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
from PIL import Image

from bench.chaos.hostile import CHAT, chat_body, data_url
from bench.machine.environment import command_line, cpu_name, gpu_names, system_name, versions
from bench.run.boot import free_ports
from bench.studies.settings import GuardCostSettings

__all__ = ["Comparison", "compare", "measure", "run", "serve"]

KEY = "key-of-the-bench-0123456789"
#: Seconds to the first token, seconds between tokens, tokens.
ENGINES = {"at once": (0.0, 0.0, 32), "as a GPU": (0.03, 0.006, 32)}
CONCURRENCY = 32


@dataclass(frozen=True)
class Round:
    """One round: requests a second; the median time to the first byte of an answer's body, in seconds; seconds of
    processor time that the server's processes took for a request, which hardly depends on what else the machine does.
    """

    throughput: float
    ttft_p50: float
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """Bare and guarded, over pairs of rounds; intervals are 95%, by bootstrap over the pairs."""

    engine: str
    request: str
    rounds: int
    requests_a_round: int
    throughput_bare: float
    throughput_guarded: float
    #: Throughput lost to the guard, as a share: 0.01 is 1%.
    cost: float
    cost_interval: tuple[float, float]
    ttft_p50_bare_ms: float
    ttft_p50_guarded_ms: float
    ttft_added_ms: float
    ttft_added_interval_ms: tuple[float, float]
    cpu_bare_ms: float
    cpu_guarded_ms: float
    cpu_added_ms: float
    cpu_added_interval_ms: tuple[float, float]


def image(size: int = 112) -> bytes:
    """Return a PNG of noise, the most bytes that an image of this size can have."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


async def measure(url: str, pid: int, body: bytes, requests: int, concurrency: int = CONCURRENCY) -> Round:
    """Send so many requests, `concurrency` at a time on connections that are kept, and return what came of them.

    `pid` is the server's process; what its descendants compute counts too.
    """
    where = urlsplit(url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    left = requests
    waits: list[float] = []

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
        while left > 0:
            left -= 1
            began = time.perf_counter()
            writer.write(whole)
            header = await reader.readuntil(b"\r\n\r\n")
            if not header.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{header[:40]!r}: {(await reader.read(500))!r}")
            received = await reader.read(1 << 16)
            waits.append(time.perf_counter() - began)
            while not received.endswith(b"\r\n0\r\n\r\n"):  # the last chunk
                piece = await reader.read(1 << 16)
                if not piece:
                    raise RuntimeError("the answer broke off")
                received = received[-16:] + piece
        writer.close()

    began, computed = time.perf_counter(), _cpu_seconds(pid)
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    return Round(len(waits) / seconds, statistics.median(waits), (_cpu_seconds(pid) - computed) / len(waits))


def _cpu_seconds(pid: int) -> float:
    server = psutil.Process(pid)
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


#: A server's URL and process.
Server = tuple[str, int]


def compare(
    engine: str, request: str, servers: tuple[Server, Server], body: bytes, plan: tuple[int, int]
) -> Comparison:
    """Measure the bare and the guarded server in turns and return how they differ.

    Args:
        plan: rounds, and requests in each.
    """
    bare, guarded = servers
    rounds, requests = plan
    pairs: list[tuple[Round, Round]] = []
    for server in (bare, guarded):
        asyncio.run(measure(*server, body, max(CONCURRENCY, requests // 4)))  # warm-up
    for number in range(rounds):
        order = (bare, guarded) if number % 2 == 0 else (guarded, bare)
        first, second = (asyncio.run(measure(*server, body, requests)) for server in order)
        pairs.append((first, second) if number % 2 == 0 else (second, first))
    costs = [1 - b.throughput / a.throughput for a, b in pairs]
    added = [(b.ttft_p50 - a.ttft_p50) * 1e3 for a, b in pairs]
    computed = [(b.cpu - a.cpu) * 1e3 for a, b in pairs]
    return Comparison(
        engine=engine,
        request=request,
        rounds=rounds,
        requests_a_round=requests,
        throughput_bare=statistics.median(a.throughput for a, _ in pairs),
        throughput_guarded=statistics.median(b.throughput for _, b in pairs),
        cost=statistics.median(costs),
        cost_interval=_interval(costs),
        ttft_p50_bare_ms=statistics.median(a.ttft_p50 for a, _ in pairs) * 1e3,
        ttft_p50_guarded_ms=statistics.median(b.ttft_p50 for _, b in pairs) * 1e3,
        ttft_added_ms=statistics.median(added),
        ttft_added_interval_ms=_interval(added),
        cpu_bare_ms=statistics.median(a.cpu for a, _ in pairs) * 1e3,
        cpu_guarded_ms=statistics.median(b.cpu for _, b in pairs) * 1e3,
        cpu_added_ms=statistics.median(computed),
        cpu_added_interval_ms=_interval(computed),
    )


def _interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% interval of the median, by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def _engine(first: float, between: float, tokens: int) -> Callable[..., Any]:
    """Return an ASGI application that streams as vLLM does, one server-sent event a token."""
    event = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if body:
            json.loads(body)
        await asyncio.sleep(first)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(tokens):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(between)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


def serve(engine: str, guarded: bool, port: int) -> None:
    """Be the server of an engine that is made up."""
    import uvicorn

    from serve.guard.app import Guard
    from serve.settings.limits import Limits

    app = _engine(*ENGINES[engine])
    if guarded:
        app = Guard(app, Limits(api_key=KEY))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


@contextmanager
def _served(engine: str, guarded: bool, port: int) -> Iterator[tuple[str, int]]:
    arguments = ["guard-cost-engine", engine, "--port", str(port), *(["--guarded"] if guarded else [])]
    process = subprocess.Popen([sys.executable, "-m", "bench.studies", *arguments])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                httpx.get(f"{url}/health", trust_env=False, timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _vllm(guarded: bool, port: int) -> Iterator[tuple[str, int]]:
    from serve.process.lifecycle import start
    from serve.settings.config import ServerConfig
    from serve.settings.limits import Limits

    limits = Limits(api_key=KEY) if guarded else None
    # The same key on both sides: vLLM's own check is what the guard's takes the place of.
    with start("demo", ServerConfig(port=port, timeout=300, api_key=KEY, guard=limits, max_num_seqs=32)) as server:
        yield server.url, server.pid


def _row(found: Comparison) -> str:
    low, high = (f"{value:+.1%}" for value in found.cost_interval)
    least, most = (f"{value:+.2f}" for value in found.ttft_added_interval_ms)
    few, many = (f"{value:+.2f}" for value in found.cpu_added_interval_ms)
    return (
        f"| {found.engine} | {found.request} | {found.throughput_bare:.1f} | {found.cost:+.1%} ({low} to {high}) | "
        f"{found.ttft_p50_bare_ms:.2f} | {found.ttft_added_ms:+.2f} ({least} to {most}) | "
        f"{found.cpu_bare_ms:.2f} | {found.cpu_added_ms:+.2f} ({few} to {many}) |"
    )


HEAD = [
    "| engine | request | requests/s bare | lost | TTFT p50 bare, ms | added | CPU a request bare, ms | added |",
    "|---|---|---|---|---|---|---|---|",
]


def run(settings: GuardCostSettings) -> None:
    """Measure every engine with and without the guard, print a table, and write the report where one is asked for."""
    bodies = {
        "text": chat_body("demo", max_tokens=16, stream=True),
        "an image of 112 x 112": chat_body("demo", data_url(image()), max_tokens=16, stream=True),
    }
    found: list[Comparison] = []
    print("\n".join(HEAD), flush=True)
    for engine in [*ENGINES, *(["vLLM, embedded model"] if settings.real else [])]:
        real = engine not in ENGINES
        plan = (settings.real_rounds, settings.real_requests) if real else (settings.rounds, settings.requests)
        with ExitStack() as stack:
            bare, guarded = (
                stack.enter_context(_vllm(on, port) if real else _served(engine, on, port))
                for on, port in zip((False, True), free_ports(2), strict=True)
            )
            for request, body in bodies.items():
                found.append(compare(engine, request, (bare, guarded), body, plan))
                print(_row(found[-1]), flush=True)
    if settings.out is not None:
        _write(found, settings.out)


def _write(found: list[Comparison], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command_line(["python", "-m", "bench.studies", *sys.argv[1:]]).removeprefix("qvl "),
        "device": "; ".join(gpu_names()) or cpu_name(),
        "system": system_name(),
        "load_average": os.getloadavg(),
        "versions": versions(),
    }
    (out / "report.json").write_text(json.dumps(about | {"found": [asdict(f) for f in found]}, indent=1) + "\n")
    head = [
        "# What the guard costs",
        "",
        f"    {about['command']}",
        "",
        f"{about['device']}, {about['system']}. " + ", ".join(f"{n} {v}" for n, v in versions().items()),
        "",
        f"{CONCURRENCY} clients. Intervals: 95% of the median over pairs of rounds, by bootstrap.",
        "",
    ]
    (out / "README.md").write_text("\n".join([*head, *HEAD, *map(_row, found), ""]))
