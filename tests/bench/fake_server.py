"""An OpenAI-compatible server on 127.0.0.1 whose delays are known, so that what is measured can be checked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


@dataclass
class Behaviour:
    """What the server does. Seconds; a chunk carries ``per_chunk`` tokens."""

    first_s: float = 0.0
    gap_s: float = 0.0
    tokens: int = 8
    per_chunk: int = 1
    text: Callable[[Body], str | None] = lambda body: None  # an answer to stream instead of counted tokens
    model: str = "fake"
    api_key: str | None = None
    usage: bool = True
    done: bool = True
    finish: bool = True
    status: int = 200
    raw: bytes | None = None  # sent instead of the stream
    fail_after: int | None = None  # so many chat requests succeed, later ones get a 500
    close_after: int | None = None  # the connection is dropped after so many chunks
    obey_length: bool = True  # max_tokens under ignore_eos decides the length


@dataclass
class FakeServer:
    behaviour: Behaviour
    url: str = ""
    bodies: list[Body] = field(default_factory=list)
    raw_bodies: list[bytes] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *header_lines = head.split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (h.partition(":") for h in header_lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = line.split(" ")
        want = self.behaviour
        if want.api_key and headers.get("authorization") != f"Bearer {want.api_key}":
            await self._json(writer, 401, {"error": {"message": "invalid key"}})
        elif path == "/v1/models":
            await self._json(writer, 200, {"data": [{"id": want.model}]})
        elif path == "/version":
            await self._json(writer, 200, {"version": "9.9.9"})
        elif path == "/v1/chat/completions" and method == "POST":
            return await self._chat(writer, body)
        else:
            await self._json(writer, 404, {"error": {"message": f"no {path}"}})
        return True

    async def _json(self, writer: asyncio.StreamWriter, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    async def _chat(self, writer: asyncio.StreamWriter, data: bytes) -> bool:
        want = self.behaviour
        body = json.loads(data)
        self.bodies.append(body)
        self.raw_bodies.append(data)
        if want.status != 200 or (want.fail_after is not None and len(self.bodies) > want.fail_after):
            await self._json(writer, want.status if want.status != 200 else 500, {"error": {"message": "out of luck"}})
            return True
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(writer, body)
        finally:
            self.in_flight -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: Body) -> bool:
        want = self.behaviour
        tokens = body["max_tokens"] if body.get("ignore_eos") and want.obey_length else want.tokens
        answer = want.text(body)
        pieces = [answer] if answer is not None else ["x" * want.per_chunk] * (tokens // want.per_chunk)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

        async def send(data: bytes) -> None:
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()

        async def event(payload: Any) -> None:
            await send(b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n")

        def choice(delta: Body, reason: str | None = None) -> Body:
            return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

        if want.raw is not None:
            await send(want.raw)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return True
        await event(choice({"role": "assistant", "content": ""}))  # not a token
        for index, piece in enumerate(pieces):
            await asyncio.sleep(want.gap_s if index else want.first_s)
            if want.close_after is not None and index >= want.close_after:
                writer.transport.abort()
                return False
            await event(choice({"content": piece}))
        if want.finish:
            await event(choice({}, "stop"))
        if want.usage:
            count = len(answer.split()) if answer is not None else tokens
            await event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": max(1, count)}})
        if want.done:
            await send(b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


@contextmanager
def serving(behaviour: Behaviour | None = None) -> Iterator[FakeServer]:
    """Run the server in a thread of its own until the block ends."""
    server = FakeServer(behaviour or Behaviour())
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=2**24)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listener.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def main() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(run())
        loop.close()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
