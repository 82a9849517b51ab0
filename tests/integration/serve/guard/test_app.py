from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest

from bench.chaos.hostile import (
    CHAT,
    Hostile,
    added_route,
    catalogue,
    chat_body,
    data_url,
    deep_gray,
    good_image,
    rebinding,
)
from serve.guard.app import Guard
from serve.settings.limits import Limits
from tests.support.guard_app import KEY, App, Client, chat, count
from toolkit.calibration import media
from toolkit.errors import MediaError, ServerError


def run(client: Client, *arguments: Any, **settings: Any) -> Any:
    return asyncio.run(client.ask(*arguments, **settings))


@pytest.mark.parametrize("entry", list(catalogue("m")), ids=lambda entry: entry.name)
def test_hostile_requests_are_refused_and_counted(entry: Hostile) -> None:
    client = Client()
    before = count(entry.reason)
    body = entry.make()
    key = KEY if entry.with_key else None
    answer = run(client, entry.method, entry.path, body, key=key, headers=entry.headers)
    assert (answer.status, answer.error["code"]) == (entry.status, entry.reason)
    assert count(entry.reason) == before + 1
    assert not client.app.requests
    assert len(answer.body) < 1000


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_good_images_pass_as_they_are(format: str) -> None:
    client = Client()
    url = data_url(good_image(format=format), f"image/{format.lower()}")
    body = chat_body("m", url, url, max_tokens=4)
    assert run(client, body=body).status == 200
    assert client.app.requests[0][1] == body


