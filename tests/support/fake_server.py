"""An OpenAI-compatible server on 127.0.0.1 whose delays are known, so that what is measured can be checked.

``python -m tests.support.fake_server --first 0.02 --gap 0.01`` runs it in a process of its own until its input
closes, so that it takes no time from the client that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


@dataclass
class Behaviour:
    """What the server does. Seconds; a chunk carries ``per_chunk`` tokens."""

    first_s: float = 0.0
    jitter_s: float = (
        0.0  # added to first_s, uniformly from 0, so that requests sent together are not answered together
    )
    gap_s: float = 0.0
    tokens: int = 8
    per_chunk: int = 1
    text: Callable[[Body], str | None] = lambda body: None  # an answer to stream instead of counted tokens
    whole: Callable[[Body], str] = lambda body: "x"  # the answer to a request that asks for no stream
    model: str = "fake"
    others: tuple[str, ...] = ()  # models that it has too
    api_key: str | None = None
    prompt: Callable[[Body], int] = lambda body: 7  # tokens that it counts in a prompt
    usage: bool = True
    done: bool = True
    finish: bool = True
    status: int = 200
    error: bytes | None = None  # the body of an error status, instead of JSON
    raw: bytes | None = None  # sent instead of the stream
    fail_after: int | None = None  # so many chat requests succeed, later ones get a 500
    fail_every: int | None = None  # each so many-th request gets ``fail_status``
    fail_status: int = 500
    retry_after: str | None = None  # header of every error status
    busy: int = 0  # so many requests get a 429 before one is answered
    reasoning: str | None = None  # name of the delta's field in which the tokens come, instead of content
    count_chunks: bool = False  # counts tokens in every chunk when asked to
    close_after: int | None = None  # the connection is dropped after so many chunks
    stall_after: int | None = None  # nothing more is sent after so many chunks
    slots: int | None = None  # requests answered at a time; others wait in the server's queue
    queue_time: bool = False  # usage says how long a request waited there
    obey_length: bool = True  # max_tokens under ignore_eos decides the length
    metrics: bool = False  # /metrics counts the requests that ended, in vLLM's names


@dataclass
class FakeServer:
    behaviour: Behaviour
    url: str = ""
    bodies: list[Body] = field(default_factory=list)
    raw_bodies: list[bytes] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    served: list[float] = field(default_factory=list)  # seconds from a request's last byte to its first token
    slots: asyncio.Semaphore | None = None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client is gone, or the test is over
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
            await self._json(writer, 200, {"data": [{"id": name} for name in (want.model, *want.others)]})
        elif path == "/version":
            await self._json(writer, 200, {"version": "9.9.9"})
        elif path == "/metrics" and want.metrics:
            await self._metrics(writer)
        elif path == "/served":
            await self._json(writer, 200, self.served)
            self.served = []
        elif path == "/v1/chat/completions" and method == "POST":
            return await self._chat(writer, body)
        else:
            await self._json(writer, 404, {"error": {"message": f"no {path}"}})
        return True

    async def _metrics(self, writer: asyncio.StreamWriter) -> None:
        page = (
            f'vllm:request_success_total{{finished_reason="length"}} {len(self.served)}.0\n'
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
        ).encode()
        writer.write(f"HTTP/1.1 200 X\r\ncontent-length: {len(page)}\r\n\r\n".encode() + page)
        await writer.drain()

    async def _json(self, writer: asyncio.StreamWriter, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n"
        if status != 200 and self.behaviour.retry_after is not None:
            head += f"retry-after: {self.behaviour.retry_after}\r\n"
        writer.write(f"{head}\r\n".encode() + data)
        await writer.drain()

    async def _chat(self, writer: asyncio.StreamWriter, data: bytes) -> bool:
        arrived = time.perf_counter()
        want = self.behaviour
        body = json.loads(data)
        self.bodies.append(body)
        self.raw_bodies.append(data)
        count = len(self.bodies)
        status = want.status
        if want.fail_after is not None and count > want.fail_after:
            status = 500
        if want.fail_every is not None and count % want.fail_every == 0:
            status = want.fail_status
        if want.busy > 0:
            want.busy -= 1
            status = 429
        if status != 200 and want.error is not None:
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(want.error)}\r\n\r\n".encode() + want.error)
            return True
        if status != 200:
            await self._json(writer, status, {"error": {"message": "out of luck"}})
            return True
        if not body.get("stream"):
            message = {"role": "assistant", "content": want.whole(body)}
            await self._json(writer, 200, {"choices": [{"message": message, "finish_reason": "stop"}]})
            return True
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if want.slots is None:
                return await self._stream(writer, body, arrived)
            self.slots = self.slots or asyncio.Semaphore(want.slots)
            async with self.slots:
                return await self._stream(writer, body, arrived)
        finally:
            self.in_flight -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: Body, arrived: float) -> bool:
        want = self.behaviour
        queued = time.perf_counter() - arrived
        longest = body.get("max_tokens") or body.get("max_completion_tokens")
        tokens = longest if longest and body.get("ignore_eos") and want.obey_length else want.tokens
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
            await asyncio.sleep(want.gap_s if index else want.first_s + want.jitter_s * random.random())
            if want.stall_after is not None and index >= want.stall_after:
                await asyncio.sleep(3600)
            if want.close_after is not None and index >= want.close_after:
                writer.transport.abort()
                return False
            if index == 0:
                self.served.append(time.perf_counter() - arrived)
            chunk = choice({want.reasoning or "content": piece})
            if want.count_chunks and (body.get("stream_options") or {}).get("continuous_usage_stats"):
                chunk["usage"] = {"prompt_tokens": want.prompt(body), "completion_tokens": (index + 1) * want.per_chunk}
            await event(chunk)
        if want.finish:
            await event(choice({}, "stop"))
        if want.usage:
            count = len(answer.split()) if answer is not None else tokens
            usage: Body = {"prompt_tokens": want.prompt(body), "completion_tokens": max(1, count)}
            if want.queue_time:
                usage["queue_time"] = queued
            await event({"choices": [], "usage": usage})
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


def main() -> None:
    """Serve until standard input closes; the first line of output is the URL."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=float, default=0.0)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--gap", type=float, default=0.0)
    options = parser.parse_args()
    with serving(Behaviour(first_s=options.first, jitter_s=options.jitter, gap_s=options.gap)) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
