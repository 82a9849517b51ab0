"""The whole list of hostile requests against the real server: each is refused within a second, and the next good
request is answered.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from bench.chaos.hostile import CHAT, Hostile, catalogue, chat_body, data_url, good_image, png_bomb
from tests.e2e.conftest import BODY_SECONDS, REQUEST_SECONDS, Public

#: On one worker with the others that need this server.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("public")]

#: Longest that a refusal may take.
SOON = 1.0
#: What must never be in the server's log.
SECRET = "canary-5b1f9c"
#: What it says of a file of keys that can't be used.
STAY = "The keys before stay in force."


@pytest.fixture(scope="module")
def client(public: Public) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {public.keys[0]}", "Content-Type": "application/json"}
    with httpx.Client(base_url=public.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def passed() -> Iterator[int]:
    """Counts the tests of this module."""
    return itertools.count(1)


@pytest.fixture(autouse=True)
def next_good_request(client: httpx.Client, passed: Iterator[int]) -> Iterator[None]:
    """After every test of this module, a good request is answered; one with an image after every eighth."""
    yield
    if next(passed) % 8:
        response = client.post(CHAT, content=chat_body("demo", max_tokens=1))
        assert response.status_code == 200, response.text
        return
    body = chat_body("demo", data_url(good_image()), max_tokens=8, temperature=0)
    response = client.post(CHAT, content=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "red"


def package(name: str) -> Path:
    """Where it is installed; it is not imported, which would take every worker that collects tests some seconds."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def in_flight(client: httpx.Client) -> float:
    page = client.get("/metrics").text
    running = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} ([\d.]+)$", page, re.MULTILINE)
    own = re.search(r"^qvl_in_flight ([\d.]+)$", page, re.MULTILINE)
    assert running and own
    return sum(map(float, running)) + float(own[1]) - 1  # this very request