def test_what_common_clients_send_passes() -> None:
    client = Client()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    schema = {"type": "object", "properties": {"colour": {"type": "string", "maxLength": 20}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\n"}'}}
    messages = [
        {"role": "system", "content": "Be brief. <b>"},
        {"role": "user", "content": [{"type": "text", "text": "日本語 <|box_start|>(1,2)<|box_end|>"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ]
    body = chat(
        messages=messages, tools=[tool], tool_choice="auto", temperature=0.5, top_p=1, n=2, stop=["<|im_end|>"],
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}},
        stream=True, stream_options={"include_usage": True}, seed=1, user="u", logprobs=True, top_logprobs=5,
        max_completion_tokens=9,
    )  # fmt: skip
    assert run(client, body=body).status == 200
    assert run(client, path="/v1/completions", body=b'{"model": "m", "prompt": ["a", "b"]}').status == 200


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    """vLLM's messages hold fields that are null, and clients append the message to the conversation."""
    answer = {"role": "assistant", "content": "red", "refusal": None, "annotations": None, "audio": None}
    answer |= {"function_call": None, "tool_calls": [], "reasoning": None}
    messages = [{"role": "user", "content": "Colour?"}, answer, {"role": "user", "content": "Sure?"}]
    assert run(Client(), body=chat(messages=messages, echo=None)).status == 200
    answer["audio"] = {"id": "1"}
    assert run(Client(), body=chat(messages=messages)).error["code"] == "field"


def test_a_limit_is_set_where_none_was_asked_for() -> None:
    client = Client(Limits(api_key=KEY, max_tokens=77))
    for body in (chat(), chat(max_tokens=None), chat() + b" \n"):
        assert run(client, body=body).status == 200
        scope, inner = client.app.requests.pop()
        assert json.loads(inner)["max_tokens"] == 77
        assert dict(scope["headers"])[b"content-length"] == str(len(inner)).encode()
    assert run(client, body=chat(max_completion_tokens=5)).status == 200
    assert "max_tokens" not in json.loads(client.app.requests.pop()[1])
    assert run(client, body=chat(max_tokens=0)).error["code"] == "max_tokens"


def test_limits_are_the_settings() -> None:
    image = data_url(good_image(56))
    small = {
        "max_images": 1,
        "max_image_pixels": 56 * 56 - 1,
        "max_image_bytes": 20,
        "max_prompt_chars": 3,
        "max_body_bytes": 60,
        "max_json_depth": 6,
    }
    request = {
        "max_images": (chat_body("m", image, image), "image_count"),
        "max_image_pixels": (chat_body("m", image), "image_pixels"),
        "max_image_bytes": (chat_body("m", image), "image_bytes"),
        "max_prompt_chars": (chat(), "prompt_length"),
        "max_body_bytes": (chat(stop="x" * 60), "body_size"),
        "max_json_depth": (chat(metadata={"a": [[[[[1]]]]]}), "too_deep"),
    }
    for name, value in small.items():
        body, reason = request[name]
        assert run(Client(), body=body).status == 200, name
        assert run(Client(Limits(api_key=KEY, **{name: value})), body=body).error["code"] == reason
    together = Limits(api_key=KEY, max_request_pixels=2 * 56 * 56 - 1)
    assert run(Client(together), body=chat_body("m", image)).status == 200
    assert run(Client(together), body=chat_body("m", image, image)).error["code"] == "image_pixels"


def test_fields_routes_and_videos_can_be_allowed() -> None:
    video = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]
    client = Client(
        Limits(api_key=KEY, allow_fields=("echo",), allow_routes=("POST /tokenize", "GET /load"), allow_video=True)
    )
    assert run(client, body=chat(echo=True)).status == 200
    assert run(client, path="/tokenize", body=b'{"prompt": "<|im_start|>"}').status == 200
    assert run(client, path="/tokenize", body=b"{").error["code"] == "body_json"
    assert run(client, "GET", "/load").status == 200
    assert run(client, body=chat(messages=[{"role": "user", "content": video}])).status == 200
    remote = [{"type": "video_url", "video_url": {"url": "http://127.0.0.1/"}}]
    assert run(client, body=chat(messages=[{"role": "user", "content": remote}])).error["code"] == "video"


def test_only_health_and_ready_are_open() -> None:
    client = Client()
    for path in ("/health", "/ready"):
        assert run(client, "GET", path, key=None).status == 200
        assert run(client, "HEAD", path, key=None).status == 200
        assert run(client, "POST", path, key=None).status == 401
    for path in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/", "/health/", "/ping"):
        assert run(client, "GET", path, key=None).status == 401
    assert run(client, "GET", "/v1/models").status == 200
    assert run(client, "HEAD", "/v1/models").status == 200
    assert client.app.requests[-1][0]["method"] == "GET"


def test_the_key_counts_in_its_header_only() -> None:
    client = Client()
    assert run(client, "GET", "/v1/models", key=None, scope={"query_string": f"api_key={KEY}".encode()}).status == 401
    for value in (KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer é"):
        assert run(client, "GET", "/v1/models", key=None, headers={"Authorization": value}).status == 401
    twice = [(b"authorization", b"Bearer x"), (b"authorization", f"Bearer {KEY}".encode())]
    assert run(client, "GET", "/v1/models", scope={"headers": twice}).status == 401
    assert run(client, "GET", "/v1/models", key=None, headers={"Authorization": f"bearer  {KEY}"}).status == 200


def test_headers_that_steer_the_engine_stay_outside() -> None:
    client = Client()
    headers = {"X-Data-Parallel-Rank": "1", "Origin": "https://a.example", "X-Request-Id": "7", "Cookie": "a=b"}
    assert run(client, body=chat(), headers=headers).status == 200
    names = {name for name, _ in client.app.requests[0][0]["headers"]}
    assert b"x-request-id" in names
    assert not names & {b"x-data-parallel-rank", b"origin", b"cookie"}


def test_content_types() -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        answer = run(Client(), body=chat(), headers=headers)
        assert (answer.status, answer.error["code"]) == (415, "body_json")
    assert run(Client(), body=chat(), headers={"Content-Type": "application/json; charset=utf-8"}).status == 200


def test_a_body_may_come_in_pieces() -> None:
    client = Client()
    body = chat(max_tokens=1)
    assert run(client, body=[body[:5], 0.01, body[5:]]).status == 200
    assert client.app.requests[0][1] == body


def test_a_body_that_does_not_come_ends_the_request() -> None:
    client = Client(Limits(api_key=KEY, body_seconds=0.1))
    began = time.monotonic()
    answer = run(client, body=[b"{", 0.05, b'"', ...])
    assert (answer.status, answer.error["code"]) == (408, "body_time")
    assert answer.headers["connection"] == "close"
    assert time.monotonic() - began < 20


def test_a_body_that_never_ends_is_cut() -> None:
    client = Client(Limits(api_key=KEY, max_body_bytes=1000))
    began = time.monotonic()
    answer = run(client, body=[b"x" * 600] * 5 + [...])
    assert (answer.status, answer.error["code"]) == (413, "body_size")
    assert time.monotonic() - began < 20
    assert run(client, body=b"", headers={"Content-Length": "9" * 30}).status == 413


def test_bodies_held_at_one_time_are_bounded() -> None:
    client = Client(Limits(api_key=KEY, max_body_bytes=1000))

    async def many() -> list[Any]:
        slow = [client.ask(body=[b" " * 900, 0.2, b"{}"]) for _ in range(30)]
        return await asyncio.gather(*slow)

    answers = asyncio.run(many())
    assert {answer.error["code"] for answer in answers} == {"concurrency", "field"}
    assert client.guard._held.size == 0
    assert run(client, body=chat()).status == 200


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"red"}}]}\n\n'
BROKEN = b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'


