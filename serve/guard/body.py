"""What is checked of a request's body before vLLM reads it: known fields, texts, images; `serve.guard.parse` reads it.

vLLM turns some texts into control tokens. Here a request is refused unless every part of it is known to be harmless;
docs/security.md lists both sides.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from serve.guard.attachments import Attachments, Fetch
from serve.guard.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    check_answers,
    check_fields,
    check_message,
    check_other,
    check_values,
    refused_field,
    whole_number,
)
from serve.guard.parse import parse_arguments, too_deep
from serve.guard.schema import SchemaCost, check_schemas
from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = ["Checked", "Checker"]

#: Fields whose texts never become part of a prompt: they are only compared with the answer, or ignored.
_NOT_IN_PROMPT = frozenset({"stop", "user", "model"})


@dataclass(frozen=True)
class Checked:
    """A request that may go on.

    Attributes:
        body: what vLLM gets.
        pixels: of its images together.
        attached: whether it has images or videos.
        schemas: a digest of its JSON schemas, b"" without any.
        schema_states: what a grammar of them costs, see `serve.guard.schema`.
    """

    body: bytes
    pixels: int = 0
    attached: bool = False
    schemas: bytes = b""
    schema_states: float = 0.0


class Checker:
    """Holds requests against limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._chat = CHAT_FIELDS | set(limits.allow_fields)
        self._completion = COMPLETION_FIELDS | set(limits.allow_fields)
        self._special = re.compile("|".join(map(re.escape, limits.special_tokens))) if limits.special_tokens else None

    async def chat(self, request: dict[str, Any], body: bytes, fetch: Fetch) -> Checked:
        """Check a request to /v1/chat/completions. Raises Refusal.

        The body that vLLM gets is the client's own, without what is null, with `max_tokens` added where none was asked
        for, and fetched images in the place of their URLs.
        """
        check_fields(request, self._chat)
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages:
            raise refused_field("messages must be a list of at least one message.", "messages")
        check_values(request, self._limits, chat=True)
        check_answers(whole_number(request, "n") or 1, self._limits)
        attachments = Attachments(self._limits)
        characters = self._texts({name: request[name] for name in request if name != "messages"}, 0)
        for message in messages:
            characters += self._message(message, attachments)
        self._length(characters)
        cost = check_schemas(request, self._limits)
        await attachments.fetch(fetch)
        capped = any(request.get(name) is not None for name in ("max_completion_tokens", "max_tokens"))
        body = _without_nulls(request, body, changed=bool(attachments.remote))
        return Checked(
            body if capped else _with_max_tokens(body, self._limits.max_tokens),
            attachments.pixels,
            attachments.any,
            *_schemas(request, cost),
        )

    def completion(self, request: dict[str, Any], body: bytes) -> Checked:
        """Check a request to /v1/completions. Raises Refusal."""
        check_fields(request, self._completion)
        prompt = request.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not prompts or not all(isinstance(each, str) and each for each in prompts):
            # Token ids could hold any control token.
            raise refused_field("prompt must be a text or a list of texts, none of them empty.", "prompt")
        check_values(request, self._limits, chat=False)
        check_answers(len(prompts) * (whole_number(request, "n") or 1), self._limits)
        self._length(self._texts(request, 0))
        cost = check_schemas(request, self._limits)
        return Checked(_without_nulls(request, body), 0, False, *_schemas(request, cost))

    async def other(self, path: str, request: dict[str, Any], body: bytes, fetch: Fetch) -> Checked:
        """Check a request to a route that was added: the same rules for texts and images. Raises Refusal."""
        check_other(path, request, set(self._limits.allow_fields))
        attachments = Attachments(self._limits)
        # Tokenizing a control token is what /tokenize is for; in a message it would be one all the same.
        prompts = {name: value for name, value in request.items() if name == "prompt" and path == "/tokenize"}
        contents = {name: value for name, value in request.items() if name not in ("messages", *prompts)}
        characters = self._texts(prompts, 0, special=False)
        for each in contents.values():
            characters += self._content(each, attachments)
        for message in request.get("messages") or ():
            characters += self._message(message, attachments)
        self._length(characters)
        check_schemas({"tools": request.get("tools")}, self._limits)
        await attachments.fetch(fetch)
        return Checked(
            json.dumps(request).encode() if attachments.remote else body, attachments.pixels, attachments.any
        )

    def _content(self, value: Any, attachments: Attachments) -> int:
        """Check what a request to an added route holds: texts, and {"content": [parts]} among them."""
        if isinstance(value, dict) and isinstance(value.get("content"), list):
            return self._parts(value["content"], attachments)
        if isinstance(value, list):
            return sum([self._content(each, attachments) for each in value])
        return self._texts(value, 1)

    def _length(self, characters: int) -> None:
        if characters > self._limits.max_prompt_chars:
            most = self._limits.max_prompt_chars
            raise Refusal(
                400, "prompt_length", f"The texts have {characters} characters. At most {most} are taken.", "messages"
            )

    def _message(self, message: Any, attachments: Attachments) -> int:
        """Check one message and return the characters of its texts."""
        check_message(message)
        content = message.get("content")
        if isinstance(content, list):
            rest = {name: value for name, value in message.items() if name != "content"}
            return self._texts(rest, 2) + self._parts(content, attachments)
        if content is not None and not isinstance(content, str):
            raise refused_field("A message's content must be a text or a list of parts.", "messages")
        return self._texts(message, 2)

    def _parts(self, parts: list[Any], attachments: Attachments) -> int:
        texts: list[str] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
                texts.append(part["text"])
                continue
            # vLLM joins texts on both sides of an image with something between them.
            texts.append("\0")
            if kind == "image_url" and part.keys() == {"type", "image_url"}:
                attachments.add_image(part["image_url"])
            elif kind == "video_url" and part.keys() == {"type", "video_url"}:
                attachments.add_video(part["video_url"])
            elif kind in ("text", "image_url", "video_url"):
                message = f"A part of type {kind} has its content under {kind} and no other field."
                raise refused_field(message, "messages")
            else:
                raise refused_field("The parts of a message's content are of type text or image_url.", "messages")
        # Together: templates write parts one after the other, and half a token and its other half make one.
        return self._text("".join(texts))

    def _texts(self, value: Any, depth: int, special: bool = True) -> int:
        """Return the characters of all texts in a value, each of them checked."""
        if isinstance(value, str):
            return self._text(value, special)
        if isinstance(value, dict | list) and value:
            if depth >= self._limits.max_json_depth:
                raise too_deep(self._limits)
            if isinstance(value, list):
                return sum([self._texts(each, depth + 1, special) for each in value])
            total = 0
            for name, each in value.items():
                total += self._text(name, special)
                total += self._texts(each, depth + 1, special and not (depth == 0 and name in _NOT_IN_PROMPT))
                if name == "arguments" and isinstance(each, str):
                    # A tool call's arguments are JSON in a text, which vLLM parses for the template.
                    self._texts(parse_arguments(each, self._limits), depth + 1, special)
            return total
        return 0

    def _text(self, text: str, special: bool = True) -> int:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
                raise Refusal(400, "body_json", "A text holds half a surrogate pair (\\ud800 to \\udfff).") from None
        if special and self._special is not None and (found := self._special.search(text)):
            raise Refusal(
                400, "special_token", f"A text holds the control token {found[0]}. Write it another way.", "messages"
            )
        return len(text)


def _without_nulls(request: dict[str, Any], body: bytes, *, changed: bool = False) -> bytes:
    """Return the body without the fields that are null: its own bytes where there are none and nothing `changed`."""
    given = {name: value for name, value in request.items() if value is not None}
    return json.dumps(given).encode() if changed or len(given) < len(request) else body


def _schemas(request: dict[str, Any], cost: SchemaCost) -> tuple[bytes, float]:
    """Return a digest of a request's schemas, and their states."""
    if not cost.states:
        return b"", 0.0
    schemas = [request.get("response_format"), request.get("tools"), request.get("tool_choice")]
    return hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).digest(), cost.states


def _with_max_tokens(body: bytes, most: int) -> bytes:
    """Return the body of a JSON object with the field added as its last, which counts if there is a null before."""
    return body[: body.rindex(b"}")] + b',"max_tokens":%d}' % most