def wait_until_quiet(client: httpx.Client, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while in_flight(client):
        assert time.monotonic() < deadline, "requests are still in flight"
        time.sleep(0.05)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("entry", list(catalogue("demo")), ids=lambda entry: entry.name)
def test_refused_within_a_second(entry: Hostile, public: Public, client: httpx.Client) -> None:
    body = entry.make()
    headers = {"Content-Type": "application/json"} | entry.headers
    if entry.with_key:
        headers["Authorization"] = client.headers["Authorization"]
    times = []
    for _ in range(10):  # a machine that does other things too may need another try
        with httpx.Client(base_url=public.url, timeout=60, trust_env=False) as fresh:
            began = time.monotonic()
            response = fresh.request(entry.method, entry.path, content=body, headers=headers)
            times.append(time.monotonic() - began)
        assert response.status_code == entry.status
        assert error_of(response)["code"] == entry.reason
        if times[-1] < SOON:
            return
    raise AssertionError(f"refused, but only after {times} s")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("with_key", [False, True])
def test_a_body_of_100_megabytes(public: Public, chunked: bool, with_key: bool) -> None:
    """100 MB in a second is 800 Mbit/s: more time may pass on the way, none of it in the guard."""
    headers = {"Content-Type": "application/json"}
    if with_key:
        headers["Authorization"] = f"Bearer {public.keys[0]}"
    piece = b" " * (1 << 20)
    content = (piece for _ in range(100)) if chunked else piece * 100
    began = time.monotonic()
    response = httpx.post(public.url + CHAT, content=content, headers=headers, trust_env=False, timeout=60)
    assert response.status_code == (413 if with_key else 401)
    assert error_of(response)["code"] == ("body_size" if with_key else "key")
    assert time.monotonic() - began < 30


#: Pass the guard on purpose, or must be judged by the model: vLLM refuses them, in the same shape.
BY_VLLM: dict[str, Callable[[], bytes]] = {
    "log-probabilities of all tokens": lambda: chat_body("demo", logprobs=True, top_logprobs=-1),
    "a million log-probabilities": lambda: chat_body("demo", logprobs=True, top_logprobs=10**6),
    "a prompt longer than the model": lambda: chat_body("demo", text="word " * 15_000),
    "a temperature out of range": lambda: chat_body("demo", temperature=-1),
    "a seed of 300 digits": lambda: chat_body("demo", seed=10**300),
    "no answers": lambda: chat_body("demo", n=0),
    "another model": lambda: chat_body("another"),
    "stop texts that are numbers": lambda: chat_body("demo", stop=[1, 2]),
    "an unknown format": lambda: chat_body("demo", response_format={"type": "yaml"}),
    "a schema that is none": lambda: chat_body(
        "demo", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    ),
    "a bias on no token": lambda: chat_body("demo", logit_bias={"x": 1}),
    "a bias beyond the vocabulary": lambda: chat_body("demo", logit_bias={"99999999": 1}),
    "no tool of that name": lambda: chat_body(
        "demo", tool_choice={"type": "function", "function": {"name": "missing"}}
    ),
    "more least than most tokens": lambda: chat_body("demo", min_tokens=20, max_tokens=10),
    "a top_p above 1": lambda: chat_body("demo", top_p=2),
}


def _scrambled() -> bytes:
    """Return a PNG of the right shape whose pixels can't be unpacked."""
    content = bytearray(good_image(200))
    at = content.index(b"IDAT") + 8
    content[at : at + 20] = b"\xff" * 20
    return bytes(content)


@pytest.mark.parametrize("name", BY_VLLM)
def test_what_vllm_refuses_is_no_server_error(name: str, client: httpx.Client) -> None:
    response = client.post(CHAT, content=BY_VLLM[name]())
    assert 400 <= response.status_code < 500, response.text
    assert error_of(response)["message"]


def test_an_image_of_garbage_is_no_server_error(client: httpx.Client) -> None:
    """Its structure is right, its pixels can't be unpacked: the decoder refuses it, or shows what it could read."""
    assert client.post(CHAT, content=chat_body("demo", data_url(_scrambled()), max_tokens=4)).status_code < 500


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"type": "string"}}},
        {"type": "object", "additionalProperties": {"type": "string", "maxLength": 1000, "minLength": 1000}},
        {"anyOf": [{"const": str(number) * 20} for number in range(500)]},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"},
    ],
    ids=["nested bounds", "long strings", "many constants", "recursion"],
)
def test_large_grammars_do_not_hold_others_up(schema: dict[str, Any], client: httpx.Client) -> None:
    """The largest schemas that pass: others are answered meanwhile."""
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asks = threading.Thread(
        target=lambda: client.post(CHAT, content=chat_body("demo", response_format=format, max_tokens=20))
    )
    asks.start()
    began = time.monotonic()
    assert client.post(CHAT, content=chat_body("demo", max_tokens=1)).status_code == 200
    assert time.monotonic() - began < 30
    asks.join()


def in_schema(schema: dict[str, Any], **settings: Any) -> bytes:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat_body("demo", response_format=format, max_tokens=8, **settings)


#: As many states as a request may have, each string with a length of its own.
COSTLY: list[dict[str, Any]] = [
    {"anyOf": [{"type": "string", "maxLength": 200 + 50 * start + i} for i in range(11)]} for start in range(3)
]


def test_schemas_of_clients_that_left_hold_nobody_up(public: Public, client: httpx.Client) -> None:
    """Three ask for the most that passes, and leave; somebody else's schema is compiled meanwhile."""
    host, _, port = public.url.removeprefix("http://").partition(":")
    for schema in COSTLY:
        body = in_schema(schema)
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head(public, len(body)) + body)
            deadline = time.monotonic() + 10
            while not in_flight(client):
                assert time.monotonic() < deadline
    other = {"Authorization": f"Bearer {public.keys[1]}"}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    response = client.post(CHAT, content=in_schema(schema), headers=other, timeout=20)
    assert response.status_code == 200, response.text
    wait_until_quiet(client, 20)


