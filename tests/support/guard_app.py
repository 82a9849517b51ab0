"""A small ASGI application behind a guard, and what is needed to talk to both without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from serve.guard.app import Guard
from serve.guard.fetch import Fetcher
from serve.http.metrics import refusals
from serve.settings.limits import Limits

KEY = "a-key-for-tests-0123456789"


@dataclass
class App:
    """Answers every request with `chunks`, the first after `delay` seconds and each next one after `pause`."""

    chunks: tuple[bytes, ...] = (b"{}",)
    content_type: bytes = b"application/json"
    delay: float = 0.0
    pause: float = 0.0
    #: What has reached it: scope and body.
    requests: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    #: Requests that were given up because the client was gone, as the app was told.
    aborted: int = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            self.requests.append((scope, b""))
            return
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        self.requests.append((scope, message["body"]))
        answer = asyncio.create_task(self._answer(send))
        leaves = asyncio.create_task(receive())
        await asyncio.wait([answer, leaves], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self.aborted += 1
        for task in (answer, leaves):
            task.cancel()
        await asyncio.gather(answer, leaves, return_exceptions=True)

    async def _answer(self, send: Any) -> None:
        await asyncio.sleep(self.delay)
        headers = [(b"content-type", self.content_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(self.pause)
        await send({"type": "http.response.body", "body": b""})


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error, in OpenAI's shape or not at all."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].endswith((".", "...", ";base64,"))
        return error


class Client:
    """Sends requests to a guard in this process."""

    def __init__(self, limits: Limits | None = None, app: App | None = None, fetcher: Fetcher | None = None) -> None:
        self.app = app or App()
        self.guard = Guard(self.app, limits or Limits(api_key=KEY), fetcher)

    async def ask(
        self, method: str = "POST", path: str = "/v1/chat/completions", body: bytes | Iterable[Any] = b"", *,
        key: str | None = KEY, headers: dict[str, str] | None = None, leaves_after: float | None = None,
        scope: dict[str, Any] | None = None,
    ) -> Answer:  # fmt: skip
        """Send one request; of a body in pieces a number is a pause in seconds, and ... means that nothing more comes.

        `leaves_after`: seconds after the body until the client is gone.
        """
        pieces = [body] if isinstance(body, bytes) else list(body)
        fields = {"content-type": "application/json"} if method == "POST" else {}
        if isinstance(body, bytes) and body:
            fields["content-length"] = str(len(body))
        elif not isinstance(body, bytes):
            fields["transfer-encoding"] = "chunked"
        if key is not None:
            fields["authorization"] = f"Bearer {key}"
        fields |= {name.lower(): value for name, value in (headers or {}).items()}

        async def receive() -> dict[str, Any]:
            while pieces:
                piece = pieces.pop(0)
                if piece is ...:
                    await asyncio.sleep(60)
                elif isinstance(piece, bytes):
                    return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
                else:
                    await asyncio.sleep(piece)
            await asyncio.sleep(60 if leaves_after is None else leaves_after)
            return {"type": "http.disconnect"}

        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        whole = {
            "type": "http", "method": method, "path": path, "root_path": "", "query_string": b"",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items()],
            "client": ("192.0.2.1", 1234),
        }  # fmt: skip
        await self.guard(whole | (scope or {}), receive, send)
        if not sent:
            return Answer(0, {}, b"")
        assert [m["type"] for m in sent].count("http.response.start") == 1
        shown = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], shown, b"".join(m.get("body", b"") for m in sent[1:]))


def count(reason: str) -> float:
    """Return how often requests were refused for this reason so far."""
    return float(refusals.labels(reason)._value.get())


def chat(**fields: Any) -> bytes:
    """Return a good chat request with some fields changed."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | fields).encode()
