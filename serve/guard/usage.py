"""Tokens: what an answer has cost, read off it on its way out; who has used how many; who may have no more today.

vLLM tells a client what its answer costs at its end, and of a stream only where it was asked to. A client that leaves
before the end would cost nothing. So vLLM is asked to count along in every piece of a stream, and what the client has
not asked for is taken out again before it is sent.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter
from starlette.types import Message, Send

from serve.guard.keyfile import Key
from serve.http.errors import Refusal

__all__ = ["Ledger", "Usage", "images_in"]

_DAY = 86_400
_REQUESTS = Counter("qvl_key_requests", "Requests given to the engine, by the key's name.", ["key"])
_TOKENS = Counter("qvl_key_tokens", "Tokens of prompts and of answers, by the key's name.", ["key", "kind"])

#: Within a string of JSON its quotes would have backslashes.
_USAGE = re.compile(r',?"usage"\s*:\s*(?=\{)')
_NO_CHOICES = re.compile(r'"choices"\s*:\s*\[\s*\]')
#: Ends of server-sent events, kept when a text is split by them.
_EVENT_END = re.compile(rb"(\r?\n\r?\n)")
_DECODER = json.JSONDecoder()


def images_in(request: dict[str, Any]) -> int:
    """Return how many images the messages of a checked request hold."""
    contents = [message.get("content") for message in request.get("messages") or ()]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part.get("type") == "image_url" for part in parts)


class Usage:
    """Passes one answer on and notes what it has cost so far.

    Args:
        send: to the client.

    Attributes:
        prompt: tokens of the prompt, images included; None where vLLM has not said.
        completion: tokens of the answer so far.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._hides = self._wants_last = self._wants_each = False
        self._rest = b""
        self._streams = False
        self.prompt: int | None = None
        self.completion: int | None = None

    def counting(self, request: dict[str, Any], body: bytes) -> bytes:
        """Return the body that has vLLM count along in a stream; `body` itself where the request asks for none.

        Raises Refusal for a request that leaves open whether it asks for one.
        """
        streams, options = request.get("stream") or False, request.get("stream_options") or {}
        if not isinstance(streams, bool) or not isinstance(options, dict):  # vLLM takes 1 and "yes", too
            name = "stream_options" if isinstance(streams, bool) else "stream"
            raise Refusal(400, "field", f"{name} must be {'an object' if '_' in name else 'true or false'}.", name)
        if not streams:
            return body
        self._hides = True
        self._wants_last = options.get("include_usage") is True
        self._wants_each = self._wants_last and options.get("continuous_usage_stats") is True
        asked = {**options, "include_usage": True, "continuous_usage_stats": True}
        # As the last field, which counts where there is one before.
        return body[: body.rindex(b"}")] + b',"stream_options":' + json.dumps(asked).encode() + b"}"

    async def send(self, message: Message) -> None:
        """Take the next ASGI message of the answer."""
        if message["type"] == "http.response.start":
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
        elif self._streams:
            message = {**message, "body": self._events(message.get("body", b""), bool(message.get("more_body")))}
        elif b'"usage"' in message.get("body", b""):
            self._note(message["body"].decode(errors="replace"))
        await self._send(message)

    def _events(self, received: bytes, more: bool) -> bytes:
        """Return what the client gets of the events that are complete by now."""
        *pieces, self._rest = _EVENT_END.split(self._rest + received)
        if not more:
            pieces, self._rest = [*pieces, self._rest, b""], b""
        return b"".join(
            shown + end for event, end in zip(pieces[::2], pieces[1::2], strict=True) if (shown := self._event(event))
        )

    def _event(self, event: bytes) -> bytes:
        if b'"usage"' not in event:
            return event
        text = event.decode(errors="replace")
        found = self._note(text)
        if found is None or not self._hides:
            return event
        if _NO_CHOICES.search(text):  # the last one, which holds nothing else
            return event if self._wants_last else b""
        if self._wants_each:
            return event
        before, after = text[: found[0]], text[found[1] :]
        return (before + (after.removeprefix(",") if before.endswith("{") else after)).encode()

    def _note(self, text: str) -> tuple[int, int] | None:
        """Note the usage in a JSON text; return where it begins and ends, None where there is none."""
        begin = None
        for each in _USAGE.finditer(text):
            begin = each  # the last one is the answer's own
        if begin is None:
            return None
        try:
            usage, end = _DECODER.raw_decode(text, begin.end())
        except ValueError:
            return None
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(prompt, int):
            self.prompt = prompt
        if isinstance(completion, int):
            self.completion = completion
        return begin.start(), end


class Ledger:
    """What each key has used today, by its name: keys of one name, such as an old and a new one, share their budget.

    It is kept in this process, so it outlives a change of the key file and not a restart of the server.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._day = 0
        self._used: dict[str, int] = {}

    def check(self, key: Key) -> None:
        """Refuse a key whose tokens of the day are spent. Raises Refusal.

        What is under way counts when it has ended, so the last requests of a day may go beyond the budget.
        """
        if key.tokens_per_day is None or self.used(key.name) < key.tokens_per_day:
            return
        wait = max(1, _DAY - int(self._clock()) % _DAY)
        text = f"The {key.tokens_per_day} tokens that this key has for a day are spent: more from 00:00 UTC."
        raise Refusal(429, "tokens", text, headers=[(b"retry-after", str(wait).encode())])

    def used(self, name: str) -> int:
        """Return how many tokens keys of this name have used today, by UTC."""
        if (day := int(self._clock()) // _DAY) != self._day:
            self._day = day
            self._used.clear()
        return self._used.get(name, 0)

    def add(self, name: str, usage: Usage) -> None:
        """Count what a request has cost."""
        _REQUESTS.labels(name).inc()
        for kind, tokens in (("prompt", usage.prompt), ("completion", usage.completion)):
            if tokens:
                self._used[name] = self.used(name) + tokens
                _TOKENS.labels(name, kind).inc(tokens)