#: As users write them.
ORDINARY: list[dict[str, Any]] = [
    {"type": "object", "properties": {"pattern": {"type": "string"}, "path": {}}, "required": ["pattern"]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "maxLength": 2000},
    {"type": "array", "maxItems": 20, "items": {"type": "object", "properties": {"$ref": {"type": "integer"}}}},
    {"$defs": {"n": {"properties": {"c": {"items": {"$ref": "#/$defs/n"}}}}}, "$ref": "#/$defs/n"},
    {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", ORDINARY, ids=range(len(ORDINARY)))
def test_ordinary_schemas_are_answered(schema: dict[str, Any], client: httpx.Client) -> None:
    assert client.post(CHAT, content=in_schema(schema)).status_code == 200
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    response = client.post(CHAT, content=chat_body("demo", tools=[tool], tool_choice="none", max_tokens=8))
    assert response.status_code == 200, response.text


#: The ends of what the guard takes, and combinations that are the client's to get right.
EDGES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 2**31 - 1},
    "top_k of -1": {"top_k": -1, "temperature": 1},
    "least seed": {"seed": -(2**63), "temperature": 1},
    "largest seed": {"seed": 2**63 - 1, "temperature": 1},
    "least penalties": {"presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 1e-300},
    "largest penalties": {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 100},
    "least temperature": {"temperature": 1e-300},
    "least top_p": {"top_p": 1e-300, "temperature": 1},
    "min_p": {"min_p": 1, "temperature": 1},
    "biases": {"logit_bias": {"0": 100, "000000001": -100}},
    "stop ids": {"stop_token_ids": [0, 2**31 - 1]},
    "four greedy answers": {"n": 4, "temperature": 0},
    "four answers": {"n": 4, "temperature": 1},
    "log-probabilities": {"logprobs": True, "top_logprobs": 20},
    "too many log-probabilities": {"logprobs": True, "top_logprobs": 2**31 - 1},
    "many stop texts": {"stop": ["a"] * 16},
    "a long stop text": {"stop": "a" * 50_000},
    "more least than most tokens": {"min_tokens": 20, "max_tokens": 10},
    "JSON": {"response_format": {"type": "json_object"}},
    "a salt": {"cache_salt": "x" * 128},
    "usage": {"stream": True, "stream_options": {"continuous_usage_stats": True, "include_usage": None}},
    "an empty schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "", "schema": {}}}},
    "no content": {"messages": [{"role": "user", "content": None}]},
    "nothing but a role": {"messages": [{"role": "user"}]},
    "no parts": {"messages": [{"role": "user", "content": []}]},
    "a tool's answer to nothing": {"messages": [{"role": "tool", "content": "1"}]},
    "an assistant alone": {"messages": [{"role": "assistant", "content": ""}]},
    "calls without content": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    },
    "a call with an object": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    },
    "a developer": {"messages": [{"role": "developer", "content": "Hi"}]},
    "two systems": {"messages": [{"role": "system", "content": "Hi"}, {"role": "system", "content": "Hi"}]},
    "a tool without parameters": {"tools": [{"function": {"name": "f"}}], "tool_choice": "none"},
    "a tool that is needed": {"tools": [{"function": {"name": "f"}}], "tool_choice": "required"},
    "two tools of one name": {"tools": [{"function": {"name": "f"}}] * 2, "tool_choice": "required"},
    "odd ignored fields": {"metadata": 2**70, "store": [], "verbosity": {}, "service_tier": 1},
    "a tag": {
        "response_format": {
            "type": "structural_tag",
            "format": {"type": "sequence", "elements": [{"type": "const_string", "value": "a"}]},
        }
    },
    "a tag of nothing": {
        "response_format": {"type": "structural_tag", "format": {"type": "or", "elements": [{"type": "const_string"}]}}
    },
    "an old tag": {
        "response_format": {
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
            "triggers": [],
        }
    },
    "allOf": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"allOf": [{"type": "string"}, {"minLength": 2}]}},
        }
    },
    "a bound and a pattern": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "^a+$", "maxLength": 3}},
        }
    },
    "no string there can be": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
        }
    },
    "a list without end": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        }
    },
}


@pytest.mark.parametrize("name", EDGES)
def test_the_ends_of_what_passes_are_no_server_error(name: str, client: httpx.Client) -> None:
    body = json.loads(chat_body("demo", max_tokens=4)) | EDGES[name]
    response = client.post(CHAT, json=body)
    assert response.status_code < 500, response.text
    assert '"code":500' not in response.text.replace(" ", "")


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"prompt": " "},
        {"prompt": ["a", "\0"]},
        {"logprobs": 0},
        {"logprobs": 2**31 - 1},
        {"logprobs": -1},
        {"response_format": {"type": "json_object"}},
        {"max_tokens": None},
        {"stream": True, "stream_options": {"include_usage": True}, "n": 2},
    ],
    ids=json.dumps,
)
def test_the_ends_of_what_passes_in_completions(fields: dict[str, Any], client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "max_tokens": 2} | fields)
    assert response.status_code < 500, response.text
    assert '"code":500' not in response.text.replace(" ", "")


