"""GET /v1/models/NAME: one entry of the list that vLLM has, which has no such route itself."""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any

from starlette.types import ASGIApp, Message, Scope, Send

from serve.guard.listing import Listing
from serve.http.errors import Refusal

__all__ = ["answer_model"]


async def answer_model(app: ASGIApp, scope: Scope, send: Send, name: str, models: Set[str] | None = None) -> None:
    """Answer a request for one model with what the application lists of it.

    Args:
        app: the application.
        scope: of the request.
        send: to the client.
        name: the model's.
        models: those that the client may know of; None: all.

    Raises:
        Refusal: no model of that name is served, or the list can't be had.
    """
    status, body = 0, b""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def kept(message: Message) -> None:
        nonlocal status, body
        status = message.get("status", status)
        body += message.get("body", b"")

    into = kept if models is None else Listing(models, kept).send
    await app({**scope, "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models"}, receive, into)
    entries: list[dict[str, Any]] = json.loads(body)["data"] if status == 200 else []
    entry = next((each for each in entries if each.get("id") == name), None)
    if entry is None:
        raise Refusal(
            404, "model", "There is no model of that name here. GET /v1/models lists those that are.", "model"
        )
    text = json.dumps(entry).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})
