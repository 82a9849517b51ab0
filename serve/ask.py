"""One question about images, to any OpenAI-compatible server, answered token by token."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve.http.sse import EventDecoder
from toolkit.errors import ServerError

__all__ = ["Answer", "ask"]

#: Seconds to connect, and from one piece of an answer to the next. The first waits for all requests before it.
_CONNECT, _READ = 5.0, 300.0


@dataclass
class Answer:
    """An answer as it grows: iterate over it for its pieces of text; all else is known when they are exhausted."""

    model: str
    _pieces: Iterator[str] = field(repr=False)
    text: str = ""
    #: Why the model stopped: "stop", or "length" when it ran into max_tokens.
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    #: Seconds from sending the request to the first piece of text.
    first_token_seconds: float | None = None
    #: Seconds from sending the request to the end of the answer.
    seconds: float | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, for JSON."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def ask(
    url: str,
    question: str,
    images: list[str],
    *,
    model: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    transport: httpx.BaseTransport | None = None,
    verify: ssl.SSLContext | None = None,
) -> Answer:
    """Ask a server a question about images and return its streamed answer.

    Args:
        url: the server, with or without "/v1".
        question: what to ask.
        images: values for `image_url`, see `serve.http.images.image_url`; shown before the question.
        model: its name on the server. None: the first one that the server lists.
        api_key: key for the API, if it wants one.
        max_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        transport: replaces the network in tests.
        verify: what checks the server's certificate. None: known authorities, or those that SSL_CERT_FILE names.

    Raises ServerError when the server is not up or refuses, with its message; while the answer is iterated over also
    when it breaks off.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ServerError(f"--url {url}: give an address such as http://127.0.0.1:8000.")
    client = httpx.Client(
        base_url=base,
        verify=verify if verify is not None else httpx.create_ssl_context(),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(_READ, connect=_CONNECT),
        transport=transport,
        trust_env=not _is_local(base),
    )
    try:
        name = model or _first_model(client)
    except ServerError:
        client.close()
        raise
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content.append({"type": "text", "text": question})
    body = {
        "model": name,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(model=name, _pieces=iter(()))
    answer._pieces = _stream(client, body, answer)
    return answer


def _is_local(base: str) -> bool:
    """Whether a proxy could only be in the way."""
    return httpx.URL(base).host in ("127.0.0.1", "localhost", "::1")


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models", timeout=30)
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from error
    if not response.is_success:
        raise _refused(client, response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ServerError(
            f"{_where(client)} lists no model under /v1/models: is it an OpenAI-compatible API?"
        ) from error


def _stream(client: httpx.Client, body: dict[str, Any], answer: Answer) -> Iterator[str]:
    """Send the request, fill in `answer` and yield its pieces of text."""
    began = time.perf_counter()
    finished = False
    with contextlib.closing(client):
        try:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    raise _refused(client, response)
                for chunk in _events(response):
                    if usage := chunk.get("usage"):
                        answer.prompt_tokens = usage.get("prompt_tokens")
                        answer.completion_tokens = usage.get("completion_tokens")
                    for choice in chunk.get("choices", []):
                        if piece := (choice.get("delta") or {}).get("content"):
                            if answer.first_token_seconds is None:
                                answer.first_token_seconds = time.perf_counter() - began
                            answer.text += piece
                            yield piece
                        if choice.get("finish_reason"):
                            answer.finish_reason, finished = choice["finish_reason"], True
        except httpx.ConnectError as error:
            raise _unreachable(client, error) from error
        except httpx.TimeoutException as error:
            raise ServerError(
                f"{_where(client)} sent nothing for {_READ:g} s: see its log and `qvl status`."
            ) from error
        except httpx.HTTPError as error:
            raise _broken_off(answer, str(error)) from error
    if not finished:
        raise _broken_off(answer, "the stream ended without a finish_reason")
    answer.seconds = time.perf_counter() - began


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Return the chunks of an answer: server-sent events, one JSON each."""
    decoder = EventDecoder()
    for event in (event for received in response.iter_bytes() for event in decoder.feed(received)):
        data = event.decode(errors="replace").strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise ServerError(f"{response.url} sent what is no JSON: {data[:200]}") from error
        if failure := chunk.get("error"):
            raise ServerError(f"the server failed while it answered: {_message(failure)}")
        yield chunk


def _where(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def _unreachable(client: httpx.Client, error: httpx.HTTPError) -> ServerError:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ServerError(
            f"{_where(client)} shows a certificate that is not trusted ({error}). If it is the right server, name the "
            "certificate's file, or its authority's, in SSL_CERT_FILE."
        )
    return ServerError(
        f"no server answers at {_where(client)} ({error or type(error).__name__}). Start one with `qvl serve`, "
        "see `qvl status`, or give another --url."
    )


def _refused(client: httpx.Client, response: httpx.Response) -> ServerError:
    try:
        body = response.json()
        message = _message(body.get("error", body))
    except (ValueError, AttributeError):
        message = response.text[:400] or "no message"
    advice = {
        401: " Give the server's key in the environment variable QVL_API_KEY.",
        404: " Is it an OpenAI-compatible API, and the --model one that it lists under /v1/models?",
    }.get(response.status_code, "")
    return ServerError(f"{_where(client)} answers {response.status_code}: {message}{advice}")


def _message(error: Any) -> str:
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)


def _broken_off(answer: Answer, why: str) -> ServerError:
    return ServerError(
        f"the answer broke off after {len(answer.text)} characters ({why}). See the server's log and `qvl status`."
    )