def test_none_of_it_was_tried_again(client: httpx.Client) -> None:
    """A second try is for what failed in vLLM; nothing that a client can write does."""
    found = re.search(r"^qvl_retries_total ([\d.]+)$", client.get("/metrics").text, re.MULTILINE)
    assert found and float(found[1]) == 0


def test_one_model(client: httpx.Client) -> None:
    assert client.get("/v1/models/demo").json()["id"] == "demo"
    response = client.get("/v1/models/other")
    assert (response.status_code, error_of(response)["code"]) == (404, "model")


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
def test_tool_calls_that_nobody_parses_are_refused_in_our_words(choice: Any, client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    response = client.post(CHAT, content=chat_body("demo", tools=[tool], tool_choice=choice))
    assert response.status_code == 400
    assert "qvl serve" in error_of(response)["message"]


def test_images_whose_type_the_bytes_tell(client: httpx.Client) -> None:
    body = chat_body("demo", data_url(good_image(), "image"), max_tokens=8, temperature=0)
    assert client.post(CHAT, content=body).json()["choices"][0]["message"]["content"] == "red"


def test_images_of_odd_sizes_and_modes_are_no_server_error(client: httpx.Client) -> None:
    """The smallest and narrowest that pass, and every mode that a PNG can have but the one that is refused."""
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 200), (200, 1), (27, 29))]
    images += [Image.new(mode, (30, 30)) for mode in ("1", "L", "LA", "P", "RGBA")]
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        response = client.post(CHAT, content=chat_body("demo", data_url(buffer.getvalue()), max_tokens=1))
        assert response.status_code < 500, (image.mode, image.size, response.text)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_message_that_goes_on_after_its_answer(public: Public, path: str) -> None:
    host, _, port = public.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n".encode())
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"x: " + b"a" * 64_000 + b"\r\n")


def test_images_that_unpack_to_much_are_bounded_together(public: Public, client: httpx.Client) -> None:
    """Each passes by itself; the third of three is told to come again."""
    image = data_url(png_bomb(4800, 4800))
    body = chat_body("demo", image, image, max_tokens=1)
    answers: list[int] = []
    asks = [threading.Thread(target=lambda: answers.append(ask(client, body))) for _ in range(6)]
    for thread in asks:
        thread.start()
    for thread in asks:
        thread.join()
    assert set(answers) <= {200, 400, 429, 504} and 429 in answers


def ask(client: httpx.Client, body: bytes) -> int:
    return client.post(CHAT, content=body, timeout=60).status_code