class Fails(App):
    """Fails the first `times` requests as vLLM does when it has lost an image."""

    def __init__(self, times: int, stream: bool, roles: int = 1) -> None:
        super().__init__()
        self.times, self.stream, self.roles = times, stream, roles

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        message = await receive()
        self.requests.append((scope, message["body"]))
        failed = len(self.requests) <= self.times
        kind = b"text/event-stream" if self.stream else b"application/json"
        status = 500 if failed and not self.stream else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        events = [ROLE] * self.roles + ([BROKEN] if failed else [TOKEN, TOKEN])
        for event in events if self.stream else [b"{}"]:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("roles", [0, 1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_what_fails_before_its_first_token_is_tried_again_once(stream: bool, roles: int) -> None:
    whole = ROLE * roles + TOKEN * 2 if stream else b"{}"
    body = chat(max_tokens=3)
    for times in (0, 1):
        app = Fails(times, stream, roles)
        answer = run(Client(app=app), body=body)
        assert (answer.status, answer.body) == (200, whole)
        assert [sent for _, sent in app.requests] == [body] * (times + 1)
    app = Fails(9, stream, roles)
    answer = run(Client(app=app), body=body)
    assert len(app.requests) == 2
    assert answer.status == (200 if stream else 500)
    assert stream is (BROKEN in answer.body)


def test_an_error_that_is_sent_and_raised_reaches_the_client() -> None:
    class Raises(App):
        async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"why"})
            raise ZeroDivisionError

    client, sent = Client(app=Raises()), []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chat()}

    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    with pytest.raises(ZeroDivisionError):
        asyncio.run(client.guard(scope, receive, send))
    assert [message.get("body") for message in sent] == [None, b"why"]
    assert client.guard._clients.running() == 0


def test_what_fails_later_is_not_tried_again() -> None:
    app = App((ROLE, TOKEN, BROKEN), b"text/event-stream")
    assert run(Client(app=app), body=chat()).body == ROLE + TOKEN + BROKEN
    assert len(app.requests) == 1


def test_nothing_is_held_back_longer_than_the_first_token() -> None:
    """The role waits for the token; the token waits for nothing."""

    async def seen() -> list[bytes]:
        client = Client(app=App((TOKEN, TOKEN), b"text/event-stream", pause=30))
        sent: list[bytes] = []
        body = chat()

        async def receive() -> dict[str, Any]:
            if not sent and not client.app.requests:
                return {"type": "http.request", "body": body}
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b""))

        headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        task = asyncio.create_task(client.guard(scope, receive, send))
        while len(sent) < 2:
            assert not task.done()
            await asyncio.sleep(0.01)
        task.cancel()
        return sent

    assert asyncio.run(seen()) == [b"", TOKEN]


def test_whoever_leaves_while_sending_leaves_nothing_behind() -> None:
    client = Client()
    assert run(client, body=[b"{", b'"model"', 0.01], leaves_after=0).status == 0
    assert not client.app.requests
    assert client.guard._clients.running() == 0
    assert client.guard._held.size == 0


@pytest.mark.parametrize("chunks", [(b"{}",), (b"data: 1\n\n",) * 50])
def test_the_engine_is_told_when_a_client_leaves(chunks: tuple[bytes, ...]) -> None:
    client = Client(app=App(chunks, delay=0.0 if len(chunks) > 1 else 30, pause=0.1))
    began = time.monotonic()
    run(client, body=chat(), leaves_after=0.2)
    assert client.app.aborted == 1
    assert time.monotonic() - began < 20
    assert client.guard._clients.running() == 0


