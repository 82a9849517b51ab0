from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from serve.ask import ask
from toolkit.errors import ServerError

URL = "http://127.0.0.1:18149"
Handler = Callable[[httpx.Request], httpx.Response]


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def events(*chunks: dict[str, Any] | str) -> bytes:
    return b"".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n".encode() for c in chunks)


GOOD = events(
    chunk(""),
    chunk("gar"),
    chunk("den"),
    chunk(finish="stop"),
    {"choices": [], "usage": {"prompt_tokens": 75, "completion_tokens": 3}},
    "[DONE]",
)


def server(body: bytes = GOOD, status: int = 200, models: httpx.Response | None = None) -> httpx.MockTransport:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return models or httpx.Response(200, json={"data": [{"id": "demo"}, {"id": "other"}]})
        assert request.url.path == "/v1/chat/completions"
        return httpx.Response(status, content=body)

    return httpx.MockTransport(handle)


def test_streams_piece_by_piece() -> None:
    answer = ask(URL, "What word?", [], transport=server())
    assert list(answer) == ["gar", "den"]
    assert answer.text == "garden"
    assert (answer.model, answer.finish_reason) == ("demo", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (75, 3)
    assert answer.first_token_seconds is not None and answer.seconds is not None
    assert 0 < answer.first_token_seconds <= answer.seconds
    assert set(answer.as_dict()) == {
        "model",
        "text",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "first_token_seconds",
        "seconds",
    }
    json.dumps(answer.as_dict())


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_characters_that_only_python_takes_for_line_ends_stay_in_the_answer(size: int) -> None:
    text = "one\u2028two\x85three\u2029four\x0cfive"
    said = json.dumps(chunk(text), ensure_ascii=False).encode()
    body = b"data: " + said + b"\n\n" + events(chunk(finish="stop"), "[DONE]")

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=(body[i : i + size] for i in range(0, len(body), size)))

    answer = ask(URL, "?", [], model="demo", transport=httpx.MockTransport(handle))
    assert "".join(answer) == answer.text == text
    assert answer.finish_reason == "stop"


def test_what_is_sent() -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=GOOD)

    images = ["http://a/1.png", "data:image/png;base64,AA"]
    transport = httpx.MockTransport(handle)
    list(ask(f"{URL}/v1/", "Why?", images, model="m", api_key="k", max_tokens=7, transport=transport))
    (request,) = seen  # the model was named, so the list is not asked for
    assert str(request.url) == f"{URL}/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k"
    body = json.loads(request.content)
    assert body["model"] == "m" and body["max_tokens"] == 7 and body["temperature"] == 0 and body["stream"]
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": images[0]}},
                {"type": "image_url", "image_url": {"url": images[1]}},
                {"type": "text", "text": "Why?"},
            ],
        }
    ]


def test_no_server() -> None:
    with pytest.raises(ServerError, match=r"no server answers at http://127\.0\.0\.1:18149 .*qvl serve"):
        ask(URL, "Why?", [])
    with pytest.raises(ServerError, match="no server answers"):
        list(ask(URL, "Why?", [], model="m"))


def test_no_url() -> None:
    with pytest.raises(ServerError, match="give an address such as"):
        ask("localhost:8000", "Why?", [])


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"error": {"message": "maximum context length is 4096"}}, "answers 400: maximum context length is 4096"),
        (
            401,
            {"error": "Unauthorized"},
            "answers 401: Unauthorized Give the server's key in the environment variable QVL_API_KEY",
        ),
        (404, {"error": {"message": "The model `x` does not exist."}}, "does not exist. Is it an OpenAI"),
        (500, {"detail": "oops"}, "answers 500: {'detail': 'oops'}"),
    ],
)
def test_refusals_carry_the_servers_message(status: int, body: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError) as error:
        list(ask(URL, "Why?", [], transport=server(json.dumps(body).encode(), status)))
    assert message in str(error.value)


def test_refusal_without_json() -> None:
    with pytest.raises(ServerError, match="answers 502: <html>bad gateway"):
        list(ask(URL, "Why?", [], transport=server(b"<html>bad gateway</html>", 502)))


@pytest.mark.parametrize("models", [httpx.Response(200, text="hello"), httpx.Response(200, json={"data": []})])
def test_something_else_listens(models: httpx.Response) -> None:
    with pytest.raises(ServerError, match="lists no model"):
        ask(URL, "Why?", [], transport=server(models=models))


def test_models_refused() -> None:
    with pytest.raises(ServerError, match="answers 401: no key"):
        ask(URL, "Why?", [], transport=server(models=httpx.Response(401, json={"error": "no key"})))


@pytest.mark.parametrize("body", [events(chunk("gar")), events(chunk("gar"), "[DONE]")])
def test_a_stream_that_just_ends(body: bytes) -> None:
    answer = ask(URL, "Why?", [], transport=server(body))
    with pytest.raises(ServerError, match="broke off after 3 characters"):
        list(answer)
    assert answer.text == "gar"


def test_a_connection_that_breaks() -> None:
    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield events(chunk("gar"))
            raise httpx.ReadError("connection reset")

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Broken())

    with pytest.raises(ServerError, match=r"broke off after 3 characters \(connection reset\)"):
        list(ask(URL, "Why?", [], model="m", transport=httpx.MockTransport(handle)))


def test_silence() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    with pytest.raises(ServerError, match="sent nothing for"):
        list(ask(URL, "Why?", [], model="m", transport=httpx.MockTransport(handle)))


def test_an_error_inside_the_stream() -> None:
    body = events(chunk("gar"), {"error": {"message": "engine died", "code": 500}})
    with pytest.raises(ServerError, match="failed while it answered: engine died"):
        list(ask(URL, "Why?", [], transport=server(body)))


def test_no_json_inside_the_stream() -> None:
    with pytest.raises(ServerError, match="sent what is no JSON"):
        list(ask(URL, "Why?", [], transport=server(events("{oops"))))
