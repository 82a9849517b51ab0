from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socket import create_server, socket

import httpx
import pytest

from bench.load.client import ChatRequest, Trace, ask
from bench.load.endpoint import discover, http_client
from bench.load.wire import Wire
from tests.support.fake_server import Behaviour, serving

BODY = ChatRequest("hi", ("data:image/jpeg;base64," + "A" * 300_000,)).body("fake")


def traces(url: str, count: int = 1, at_once: int = 1, timeout_s: float = 10.0) -> list[Trace]:
    async def main() -> list[Trace]:
        async with http_client(url, "key", transport=Wire()) as http:
            found = []
            for _ in range(count // at_once):
                found += await asyncio.gather(*(ask(http, BODY, timeout_s=timeout_s) for _ in range(at_once)))
            return found

    return asyncio.run(main())


def test_answers_are_those_of_httpxs_transport() -> None:
    with serving(Behaviour(gap_s=0.001, api_key="key")) as server:
        found = traces(server.url, count=6, at_once=3)
        assert len(set(server.raw_bodies)) == 1
        assert server.raw_bodies[0] == BODY
    for trace in found:
        assert (trace.failure, trace.text, trace.completion_tokens, len(trace.chunks)) == (None, "x" * 8, 8, 8)


def test_other_requests_pass_too() -> None:
    with serving(Behaviour(model="m")) as server:
        assert asyncio.run(discover(server.url, transport=Wire())).model == "m"


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(status=500), "http"),
        (Behaviour(close_after=2), "truncated"),
        (Behaviour(gap_s=30), "timeout"),
        (Behaviour(first_s=30), "timeout"),
    ],
)
def test_failures_are_those_of_httpxs_transport(behaviour: Behaviour, kind: str) -> None:
    with serving(behaviour) as server:
        for trace in traces(server.url, count=2, timeout_s=0.3 if kind == "timeout" else 10):
            assert trace.failure is not None
            assert trace.failure.kind == kind


@contextmanager
def answering(*answers: bytes, times: int = 1, closed: threading.Event | None = None) -> Iterator[str]:
    """Accept a connection for each answer, read so many requests on it, send each the answer, close, and say so."""
    with create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    for _ in range(times):
                        received = b""
                        while not received.endswith(BODY):
                            received += connection.recv(1 << 20)
                        connection.sendall(answer)
                if closed is not None:
                    closed.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


STREAM = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'


WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(STREAM) + STREAM


def test_connections_are_kept() -> None:
    with answering(WHOLE, times=5) as url:  # nobody accepts a second one
        assert [(trace.failure, trace.text) for trace in traces(url, count=5)] == [(None, "a")] * 5


def test_a_server_that_closes_idle_connections_is_connected_anew() -> None:
    closed = threading.Event()

    closed = threading.Event()

    async def main(url: str) -> list[str]:
        async with http_client(url, transport=Wire()) as http:
            first = await ask(http, BODY, timeout_s=5)
            while not closed.is_set():
                await asyncio.sleep(0.01)
            for _ in range(3):  # the loop has looked at the connection since
                await asyncio.sleep(0)
            return [first.text, (await ask(http, BODY, timeout_s=5)).text]

    with answering(WHOLE, WHOLE, closed=closed) as url:
        assert asyncio.run(main(url)) == ["a", "a"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + STREAM,
            None,
        ),  # a body that ends with the connection
        (b"", "connect"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "connect"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n" + STREAM[:50], "truncated"),
    ],
)
def test_what_is_no_complete_http_is_a_failure(answer: bytes, kind: str | None) -> None:
    with answering(answer) as url:
        failure = traces(url)[0].failure
    assert (failure and failure.kind) == kind


def test_a_body_that_is_no_http_once_the_answer_has_begun() -> None:
    begun = threading.Event()

    def serve(listener: socket) -> None:
        connection, _ = listener.accept()
        with connection:
            received = b""
            while not received.endswith(BODY):
                received += connection.recv(1 << 20)
            connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            begun.wait(10)
            connection.sendall(b"zz\r\n")

    async def main(url: str) -> None:
        async with (
            http_client(url, transport=Wire()) as http,
            http.stream("POST", "/v1/chat/completions", content=BODY) as response,
        ):
            assert response.status_code == 200
            begun.set()
            with pytest.raises(httpx.RemoteProtocolError):
                await response.aread()

    with create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        asyncio.run(main(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join(5)


def test_nobody_listening_and_nobody_there() -> None:
    with create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    failure = traces(url)[0].failure
    assert failure is not None
    assert failure.kind == "connect"


def test_reads_obey_the_clients_timeout() -> None:
    async def main(url: str) -> None:
        async with http_client(url, transport=Wire(), timeout_s=0.2) as http:
            await http.post("/v1/chat/completions", content=BODY)

    with serving(Behaviour(first_s=30)) as server, pytest.raises(httpx.ReadTimeout):
        asyncio.run(main(server.url))


def test_a_request_that_meets_a_closing_connection_goes_out_again() -> None:
    """A server may close an idle connection just when the next request is on its way."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    with create_server(("127.0.0.1", 0)) as listening:
        got: list[bytes] = []

        def serve() -> None:
            for answers in ((True, False), (True, False), (False,)):  # to the requests of each connection
                connection, _ = listening.accept()
                with connection:
                    for answered in answers:
                        got.append(connection.recv(65536))
                        if answered:
                            connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()

        async def main() -> list[str]:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx.AsyncClient(transport=Wire(), base_url=url) as http:
                found = [(await http.get(path)).text for path in ("/1", "/2")]
                with pytest.raises(httpx.RemoteProtocolError):
                    await http.get("/3")
                return found

        assert asyncio.run(main()) == ["ok", "ok"]
        thread.join()
    assert [request.split()[1] for request in got] == [b"/1", b"/2", b"/2", b"/3", b"/3"]
