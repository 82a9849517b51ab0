"""The probe: a question about an image, asked of vLLM's application in this process, past the network and the guard."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from typing import Any

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Scope

from serve.http.images import sample_image
from serve.http.middleware import innermost
from serve.settings.environment import VLLM_API_KEY

__all__ = ["Probe", "Unfit"]

_OVERFLOW = "Its activations overflow float16. Serve it with --dtype bfloat16."

_PROBE_SECONDS = Histogram(
    "qvl_probe_seconds",
    "Seconds that the probe's image question took.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40),
)


class Unfit(Exception):
    """The model answers, and the answer shows that it can't be served as it is."""


class Probe:
    """Asks one server.

    Args:
        app: the application that is asked, or middleware of the project around it.
        model: the name that the model is served under.

    Attributes:
        host_app: the application as scopes name it, once the server's life has begun.
    """

    def __init__(self, app: ASGIApp, model: str) -> None:
        self._app, self._model = app, model
        self.host_app: Any = None

    async def ask(self, limit: float, *, tokens: int = 1, logprobs: bool = False) -> str | None:
        """Ask the question; return what was wrong in words, or None.

        Args:
            limit: seconds that the answer may take.
            tokens: length of the answer.
            logprobs: ask for log-probabilities too, and look at the answer: it must not be one of a model that
                overflows.

        Raises Unfit when the answer shows that the model can't be served as it is.
        """
        body = self._question(tokens, logprobs)
        began = time.monotonic()
        try:
            status, text = await asyncio.wait_for(self._call(body), limit)
        except TimeoutError:
            return f"the engine has not answered an image question within {limit:g} s"
        except Exception as error:
            if "Out of range float" in str(error) or "nan" in str(error).lower():
                raise Unfit(f"the model's log-probabilities are not numbers. {_OVERFLOW}") from error
            return f"an image question failed: {type(error).__name__}"
        if status != 200:
            refused = f"an image question was answered with status {status}"
            if logprobs and "Out of range float" in text:
                raise Unfit(f"the model's log-probabilities are not numbers. {_OVERFLOW}")
            if logprobs and 400 <= status < 500:
                raise Unfit(
                    f"{refused}: {text[:400]} Its tokenizer, processor or chat template may be missing: "
                    "check the directory with `qvl inspect`."
                )
            return refused
        _PROBE_SECONDS.observe(time.monotonic() - began)
        if logprobs:
            _check(json.loads(text))
        return None

    def _question(self, tokens: int, logprobs: bool) -> bytes:
        content = [
            {"type": "image_url", "image_url": {"url": sample_image()}},
            {"type": "text", "text": "What colour is the circle?"},
        ]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            **({"logprobs": True, "top_logprobs": 1} if logprobs else {}),
        }
        return json.dumps(body).encode()

    def _scope(self, length: int) -> Scope:
        """Return the scope of a request of its own, with a body of so many bytes."""
        key = os.environ.get(VLLM_API_KEY)
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(length).encode()),
            (b"x-request-id", f"probe-{time.monotonic_ns()}".encode()),
            *([(b"authorization", f"Bearer {key}".encode())] if key else []),
        ]
        path = "/v1/chat/completions"
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "state": {},
            **({} if self.host_app is None else {"app": self.host_app}),
        }

    async def _call(self, body: bytes) -> tuple[int, str]:
        """Send the body to vLLM's application as a request of its own; return status and text of the answer."""
        status, parts, unsent = 0, [], [body]

        async def receive() -> Message:
            if unsent:
                return {"type": "http.request", "body": unsent.pop(), "more_body": False}
            await asyncio.Event().wait()  # this client does not go away; when it gives up it cancels
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            parts.append(message.get("body", b""))

        # Past the guard, which would want a key and count the probe.
        await innermost(self._app)(self._scope(len(body)), receive, send)
        return status, b"".join(parts).decode(errors="replace")


def _check(answer: dict[str, Any]) -> None:
    """Raise Unfit for an answer as Qwen2-VL gives it when it leaves float16's range."""
    choice = answer["choices"][0]
    said = choice["message"]["content"] or ""
    if len(said) > 3 and not said.strip("!"):
        raise Unfit(f"the model answers {said!r}. {_OVERFLOW}")
    tokens = (choice.get("logprobs") or {}).get("content") or []
    if any(token["logprob"] is None or not math.isfinite(token["logprob"]) for token in tokens):
        raise Unfit(f"the model's log-probabilities are not numbers. {_OVERFLOW}")
