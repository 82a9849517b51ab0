"""Headers of bounded size and time, on a real socket: what is changed of uvicorn, at work."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
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
    size, more = 0, scope["type"] == "http"
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    assert bound_headers(Hardened, lambda reason: refusals.update([reason]), max_bytes=2000, seconds=0.4)
    config = uvicorn.Config(app, port=0, log_level="critical", http=Hardened, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


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
        assert time.monotonic() - began < 2


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
