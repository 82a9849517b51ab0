"""A server that answers by the clock: every token comes when it is due, so what a client measures is known beforehand.

    python -m bench.studies timed-server --port 8900 --first 30 --between 6

It speaks as much of OpenAI's API as `qvl bench` and `vllm bench serve` ask of a server, computes nothing, and says
nothing of any model. What a client adds to a due time is the client's, and the event loop's of this process.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from bench.studies.settings import TimedServerSettings

__all__ = ["app", "run"]

MODEL = "paced"
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _line({"id": "p", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]})


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def app(first: float, between: float) -> Any:
    """Return an ASGI application whose first token comes after ``first`` seconds and each other ``between`` later."""
    opened, token, last = _event({"role": "assistant", "content": ""}), _event({"content": " w"}), _event({}, "length")

    async def answer(send: Any, body: bytes) -> None:
        began = asyncio.get_running_loop().time()
        asked = json.loads(body)
        count = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 16)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        for number in range(count):
            due = began + first + number * between
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            piece = opened + token if number == 0 else token
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        ended = last + _line({"id": "p", "object": "chat.completion.chunk", "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": ended + b"data: [DONE]\n\n"})

    async def plain(send: Any, status: int, value: dict[str, Any]) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["path"] == "/v1/chat/completions" and body:
            await answer(send, body)
        elif scope["path"] == "/v1/models":
            await plain(send, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            await plain(send, 404, {"error": {"message": "no such route", "code": 404}})

    return application


def run(settings: TimedServerSettings) -> None:
    """Serve until told to end."""
    import uvicorn

    served = app(settings.first / 1000, settings.between / 1000)
    uvicorn.run(served, host="127.0.0.1", port=settings.port, log_level="warning", access_log=False)
