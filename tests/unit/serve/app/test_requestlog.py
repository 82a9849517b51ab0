"""Ids, lines and counts of requests, before an application of the test's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from serve.app.requestlog import RequestLog
from serve.settings.environment import REQUEST_LOG

App = Callable[..., Awaitable[None]]


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, note a key and say what was seen."""
    scope["qvl"] |= {"key": "ab12cd", "prompt_tokens": 12}
    body = (await receive()).get("body", b"")
    seen = dict(scope["headers"])[b"x-request-id"].decode()
    headers = [(b"content-type", b"text/plain"), (b"x-request-id", b"from inside")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": f"{scope['qvl']['id']} {seen} ".encode() + body})


def ask(app: App, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=RequestLog(app), raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **options)

    return asyncio.run(go())


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is logged."""
    written: list[dict[str, Any]] = []
    monkeypatch.setenv(REQUEST_LOG, "1")
    monkeypatch.setattr("serve.app.requestlog.write", lambda text: written.append(json.loads(text)))
    return written


def count(route: str, status: str) -> float:
    return REGISTRY.get_sample_value("qvl_requests_total", {"route": route, "status": status}) or 0.0


def test_one_line_without_what_the_client_said(lines: list[dict[str, Any]]) -> None:
    before = count("/v1/chat/completions", "200")
    headers = {"x-request-id": "my-id.1", "authorization": "Bearer secret", "user-agent": "prompt"}
    response = ask(answer, "/v1/chat/completions?key=secret", content=b"a prompt", headers=headers)
    assert response.text == "my-id.1 my-id.1 a prompt"
    assert response.headers.get_list("x-request-id") == ["my-id.1"]
    (entry,) = lines
    assert 0 <= entry.pop("seconds") < 5 and entry.pop("time")
    assert entry == {
        "level": "info",
        "logger": "qvl.requests",
        "message": "request",
        "id": "my-id.1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "bytes_in": 8,
        "bytes_out": len(response.content),
        "key": "ab12cd",
        "images": None,
        "prompt_tokens": 12,
        "completion_tokens": None,
        "trace": None,
        "refused": None,
    }
    assert count("/v1/chat/completions", "200") == before + 1
    assert REGISTRY.get_sample_value("qvl_in_flight") == 0


@pytest.mark.parametrize("bad", ["", "a b", 'x"y', "a\tb", "x" * 65, "ü".encode("latin-1")])
def test_ids_are_made_safe(bad: str | bytes, lines: list[dict[str, Any]]) -> None:
    response = ask(answer, headers={"x-request-id": bad})  # type: ignore[dict-item]
    number = response.headers["x-request-id"]
    assert len(number) == 32 and number.isalnum() and number == lines[0]["id"]
    assert ask(answer).headers["x-request-id"] != number


TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def traced(*headers: tuple[str, str]) -> dict[bytes, bytes]:
    """Return what of a trace reaches the application."""
    seen: dict[bytes, bytes] = {}

    async def look(scope: Any, receive: Any, send: Any) -> None:
        seen.update({name: value for name, value in scope["headers"] if name.startswith(b"trace")})
        await answer(scope, receive, send)

    ask(look, headers=list(headers))
    return seen


def test_a_trace_is_passed_on_and_its_id_logged(lines: list[dict[str, Any]]) -> None:
    seen = traced(("traceparent", PARENT), ("tracestate", "vendor=secret"))
    assert seen == {b"traceparent": PARENT.encode(), b"tracestate": b"vendor=secret"}
    assert lines[0]["trace"] == TRACE and "secret" not in json.dumps(lines)


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", PARENT.upper())],
        [("traceparent", PARENT.replace("00-", "ff-", 1))],
        [("traceparent", f"00-{'0' * 32}-b7ad6b7169203331-01")],
        [("traceparent", f"00-{TRACE}-{'0' * 16}-01")],
        [("traceparent", f"{PARENT}-a prompt")],
        [("traceparent", PARENT), ("traceparent", PARENT)],
        [],
    ],
)
def test_what_is_no_trace_is_left_out(headers: list[tuple[str, str]], lines: list[dict[str, Any]]) -> None:
    assert traced(*headers, ("tracestate", "a=b")) == {}
    assert lines[0]["trace"] is None


def test_a_trace_without_its_state(lines: list[dict[str, Any]]) -> None:
    assert traced(("traceparent", PARENT), ("tracestate", "a=" + "b" * 600)) == {b"traceparent": PARENT.encode()}


def test_paths_of_strangers_are_no_labels(lines: list[dict[str, Any]]) -> None:
    before = count("other", "200")
    ask(answer, "/wp-admin.php")
    ask(answer, "/play/page.js")
    assert [entry["route"] for entry in lines] == ["other", "/play"]
    assert count("other", "200") == before + 1


def test_what_machines_poll_is_logged_only_when_it_fails(lines: list[dict[str, Any]]) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    ask(answer, "/health")
    ask(failing, "/ready")
    assert lines == []
    ask(failing, "/health")
    assert [(entry["route"], entry["status"], entry["level"]) for entry in lines] == [("/health", 503, "error")]


def test_an_application_that_fails(lines: list[dict[str, Any]]) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("secret")

    ask(broken)
    assert lines[0]["status"] == 500 and "secret" not in json.dumps(lines)


def test_a_client_that_goes_away(lines: list[dict[str, Any]]) -> None:
    async def cancelled(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def go() -> None:
        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
        with pytest.raises(asyncio.CancelledError):
            await RequestLog(cancelled)(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(go())
    assert lines[0]["status"] == 499


def test_lines_only_where_they_are_asked_for(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUEST_LOG)
    assert ask(answer).headers["x-request-id"]
    assert lines == []
