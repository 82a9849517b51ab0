"""A streamed answer as it arrives: its text, the moments of its chunks, and what the server counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["Answer", "MalformedError", "ServerSaidError", "error_text"]

N = TypeVar("N", int, float)


class MalformedError(Exception):
    """An event that is not a chat chunk."""


class ServerSaidError(Exception):
    """An error the server sent inside the stream."""


#: The key before a chunk's text, up to the text's first byte. Inside a string its quotes would be escaped.
CONTENT = re.compile(rb'"content": ?"((?:[^"\\]|\\.)+)"', re.DOTALL)


@dataclass(slots=True)
class Answer:
    """What has arrived so far.

    The chunks of one stream differ in their text alone, nearly always. The bytes around it, ``head`` and ``tail``, are
    remembered from the last chunk that was parsed, and a chunk that has the same ones is known without parsing: its
    text, which must not contain quotes or backslashes, is the rest. Anything else is parsed.
    """

    #: Text of the answer proper; what a model thinks aloud or calls a tool with is timed, and no part of the answer.
    pieces: list[str] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    #: Tokens so far at each of `chunks`, from servers that count in every chunk (``continuous_usage_stats``).
    counts: list[int] = field(default_factory=list)
    head: bytes = b""
    tail: bytes = b""
    ended: float | None = None
    done: bool = False
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    queue_s: float | None = None

    def add(self, event: bytes, now: float) -> None:
        """Take the data of one event that arrived at ``now``."""
        self.ended = now
        try:
            if self.head and event.startswith(self.head) and event.endswith(self.tail):
                raw = event[len(self.head) : len(event) - len(self.tail)]
                if raw and b'"' not in raw and b"\\" not in raw:
                    self.pieces.append(raw.decode())
                    self.chunks.append(now)
                    return
            if event == b"[DONE]":
                self.done = True
            else:
                self._parse(event, now)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MalformedError(f"not a chat chunk: {event[:120].decode(errors='replace')}") from error

    def _parse(self, event: bytes, now: float) -> None:
        chunk = json.loads(event)
        if error := chunk.get("error"):
            raise ServerSaidError(error_text(error))
        choices, usage = chunk["choices"], chunk.get("usage")
        for choice in choices:
            delta = choice["delta"] or {}
            text, generated = delta.get("content"), _generated(delta)
            if text:
                self.pieces.append(text)
            if generated:
                self.chunks.append(now)
            if reason := choice.get("finish_reason"):
                self.finish_reason = reason
            if generated and usage and usage.get("completion_tokens"):
                self.counts.append(int(usage["completion_tokens"]))
            if text and generated == 1 and not reason and not usage and len(choices) == 1:
                self._learn(event, text)
        if usage:
            self._count(usage)

    def _learn(self, event: bytes, text: str) -> None:
        """Remember the bytes around the text, if the text is where it seems to be."""
        found = CONTENT.search(event)
        if found and event.count(b'"content":') == 1 and json.loads(b'"%s"' % found[1]) == text:
            self.head, self.tail = event[: found.start(1)], event[found.end(1) :]

    def _count(self, usage: dict[str, Any]) -> None:
        """Take the server's counts; what it leaves out stays unknown."""
        self.prompt_tokens = _number(int, usage.get("prompt_tokens"))
        self.completion_tokens = _number(int, usage.get("completion_tokens"))
        self.cached_tokens = _number(int, (usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        self.queue_s = _number(float, usage.get("queue_time"))


def _generated(delta: dict[str, Any]) -> int:
    """Count what a delta holds of generated text: the answer, reasoning (``reasoning``, ``reasoning_content``: the same
    under two names), a refusal, tools' names and arguments."""
    said = [delta.get("content"), delta.get("reasoning") or delta.get("reasoning_content"), delta.get("refusal")]
    calls = [call.get("function") for call in delta.get("tool_calls") or ()] + [delta.get("function_call")]
    said += [part for call in calls if call for part in (call.get("name"), call.get("arguments"))]
    return sum(bool(text) for text in said)


def _number(kind: Callable[[Any], N], value: Any) -> N | None:
    return None if value is None else kind(value)


def error_text(error: Any) -> str:
    """Return what a server says of an error, in a line."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return " ".join(str(error).split())[:300]
