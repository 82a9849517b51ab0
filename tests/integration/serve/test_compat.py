"""Headers of bounded size and time, on a real socket: what is changed of uvicorn, at work."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn

from serve.compat import bound_headers

refusals: Counter[str] = Counter()


def fresh_class() -> type[Any]:
    """Return uvicorn's class as no guard has changed it yet."""
    spec = importlib.util.find_spec("uvicorn.protocols.http.httptools_impl")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HttpToolsProtocol


Hardened = fresh_class()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with the size of the body, at /headers with the headers' names, at /now before the body has come."""
    whole = b""
    size, more = 0, scope["type"] == "http" and scope["path"] != "/now"
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        whole += message.get("body", b"") if scope["path"] == "/echo" else b""
        more = message.get("more_body", False)
    body = whole or str(size).encode()
    if scope["path"] == "/headers":
        body = b" ".join(name for name, _ in scope["headers"])
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(protocol: type[Any]) -> Iterator[int]:
    config = uvicorn.Config(app, port=0, log_level="critical", http=protocol, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    assert bound_headers(Hardened, lambda reason: refusals.update([reason]), max_bytes=2000, seconds=0.4)
    with serving(Hardened) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def answer(connection: socket.socket, wait_for_end: bool = True) -> tuple[int, bytes]:
    """Return status and body."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
        if not wait_for_end and b"\r\n\r\n" in data:
            break
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def refusal(connection: socket.socket) -> tuple[int, str]:
    status, body = answer(connection)
    return status, json.loads(body)["error"]["code"]


def test_requests_of_any_shape_of_packets_pass(port: int) -> None:
    body = b"x" * 5000
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + body
    for step in (1, 37, 1000, len(request)):
        with connect(port) as connection:
            for start in range(0, len(request), step):
                connection.sendall(request[start : start + step])
            assert answer(connection, wait_for_end=False) == (200, b"5000")


def test_many_requests_on_one_connection(port: int) -> None:
    with connect(port) as connection:
        for _ in range(20):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + b"y" * 3000)
            assert answer(connection, wait_for_end=False) == (200, b"3000")
        time.sleep(0.6)  # idle between requests is no slow header
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer(connection) == (200, b"0")


def test_endless_headers_are_cut(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        with pytest.raises(OSError):
            for number in range(1_000_000):
                sent += connection.send(b"X-%d: " % number + b"a" * 100 + b"\r\n")
                if number % 100 == 0:
                    time.sleep(0.01)
        assert sent < 1 << 20
    assert refusals["header"]


def test_one_long_header_is_refused_in_openais_shape(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 3000)
        assert refusal(connection) == (431, "header")


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost:", b"\r\n"])
def test_headers_that_do_not_come_end_the_connection(port: int, start: bytes) -> None:
    with connect(port) as connection:
        began = time.monotonic()
        connection.sendall(start)
        assert refusal(connection) == (408, "header")
        assert time.monotonic() - began < 30


def test_a_second_request_may_not_take_for_ever_either(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(connection, wait_for_end=False) == (200, b"0")
        connection.sendall(b"GET / HT")
        assert refusal(connection) == (408, "header")


def test_a_slow_body_is_not_a_slow_header(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\na")
        time.sleep(0.7)
        connection.sendall(b"bcd")
        assert answer(connection, wait_for_end=False) == (200, b"4")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\nX-B: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A : a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    ],
)
def test_what_is_no_http_is_refused_in_openais_shape(port: int, request_: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(request_)
        assert refusal(connection) == (400, "header")


def test_hardening_twice_changes_nothing() -> None:
    before = Hardened.data_received
    assert bound_headers(Hardened, lambda reason: None)
    assert Hardened.data_received is before


CHUNKED = b"GET /now HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def send_until_closed(connection: socket.socket, block: bytes, most: int = 64 << 20) -> int:
    """Send the block again and again; return the bytes that went out before the connection was closed."""
    sent = 0
    with pytest.raises(OSError):
        while sent < most:
            sent += connection.send(block)
    return sent


@pytest.mark.parametrize(
    ("start", "block"),
    [
        (CHUNKED + b"0\r\n", b"x-1: " + b"a" * 1000 + b"\r\n"),
        (CHUNKED + b"0\r\nx: ", b"a" * 1000),
        (CHUNKED, b"1;" + b"a" * 1000 + b"\r\nx\r\n"),
        (CHUNKED, b"400\r\n" + b"a" * 1024 + b"\r\n"),
        (b"GET /now HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n", b"a" * 1000),
    ],
    ids=["trailers", "one trailer", "extensions", "chunks", "a body"],
)
def test_what_follows_an_answer_on_its_message_ends_the_connection(port: int, start: bytes, block: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(start)
        status, _ = answer(connection, wait_for_end=False)
        assert status == 200
        send_until_closed(connection, block)


@pytest.mark.parametrize("start", [CHUNKED, b"GET /now HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"])
def test_a_message_that_does_not_end_after_its_answer_holds_no_connection(port: int, start: bytes) -> None:
    """Nothing is sent any more: the connection is closed all the same."""
    with connect(port) as connection:
        connection.sendall(start)
        assert answer(connection) == (200, b"0")  # up to the end of the connection


@pytest.mark.parametrize(
    ("head", "block"),
    [(b"0\r\n", b"x-1: " + b"a" * 100 + b"\r\n"), (b"0\r\nx: ", b"a" * 100), (b"1;", b"a" * 100)],
    ids=["trailers", "one trailer", "an extension"],
)
def test_trailers_and_extensions_before_an_answer_are_bounded(port: int, head: bytes, block: bytes) -> None:
    before = refusals["header"]
    with connect(port) as connection:
        connection.sendall(CHUNKED.replace(b"/now", b"/") + head)
        send_until_closed(connection, block)
    assert refusals["header"] == before + 1


def test_a_trailer_is_no_header(port: int) -> None:
    with connect(port) as connection:
        request = b"POST /headers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(request + b"1\r\nx\r\n0\r\nAuthorization: Bearer k\r\n\r\n")
        assert answer(connection, wait_for_end=False) == (200, b"host transfer-encoding")


def test_a_body_of_many_small_chunks_passes(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(CHUNKED.replace(b"/now", b"/") + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n")
        assert answer(connection, wait_for_end=False) == (200, b"5000")


def test_requests_that_wait_on_one_connection_are_bounded(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    assert received.count(b"HTTP/1.1 200") < 100


def test_a_client_that_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks again and again, and reads no answer: when the buffers are full it has so much time, and then no more."""
    monkeypatch.setattr("serve.compat._STALLED", 0.2)
    stalled = fresh_class()
    assert bound_headers(stalled, lambda reason: None)
    request = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n" + b"x" * 65536
    with serving(stalled) as port, connect(port) as connection, pytest.raises(ConnectionError):
        while True:
            connection.sendall(request)


def test_connections_from_one_address_and_in_all_are_bounded() -> None:
    limited, counted = fresh_class(), Counter[str]()
    assert bound_headers(limited, lambda reason: counted.update([reason]), connections=5, address_connections=3)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(limited) as port, ExitStack() as stack:

        def opened(address: str) -> socket.socket:
            return stack.enter_context(
                socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(address, 0))
            )

        def asked(connection: socket.socket) -> int:
            connection.sendall(request)
            return answer(connection, wait_for_end=False)[0]

        first = [opened("127.0.0.1") for _ in range(3)]
        assert [asked(each) for each in first] == [200] * 3
        assert refusal(opened("127.0.0.1")) == (429, "connections")
        assert [asked(opened("127.0.0.2")) for _ in range(2)] == [200] * 2
        assert refusal(opened("127.0.0.3")) == (429, "connections")  # five are open
        assert counted["connections"] == 2
        first[0].close()
        deadline = time.monotonic() + 5
        while True:  # until the server has seen it
            with socket.create_connection(("127.0.0.1", port), timeout=5) as again:
                again.sendall(request)
                if answer(again, wait_for_end=False)[0] == 200:
                    break
            assert time.monotonic() < deadline