def test_time_is_up_before_the_first_byte() -> None:
    client = Client(Limits(api_key=KEY, request_seconds=0.2), App(delay=30))
    before = count("timeout")
    answer = run(client, body=chat())
    assert (answer.status, answer.error["code"]) == (504, "timeout")
    assert client.app.aborted == 1
    assert count("timeout") == before + 1
    assert client.guard._clients.running() == 0


def test_time_is_up_amid_a_stream() -> None:
    app = App((b"data: 1\n\n",) * 100, b"text/event-stream; charset=utf-8", pause=0.05)
    answer = run(Client(Limits(api_key=KEY, request_seconds=0.2), app), body=chat(stream=True))
    assert answer.status == 200
    first, *_, last = answer.body.strip().split(b"\n\n")
    assert first == b"data: 1"
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
    assert app.aborted == 1


def test_time_is_up_and_the_engine_does_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.guard.answer._FORCE", 0.2)

    class Deaf(App):
        async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            await receive()
            watch = asyncio.create_task(receive())
            await asyncio.sleep(30)
            watch.cancel()

    client = Client(Limits(api_key=KEY, request_seconds=0.2), Deaf())
    began = time.monotonic()
    assert run(client, body=chat()).status == 504
    assert time.monotonic() - began < 20


def test_rates_and_concurrency_are_each_keys_own(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one-key\nother-key\n")
    slow = Client(Limits(api_key_file=str(keys), max_concurrency=1), App(delay=0.2))

    async def three() -> list[Any]:
        return await asyncio.gather(*(slow.ask(body=chat(), key=k) for k in ("one-key", "one-key", "other-key")))

    assert sorted(answer.status for answer in asyncio.run(three())) == [200, 200, 429]
    limited = Client(Limits(api_key_file=str(keys), rate_per_minute=6))
    answers = [run(limited, body=chat(), key=key) for key in ("one-key", "one-key", "other-key")]
    assert [answer.status for answer in answers] == [200, 429, 200]
    assert 1 <= int(answers[1].headers["retry-after"]) <= 10
    assert answers[1].error["type"] == "rate_limit_error"
    assert run(limited, "GET", "/metrics", key="one-key").status == 200


def test_pages_of_other_origins() -> None:
    client = Client(Limits(api_key=KEY, cors_origins=("https://app.example",)))
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    answer = run(client, "OPTIONS", key=None, headers=asks)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    for status, body in ((200, chat()), (400, b"{}")):
        answer = run(client, body=body, headers={"Origin": "https://app.example"})
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
    other = run(client, body=chat(), headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert run(client, "OPTIONS", key=None, headers=asks | {"Origin": "https://evil.example"}).status == 401


def test_websockets_are_refused_and_lifespans_passed() -> None:
    client = Client()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(client.guard({"type": "websocket", "path": "/v1/realtime"}, receive, send))
    assert sent.pop() == {"type": "websocket.close", "code": 1008}
    scope = {"type": "websocket", "path": "/v1/realtime", "extensions": {"websocket.http.response": {}}}
    asyncio.run(client.guard(scope, receive, send))
    assert [m["type"] for m in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert sent[0]["status"] == 403
    asyncio.run(client.guard({"type": "lifespan"}, receive, send))
    assert [scope["type"] for scope, _ in client.app.requests] == ["lifespan"]


def test_what_is_known_goes_to_the_log_line_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    notes: dict[str, Any] = {"id": "1", "key": None, "refused": None}
    run(Client(), body=chat(secret="words"), scope={"qvl": notes})
    assert notes["refused"] == "field"
    assert len(notes["key"]) == 8
    assert KEY not in notes["key"]
    assert not [record for record in caplog.records if record.name != "asyncio"]


def test_without_settings_there_is_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_GUARD", raising=False)
    with pytest.raises(ServerError, match="QVL_GUARD"):
        Guard(App())
    monkeypatch.setenv("QVL_GUARD", Limits(api_key=KEY).dumps())
    assert Guard(App())._limits.api_key == KEY


def test_without_keys_each_address_is_a_client() -> None:
    client = Client(Limits(rate_per_minute=6))
    assert run(client, body=chat(), key=None).status == 200
    assert run(client, body=chat(), key=None).status == 429
    assert run(client, body=chat(), key=None, scope={"client": ("192.0.2.2", 1)}).status == 200


def test_no_refusal_repeats_what_was_sent() -> None:
    secret = "my-diary-entry"
    for body in (
        chat(**{secret + "-" * 80: 1}),
        chat(messages=[{"role": secret, "content": ""}]),
        chat(messages=[{"role": "user", "content": f"{secret} <|im_start|>"}]),
        chat_body("m", f"http://{secret}.example/{secret}"),
        f'{{"{secret}": '.encode(),
        chat_body("m", f"data:image/png;base64,{secret}"),
    ):
        assert secret not in run(Client(), body=body).body.decode()


def test_path_prefix_of_a_proxy() -> None:
    client = Client()
    assert run(client, "GET", "/qvl/v1/models", scope={"root_path": "/qvl"}).status == 200
    assert run(client, "GET", "/qvl/docs", scope={"root_path": "/qvl"}).status == 404


def test_chat_is_where_hostile_requests_go() -> None:
    assert {entry.path for entry in catalogue("m")} >= {CHAT, "/v1/completions", "/tokenize"}


KEYLESS = Limits()


@pytest.mark.parametrize("entry", list(rebinding("m")), ids=lambda entry: entry.name)
def test_pages_that_took_this_machines_address_are_refused(entry: Hostile) -> None:
    client = Client(KEYLESS)
    before = count("host")
    answer = run(client, entry.method, entry.path, entry.make(), key=None, headers=entry.headers)
    assert (answer.status, answer.error["code"]) == (entry.status, entry.reason)
    assert count("host") == before + 1
    assert not client.app.requests


@pytest.mark.parametrize("path", ["/tokenize", "/pooling", "/classify", "/v1/embeddings"])
def test_added_routes_refuse_what_chats_refuse(path: str) -> None:
    client = Client(Limits(api_key=KEY, allow_routes=(f"POST {path}",)))
    for entry in added_route("m", path):
        answer = run(client, entry.method, entry.path, entry.make())
        assert (answer.status, answer.error["code"]) == (entry.status, entry.reason), entry.name
    assert not client.app.requests


def test_a_server_without_keys_answers_to_its_own_names_only() -> None:
    """DNS rebinding: a page's name resolves to this machine, and its browser asks the server as that page's own."""
    client = Client(KEYLESS)
    for host in ("127.0.0.1:8000", "localhost", "10.244.1.7:8000"):
        assert run(client, body=chat(), key=None, headers={"Host": host}).status == 200
    assert run(client, "GET", "/health", key=None, headers={"Host": "balancer.example"}).status == 200
    named = Client(Limits(hosts=("qvl.example.com",)))
    assert run(named, body=chat(), key=None, headers={"Host": "qvl.example.com"}).status == 200


def test_with_keys_a_server_goes_by_any_name() -> None:
    headers = {"Host": "any.example", "Origin": "https://page.example"}
    assert run(Client(), body=chat(), headers=headers).status == 200


def test_a_data_url_may_leave_the_type_to_the_bytes() -> None:
    client = Client()
    for format in ("PNG", "JPEG"):
        url = data_url(good_image(format=format), "image")
        assert run(client, body=chat_body("m", url)).status == 200
    assert run(client, body=chat_body("m", data_url(b"<svg/>", "image"))).error["code"] == "image_format"


def test_16_bits_of_gray_are_refused_for_the_reason_that_calibration_gives() -> None:
    with pytest.raises(MediaError) as caught:
        media.decode(deep_gray(), "x", "it")
    reason = "16 bits of gray a pixel, of which all but 8 are clipped: scale it to 8 bits first"
    assert reason in str(caught.value)
    assert reason in run(Client(), body=chat_body("m", data_url(deep_gray()))).error["message"]


def test_images_under_way_are_bounded_and_one_request_alone_is_let_in() -> None:
    image = data_url(good_image(100))
    client = Client(Limits(api_key=KEY, max_decoded_pixels=15_000), App(delay=0.3))

    async def several() -> list[Any]:
        return await asyncio.gather(*(client.ask(body=chat_body("m", image)) for _ in range(3)))

    answers = asyncio.run(several())
    assert sorted(answer.status for answer in answers) == [200, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.error["code"] == "image_memory" and refused.headers["retry-after"] == "1"
    assert client.guard._pixels.held == 0
    assert run(client, body=chat_body("m", image, image, image)).status == 200


def test_pixels_are_held_until_the_first_token_only() -> None:
    image = data_url(good_image(100))
    client = Client(
        Limits(api_key=KEY, max_decoded_pixels=15_000), App((TOKEN, TOKEN), b"text/event-stream", pause=0.2)
    )

    async def one_after_the_other() -> list[int]:
        first = asyncio.create_task(client.ask(body=chat_body("m", image)))
        while not client.app.requests or client.guard._pixels.held:
            await asyncio.sleep(0.01)
        second = await client.ask(body=chat_body("m", image))
        return [(await first).status, second.status]

    assert asyncio.run(one_after_the_other()) == [200, 200]


def schema_of(length: int) -> bytes:
    schema = {"type": "string", "maxLength": length}
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def test_grammars_whose_clients_have_left_hold_up_that_client_alone() -> None:
    client = Client(Limits(api_key=KEY, max_concurrency=100), App(delay=0.5))

    async def attack() -> None:
        # each leaves soon; what it asked for is compiled all the same, one after the other
        gone = [asyncio.create_task(client.ask(body=schema_of(100 + i), leaves_after=0.1)) for i in range(5)]
        await asyncio.gather(*gone)
        assert len(client.app.requests) == 1
        client.app.requests.clear()
        assert (await client.ask(body=schema_of(200))).status == 200

    asyncio.run(attack())
    assert client.guard._clients.running() == 0


def test_a_schema_that_fails_is_not_tried_again() -> None:
    app = Fails(9, stream=False)
    assert run(Client(app=app), body=schema_of(5)).status == 500
    assert len(app.requests) == 1


def test_a_clients_mistake_in_a_stream_is_not_tried_again() -> None:
    event = b'data: {"error": {"message": "No such token.", "code": 400}}\n\n'
    app = App((event,), b"text/event-stream")
    assert run(Client(app=app), body=chat()).body == event
    assert len(app.requests) == 1


class Lists(App):
    """Answers as vLLM does about its models, whatever it is asked, or refuses a tool choice as vLLM would."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__()
        self.status, self.body = status, json.dumps(body).encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.requests.append((scope, b""))
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-a", b"b")]})
        await send({"type": "http.response.body", "body": self.body[:9], "more_body": True})
        await send({"type": "http.response.body", "body": self.body[9:]})


def test_one_model_can_be_asked_for() -> None:
    client = Client(app=Lists(200, {"data": [{"id": "org/m", "object": "model"}, {"id": "b"}]}))
    answer = run(client, "GET", "/v1/models/org/m")
    assert (answer.status, json.loads(answer.body)) == (200, {"id": "org/m", "object": "model"})
    assert client.app.requests[0][0]["path"] == "/v1/models"
    assert run(client, "HEAD", "/v1/models/b").status == 200
    answer = run(client, "GET", "/v1/models/c")
    assert (answer.status, answer.error["code"]) == (404, "model")
    assert run(client, "DELETE", "/v1/models/b").status == 405
    assert run(client, "GET", "/v1/models/b", key=None).status == 401


def test_what_the_operator_can_do_about_tool_calls_is_said_in_our_words() -> None:
    """vLLM names its own flags, which nobody typed."""
    vllms = 'tool_choice=function "f" requires --tool-call-parser to be set'
    tool = {"type": "function", "function": {"name": "f"}}
    client = Client(app=Lists(400, {"error": {"message": vllms, "type": "BadRequestError", "code": 400}}))
    answer = run(client, body=chat(tools=[tool]))
    assert answer.status == 400 and answer.error["param"] == "tool_choice"
    assert "qvl serve MODEL ... -- --enable-auto-tool-choice --tool-call-parser hermes" in answer.error["message"]
    other = {"error": {"message": "temperature must be in [0, 2]", "code": 400}}
    assert json.loads(run(Client(app=Lists(400, other)), body=chat()).body) == other


def test_an_image_by_address_is_not_fetched_on_an_added_route() -> None:
    """The example of --allow-route's own help: vLLM would fetch what the messages name."""
    client = Client(Limits(api_key=KEY, allow_routes=("POST /tokenize",)))
    body = chat_body("m", "http://127.0.0.1:1/a.png")
    assert run(client, path="/tokenize", body=body).error["code"] == "image_url"
    for url in (data_url(b"GIF89a"), "file:///etc/passwd"):
        assert run(client, path="/tokenize", body=chat_body("m", url)).status == 400
    assert not client.app.requests
    assert run(client, path="/tokenize", body=chat_body("m", data_url(good_image()))).status == 200
