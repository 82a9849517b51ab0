"""The soak's accounts: what does not add up is said."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from prometheus_client import generate_latest

from bench.chaos.settings import SoakSettings
from bench.chaos.soak import Report, _difference, _Soak, soak
from serve.app.memory import register as register_memory
from serve.app.requestlog import RequestLog
from serve.guard.app import Guard
from serve.settings.limits import Limits


def sound() -> Report:
    return Report(
        minutes=1,
        workers=1,
        seed=0,
        sent={"good": 10, "hostile": 3, "leaves before the answer": 2},
        seen_status={"200": 10, "400": 2, "401": 1},
        counted_status={"200": 11, "499": 1, "400": 2, "401": 1},
        seen_reason={"n": 2, "key": 1},
        counted_reason={"n": 2, "key": 1},
        in_flight={"vllm:num_requests_running": 0.0},
        memory_warm=100.0,
        memory_end=104.0,
    )


def test_a_sound_soak_has_no_problems() -> None:
    assert sound().problems() == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("wrong", ["a good request got 500"], "500"),
        ("counted_reason", {"n": 2}, "key"),
        ("counted_reason", {"n": 3, "key": 1}, "3 were counted"),
        ("counted_status", {"200": 10, "499": 1, "400": 2, "401": 1}, "nobody waited for"),
        ("counted_status", {"200": 11, "499": 1, "400": 2, "401": 1, "500": 1}, "status 500"),
        ("seen_status", {"200": 9, "400": 2, "401": 1}, "9 good answers"),
        ("in_flight", {"vllm:num_requests_running": 1.0}, "num_requests_running"),
        ("memory_end", 106.0, "memory grew by 6.0%"),
        ("counted_memory", {"host, api": (1.0, 2.0), "GPU 0, server": (100.0, 107.0)}, "GPU 0, server: grew by 7.0%"),
    ],
)
def test_what_does_not_add_up_is_said(field: str, value: object, said: str) -> None:
    report = sound()
    setattr(report, field, value)
    problems = report.problems()
    assert len(problems) == 1
    assert said in problems[0]


def test_counters_are_compared_by_one_label() -> None:
    before = {("c_total", 'route="/a",status="200"'): 5.0, ("other", 'status="200"'): 1.0}
    after = {
        ("c_total", 'route="/a",status="200"'): 7.0,
        ("c_total", 'route="/b",status="200"'): 3.0,
        ("c_total", 'route="/b",status="404"'): 1.0,
        ("c_total", 'route="/metrics",status="200"'): 9.0,
        ("other", 'status="200"'): 8.0,
    }
    assert _difference(before, after, "c_total", "status", route=lambda route: route != "/metrics") == {
        "200": 5,
        "404": 1,
    }


KEY = "a-key-for-tests-0123456789"
SETTINGS = SoakSettings(model="m", api_key=KEY, pause=0.01)
#: Every so many-th good answer is an error.
FAILING = {"every": 0}


async def engine(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers as vLLM does, and has its metrics."""
    if scope["type"] != "http":
        return
    status, kind, pause = 200, b"application/json", 0.0
    if scope["path"] == "/metrics":
        body = generate_latest() + b"vllm:num_requests_running 0.0\nvllm:num_requests_waiting 0.0\n"
    else:
        asked = await receive()
        stream, pause = b'"stream": true' in asked["body"], 0.02
        body = b'{"choices": [{"finish_reason": "stop"}]}'
        body = b"data: " + body + b"\n\ndata: [DONE]\n\n" if stream else body
        kind = b"text/event-stream" if stream else kind
        FAILING["seen"] = FAILING.get("seen", 0) + 1
        if FAILING["every"] and FAILING["seen"] % FAILING["every"] < 2:  # the second try too
            status, body, kind = 500, b'{"error": {"message": "x"}}', b"application/json"
    await asyncio.sleep(pause)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    register_memory()
    app = RequestLog(Guard(engine, Limits(api_key=KEY)))  # type: ignore[arg-type]
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.slow
def test_the_accounts_of_a_guarded_server_add_up(url: str) -> None:
    settings = SETTINGS.replaced(minutes=0.1, pid=os.getpgrp())
    running = _Soak(url, settings)
    report = asyncio.run(running.run(settings.pid))
    assert report.sent["good"] and report.sent["hostile"]
    assert report.memory
    assert all(size > 2**20 for _, size in running.counted["host, api"])  # as the server's own gauges say
    assert report.problems(allowed_growth=1.0) == []


def test_memory_is_compared_after_warm_up_and_at_the_end() -> None:
    running = _Soak("http://127.0.0.1:9", SETTINGS.replaced(minutes=1))
    seen = [(float(second), 100 + second) for second in range(60)]
    running.report.memory = seen
    running.counted = {"host, api": seen, "GPU 0, card": seen[:5]}
    running._memory()
    assert (running.report.memory_warm, running.report.memory_end) == (115, 156.5)  # of 12 to 18 s, and from 54 s on
    assert running.report.counted_memory == {"host, api": (115, 156.5)}  # the other was not there long enough


@pytest.mark.slow
def test_a_server_that_fails_is_found_out(url: str) -> None:
    FAILING["every"] = 7
    problems: list[str] = []
    try:
        for _ in range(40):  # how many requests there are depends on the machine
            problems += asyncio.run(soak(url, SETTINGS.replaced(minutes=0.05, workers=2))).problems()
            if any("a good request got 500" in problem for problem in problems):
                break
    finally:
        FAILING["every"] = 0
    assert any("a good request got 500" in problem for problem in problems)
