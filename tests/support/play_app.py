"""What the tests of /play share: apps on a port, one that answers as vLLM does, by script; the controls of the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.browser import Tab


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an app on a free port of 127.0.0.1 from a thread; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(20)


async def lifespan(receive: Receive, send: Send) -> None:
    """Start and end as an app of uvicorn's."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


class FakeVllm:
    """Answers /v1/models and /v1/chat/completions; what it does is what the last question says.

    `refuse STATUS MESSAGE`: an error in OpenAI's shape. `slow`: a word every 0.2 s, for 10 s. `break`: the connection
    is cut after a word. `fail`: an error as an event of the stream. `say TEXT`: that text. Else "I see ...".
    """

    def __init__(self, name: str = "demo", length: int = 4096, pause: float = 0.02) -> None:
        self.name, self.length, self.pause = name, length, pause
        #: Further models that are listed.
        self.adapters: list[str] = []
        #: Scopes and decoded bodies of the chat requests so far.
        self.asked: list[tuple[Scope, dict[str, Any]]] = []
        #: Chat requests whose client left before the end.
        self.abandoned = 0
        #: A word is followed by others when it is set.
        self.goes_on = threading.Event()
        self.goes_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["path"] == "/v1/models":
            models = [{"id": name, "max_model_len": self.length} for name in (self.name, *self.adapters)]
            await _json(send, 200, {"object": "list", "data": models})
        elif scope["path"] == "/v1/chat/completions":
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            request = json.loads(body)
            self.asked.append((scope, request))
            await self._answer(request, receive, send)
        else:
            await _json(send, 404, {"inner": scope["path"]})

    async def _answer(self, request: dict[str, Any], receive: Receive, send: Send) -> None:
        content = request["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        word, _, rest = question.partition(" ")
        if word == "refuse":
            status, _, text = rest.partition(" ")
            headers = [(b"retry-after", b"7")] if status == "429" else []
            error = {"message": text, "type": "x", "param": None, "code": "x"}
            await _json(send, int(status), {"error": error}, headers)
            return
        images = sum(part["type"] == "image_url" for part in content) if isinstance(content, list) else 0
        text = rest if word == "say" else f"I see {images} images and {len(request['messages'])} messages."
        words = ["word"] * 50 if word == "slow" else text.split(" ")
        gone = asyncio.ensure_future(_gone(receive))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for index, piece in enumerate(words):
            await _event(send, {"choices": [{"delta": {"content": f" {piece}" if index else piece}}]})
            await asyncio.wait((gone,), timeout=0.2 if word in ("slow", "break") else self.pause)
            while not (self.goes_on.is_set() or gone.done()):
                await asyncio.sleep(0.01)
            if gone.done():
                self.abandoned += 1
                return
            if word == "break":
                return
            if word == "fail":
                await _event(send, {"error": {"message": rest}})
                break
        else:
            usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
            await _event(send, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
            await _event(send, {"choices": [], "usage": usage})
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _event(send: Send, event: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(event).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _json(send: Send, status: int, content: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    start = [(b"content-type", b"application/json"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- the page -------------------------------------------------------------------------------------------------


def ask(tab: Tab, question: str) -> None:
    """Type a question, ask it and wait until the answers are there."""
    before = tab.page.locator(".turn").count()
    tab.page.get_by_label("Question", exact=True).fill(question)
    tab.page.get_by_role("button", name="Ask", exact=True).click()
    tab.wait(f"document.querySelectorAll('.turn').length === {before + 1}")
    finished(tab)


def finished(tab: Tab) -> None:
    tab.wait("document.querySelector('#go').textContent === 'Ask'")


def texts(tab: Tab) -> list[str]:
    """What the last turn's answers say."""
    return tab.evaluate("[...document.querySelectorAll('.turn:last-child .text')].map(e => e.textContent)")


def failures(tab: Tab) -> list[str]:
    return tab.evaluate("[...document.querySelectorAll('.turn:last-child .failed')].map(e => e.textContent)")


def drop(tab: Tab, *files: tuple[str, str, bytes]) -> None:
    """Drop files (name, type, content) onto the page, as a user's mouse does."""
    tab.evaluate(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, type, content] of files) {
                const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, {type}));
            }
            for (const kind of ["dragover", "drop"]) {
                const event = new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
                document.body.dispatchEvent(event);
            }
        }""",
        [(name, kind, base64.b64encode(content).decode()) for name, kind, content in files],
    )