def routes_of_vllm() -> set[tuple[str, str]]:
    """Return method and path of every route that vLLM's sources declare."""
    found: set[tuple[str, str]] = set()
    for file in (package("vllm") / "entrypoints").rglob("*.py"):
        for method, path in re.findall(r"@\w*(?:router|app)\.(\w+)\(\s*\"(/[^\"]*)\"", file.read_text()):
            method = {"api_route": "POST", "websocket": "GET"}.get(method, method.upper())
            found.add((method, re.sub(r"\{[^}]*\}", "x", path)))
    others = ("/docs", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/ping", "/", "/docs/oauth2-redirect")
    return found | {("GET", path) for path in others}


def test_every_route_of_vllm_needs_a_key(public: Public) -> None:
    routes = routes_of_vllm()
    assert len(routes) > 40
    assert {("POST", "/tokenize"), ("POST", "/v1/chat/completions"), ("GET", "/version")} <= routes
    with httpx.Client(base_url=public.url, trust_env=False) as stranger:
        for method, path in sorted(routes):
            for each in {method, "GET", "POST", "PUT", "DELETE", "OPTIONS"}:
                response = stranger.request(each, path, json={})
                if path == "/ready" or (path == "/health" and each == "GET"):
                    assert response.status_code == 200
                else:
                    assert (response.status_code, error_of(response)["code"]) == (401, "key"), (each, path)


def test_with_a_key_only_the_listed_routes_are_there(client: httpx.Client) -> None:
    listed = {CHAT, "/v1/completions", "/v1/models", "/metrics", "/version", "/health", "/ready"}
    for method, path in sorted(routes_of_vllm()):
        if path not in listed:
            response = client.request(method, path, json={})
            assert (response.status_code, error_of(response)["code"]) == (404, "route"), (method, path)
    for path in ("/v1/models", "/metrics", "/version", "/health", "/ready"):
        assert client.get(path).status_code == 200
        assert client.head(path).status_code == 200


def test_a_key_in_the_query_is_no_key(public: Public) -> None:
    for query in (f"api_key={public.keys[0]}", f"key={public.keys[0]}", f"access_token={public.keys[0]}"):
        response = httpx.get(f"{public.url}/v1/models?{query}", trust_env=False)
        assert (response.status_code, error_of(response)["code"]) == (401, "key")
    assert public.keys[0] not in public.log.read_text()


def raw(public: Public, data: bytes, seconds: float = 10) -> tuple[int, bytes, float]:
    """Send bytes; return the answer's status, all of it, and the seconds it took."""
    host, _, port = public.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        began = time.monotonic()
        connection.sendall(data)
        received = b""
        while b"\r\n\r\n" not in received or (b"connection: close" in received and not received.endswith(b"}")):
            piece = connection.recv(65536)
            if not piece:
                break
            received += piece
    return int(received.split()[1]), received, time.monotonic() - began


@pytest.mark.parametrize(
    "header",
    [
        b"X-A: a\nX-B: b",
        b"X-A: a\rX-B: b",
        b"X-A: a\0b",
        b"X-A : a",
        b"X-A: " + b"a" * 400_000,
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
    ],
    ids=["line feed", "carriage return", "zero", "space", "400 kB", "two lengths"],
)
def test_headers_that_are_none(public: Public, header: bytes) -> None:
    status, received, seconds = raw(public, b"POST /v1/models HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
    assert status in (400, 431)
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "header"
    assert seconds < SOON


def test_line_ends_in_headers_reach_no_answer(public: Public) -> None:
    for value in (b"a%0d%0aX-Evil: 1", b"a\\r\\nX-Evil: 1", "a嘍嘊X-Evil: 1".encode()):
        status, received, _ = raw(public, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + value + b"\r\n\r\n")
        assert status == 401
        assert b"evil" not in received.lower()


def test_websockets(public: Public) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    status, _, seconds = raw(public, b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
    assert status == 403
    assert seconds < SOON


def head(public: Public, length: int) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", f"Authorization: Bearer {public.keys[0]}"]
    return "\r\n".join([*lines, "Content-Type: application/json", f"Content-Length: {length}", "", ""]).encode()


def test_a_body_that_drips(public: Public) -> None:
    """A slow body is known to be one only when its time is up; then the refusal comes at once."""
    host, _, port = public.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        began = time.monotonic()
        connection.sendall(head(public, 1000))
        received = b""
        connection.settimeout(0.3)
        while not received:
            try:
                connection.sendall(b" ")
                received = connection.recv(65536)
            except TimeoutError:
                continue
        seconds = time.monotonic() - began
        connection.settimeout(5)
        while more := connection.recv(65536):  # head and body may come apart; the server closes behind them
            received += more
    assert received.startswith(b"HTTP/1.1 408")
    assert b'"code": "body_time"' in received
    assert BODY_SECONDS <= seconds < BODY_SECONDS + SOON


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_lets_go_when_a_client_leaves(public: Public, client: httpx.Client, stream: bool) -> None:
    body = chat_body("demo", max_tokens=1000, ignore_eos=True, stream=stream)
    host, _, port = public.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head(public, len(body)) + body)
        deadline = time.monotonic() + 10
        while not in_flight(client):
            assert time.monotonic() < deadline
    wait_until_quiet(client, 5)


def test_time_is_up(client: httpx.Client) -> None:
    """For a streamed answer and for a whole one, which run at once."""

    def ask(stream: bool) -> tuple[httpx.Response, float]:
        body = chat_body("demo", max_tokens=3500, ignore_eos=True, n=4, stream=stream)
        began = time.monotonic()
        return client.post(CHAT, content=body), time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        (streamed, streaming), (whole, waiting) = pool.map(ask, (True, False))
    for seconds in (streaming, waiting):
        assert REQUEST_SECONDS - 0.1 <= seconds < REQUEST_SECONDS + 15
    last = streamed.text.strip().rpartition("\n\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (whole.status_code, error_of(whole)["code"]) == (504, "timeout")
    wait_until_quiet(client, 5)


def test_images_by_address_are_checked_before_anything_is_asked(client: httpx.Client) -> None:
    """localhost is on this server's list; it resolves to loopback all the same, and nobody is asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.end_headers()

    inside = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=inside.serve_forever, daemon=True)
    thread.start()
    try:
        for host in ("localhost", "127.0.0.1", "[::1]"):
            began = time.monotonic()
            response = client.post(CHAT, content=chat_body("demo", f"http://{host}:{inside.server_port}/a.png"))
            assert (response.status_code, error_of(response)["code"]) == (400, "image_url")
            assert time.monotonic() - began < 30
        began = time.monotonic()
        response = client.post(CHAT, content=chat_body("demo", "http://localhost/a.png"))
        assert error_of(response)["code"] == "image_url"
        assert time.monotonic() - began < 30
    finally:
        inside.shutdown()
        inside.server_close()
        thread.join()
    assert not asked


def test_a_key_is_exchanged_while_requests_run(public: Public, client: httpx.Client) -> None:
    def status(key: str) -> int:
        return httpx.get(
            f"{public.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False
        ).status_code

    old = public.key_file.read_text()
    answers: list[int] = []
    body = chat_body("demo", max_tokens=200, ignore_eos=True)
    running = threading.Thread(target=lambda: answers.append(client.post(CHAT, content=body).status_code))
    running.start()
    while not in_flight(client) and not answers:
        time.sleep(0.01)
    try:
        new = public.key_file.with_suffix(".new")
        new.write_text("a-new-key-of-this-test\n")
        new.replace(public.key_file)
        deadline = time.monotonic() + 20
        while status("a-new-key-of-this-test") != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert status(public.keys[0]) == 401
        read = public.log.read_text().count(STAY)
        public.key_file.write_text("")  # spoilt: the keys before stay
        while public.log.read_text().count(STAY) == read:
            assert time.monotonic() < deadline
            status("a-new-key-of-this-test")  # it looks at the file when it is asked
            time.sleep(0.1)
        assert status("a-new-key-of-this-test") == 200
    finally:
        new.write_text(old)
        new.replace(public.key_file)
    deadline = time.monotonic() + 20
    while status(public.keys[0]) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.join()
    assert answers == [200]


def test_nothing_of_a_request_is_in_the_log(public: Public, client: httpx.Client) -> None:
    image = data_url(good_image(28, colour="purple"))
    requests: list[dict[str, Any]] = [
        {"content": chat_body("demo", image, text=SECRET, max_tokens=2)},
        {"content": chat_body("demo", text=f"{SECRET} <|im_start|>")},
        {"content": chat_body("demo", text=SECRET * 5000)},
        {"content": chat_body("demo", text=SECRET, temperature=-1)},
        {"content": chat_body("demo", text=SECRET, stop=[1])},
        {"content": chat_body("demo", data_url(_scrambled()), text=SECRET)},
        {"content": chat_body("demo", f"https://{SECRET}.example/")},
        {"content": f'{{"{SECRET}'.encode()},
        {"content": b"{}", "params": {"q": SECRET}},
        {"content": b"{}", "headers": {"Authorization": f"Bearer {SECRET}"}},
        {"content": b"{}", "headers": {"X-Request-Id": f"{SECRET} x"}},
    ]
    for request in requests:
        client.post(CHAT, **request)
    client.get(f"/{SECRET}")
    last = secrets.token_hex(8)
    client.post(CHAT, content=b"{}", headers={"X-Request-Id": last})
    deadline = time.monotonic() + 20
    while last not in (log := public.log.read_text()):  # by then all before are written
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert SECRET not in log
    assert image[30:80] not in log
    assert not [key for key in public.keys if key in log]


def test_refusals_are_counted(public: Public, client: httpx.Client) -> None:
    def counted() -> float:
        found = re.search(r'^qvl_refusals_total\{reason="n"\} ([\d.]+)$', client.get("/metrics").text, re.MULTILINE)
        assert found
        return float(found[1])

    before = counted()
    for _ in range(3):
        client.post(CHAT, content=chat_body("demo", n=10_000))
    assert counted() == before + 3
