"""What is read of a request's body before vLLM reads it: JSON of bounded shape, known fields, texts, pictures.

vLLM takes far more fields than OpenAI's API has, ignores those it does not know, and turns some texts into control
tokens. Here a request is refused unless every part of it is known to be harmless; docs/security.md lists both sides.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pybase64

from serve.guard.images import examine
from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = ["CHAT_FIELDS", "COMPLETION_FIELDS", "Checker", "parse"]

#: What both endpoints take: OpenAI's fields; of vLLM's own those that only choose among the tokens of the answer, and
#: the salt with which a client keeps its prompts' cache to itself.
_SAMPLING = {
    "cache_salt", "frequency_penalty", "ignore_eos", "include_stop_str_in_output", "logit_bias", "logprobs",
    "max_tokens", "min_p",
    "min_tokens", "model", "n", "presence_penalty", "repetition_penalty", "response_format", "seed",
    "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids", "stream", "stream_options",
    "temperature", "top_k", "top_p", "user",
}  # fmt: skip
#: Fields of OpenAI's API that vLLM ignores and clients send all the same.
_IGNORED = {
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "verbosity"
}  # fmt: skip
CHAT_FIELDS = frozenset(
    _SAMPLING | _IGNORED
    | {
        "max_completion_tokens", "messages", "parallel_tool_calls", "reasoning_effort", "tool_choice", "tools",
        "top_logprobs",
    }
)  # fmt: skip
COMPLETION_FIELDS = frozenset(_SAMPLING | _IGNORED | {"prompt", "suffix"})

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations"})
#: Entries of a list or object: each of them costs work for every token, or on every request.
_MOST_ENTRIES = {"stop": 16, "stop_token_ids": 64, "logit_bias": 300, "tools": 128, "messages": 1024}
#: Characters of all JSON schemas of a request. A grammar is compiled from them before the first token.
_MOST_SCHEMA_CHARS = 20_000
#: Largest bound in a schema: a grammar repeats what may come up to that often.
_MOST_REPEATS = 1000
_BOUNDS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
#: Fields whose texts never become part of a prompt: they are only compared with the answer, or ignored.
_NOT_IN_PROMPT = frozenset({"stop", "user", "model"})
_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+);base64,")
_SAME_TYPE = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}

#: vLLM writes a name that it does not know into its log.
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/@+-]{0,255}")

#: Fetches a picture by its URL.
Fetch = Callable[[str], Awaitable[bytes]]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Return a body's JSON object.

    Stricter than vLLM's own reading: UTF-8 only, no NaN or Infinity, no name twice in an object (two readers could
    take different ones), nothing that is far more structure than text. Raises Refusal (body_json, too_deep).
    """
    # Base64 has neither commas nor backslashes; millions of them are millions of objects, made before any is looked at.
    if len(body) > 1 << 18 and _parts(body) > 4 * limits.max_prompt_chars:
        raise Refusal(400, "body_json", "The body's JSON has too many parts.")
    try:
        parsed = _DECODER.decode(body.decode("utf-8"))
    except RecursionError:
        raise _too_deep(limits) from None
    except UnicodeDecodeError:
        raise Refusal(400, "body_json", "The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, "body_json", f"The body is not JSON: {error.msg} at {where}.") from None
    except ValueError as error:
        shown = str(error) if len(str(error)) < 60 else "a number is too large"
        raise Refusal(400, "body_json", f"The body is not JSON that is taken: {shown}.") from None
    if not isinstance(parsed, dict):
        raise Refusal(400, "body_json", "The body must be a JSON object.")
    return parsed


def _parts(body: bytes) -> int:
    """Return the commas and backslashes in a body."""
    values = np.frombuffer(body, np.uint8)
    return int(np.count_nonzero(values == ord(","))) + int(np.count_nonzero(values == ord("\\")))


def _too_deep(limits: Limits) -> Refusal:
    return Refusal(400, "too_deep", f"The body nests deeper than {limits.max_json_depth} levels.")


def _field(message: str, param: str) -> Refusal:
    return Refusal(400, "field", message, param)


@dataclass(slots=True)
class _Pictures:
    """The pictures of one request so far."""

    count: int = 0
    pixels: int = 0
    #: Parts of messages whose URLs are still to be fetched.
    remote: list[dict[str, Any]] = field(default_factory=list)


class Checker:
    """Holds requests against limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._chat = CHAT_FIELDS | set(limits.allow_fields)
        self._completion = COMPLETION_FIELDS | set(limits.allow_fields)
        self._special = re.compile("|".join(map(re.escape, limits.special_tokens))) if limits.special_tokens else None

    async def chat(self, request: dict[str, Any], body: bytes, fetch: Fetch) -> bytes:
        """Check a request to /v1/chat/completions and return the body that vLLM gets.

        It is the client's own, with `max_tokens` added where none was asked for, and fetched pictures in the place of
        their URLs. Raises Refusal.
        """
        self._fields(request, self._chat)
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _field("messages must be a list of at least one message.", "messages")
        self._common(request)
        answers = self._whole(request, "n") or 1
        self._answers(answers, "n")
        pictures = _Pictures()
        characters = self._texts({name: request[name] for name in request if name != "messages"}, 0)
        for message in messages:
            characters += self._message(message, pictures)
        self._length(characters)
        contents = await asyncio.gather(*(fetch(part["url"]) for part in pictures.remote))
        for part, content in zip(pictures.remote, contents, strict=True):
            mime = self._picture(content, pictures, None)
            part["url"] = f"data:{mime};base64,{pybase64.b64encode(content).decode()}"
        capped = self._whole(request, "max_completion_tokens") or self._whole(request, "max_tokens")
        if pictures.remote:
            if not capped:
                request["max_tokens"] = self._limits.max_tokens
            return json.dumps(request).encode()
        return body if capped else _with_max_tokens(body, self._limits.max_tokens)

    def completion(self, request: dict[str, Any]) -> None:
        """Check a request to /v1/completions. Raises Refusal."""
        self._fields(request, self._completion)
        prompt = request.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not prompts or not all(isinstance(each, str) for each in prompts):
            # Token ids could hold any control token.
            raise _field("prompt must be a text or a list of texts.", "prompt")
        self._common(request)
        self._answers(len(prompts) * (self._whole(request, "n") or 1), "n")
        self._length(self._texts(request, 0))

    def other(self, request: dict[str, Any]) -> None:
        """Check a request to a route that was added: its depth and the length of its texts. Raises Refusal."""
        self._length(self._texts(request, 0, special=False))

    def _fields(self, request: dict[str, Any], known: frozenset[str] | set[str]) -> None:
        if (unknown := _unknown(request, known)) is not None:
            raise _field(f"The field {unknown} is not taken by this server. Leave it out.", unknown)

    def _common(self, request: dict[str, Any]) -> None:
        model = request.get("model")
        if model is not None and not (isinstance(model, str) and _MODEL.fullmatch(model)):
            raise _field("model must be the name of a model that /v1/models lists.", "model")
        for name, most in _MOST_ENTRIES.items():
            value = request.get(name)
            if isinstance(value, list | dict) and len(value) > most:
                reason = "prompt_length" if name == "messages" else "field"
                raise Refusal(400, reason, f"{name} has {len(value)} entries. At most {most} are taken.", name)
        for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
            asked, most = self._whole(request, name), self._limits.max_tokens
            if asked is not None and (asked > most or (asked == 0 and name != "min_tokens")):
                raise Refusal(400, "max_tokens", f"{name} must be from 1 to {most}.", name)
        schemas = [request.get("response_format"), request.get("tools")]
        if any(schemas):
            budget = [_MOST_SCHEMA_CHARS]
            for schema, name in zip(schemas, ("response_format", "tools"), strict=True):
                self._schema(schema, name, budget, 1)

    def _whole(self, request: dict[str, Any], name: str) -> int | None:
        """Return a whole number. vLLM would take "100000" or 1e5 for one as well."""
        value = request.get(name)
        if value is None:
            return None
        if type(value) is not int or value < 0:
            raise _field(f"{name} must be a whole number.", name)
        return value

    def _answers(self, number: int, param: str) -> None:
        if number > self._limits.max_n:
            raise Refusal(400, "n", f"At most {self._limits.max_n} answers are given to one request.", param)

    def _length(self, characters: int) -> None:
        if characters > self._limits.max_prompt_chars:
            most = self._limits.max_prompt_chars
            raise Refusal(
                400, "prompt_length", f"The texts have {characters} characters. At most {most} are taken.", "messages"
            )

    def _schema(self, value: Any, param: str, budget: list[int], depth: int) -> None:
        """Refuse a schema from which a grammar would take long to compile."""
        if depth > self._limits.max_json_depth:
            raise _too_deep(self._limits)
        budget[0] -= len(value) + 2 if isinstance(value, str) else 4
        if budget[0] < 0:
            raise _field(f"JSON schemas of more than {_MOST_SCHEMA_CHARS} characters are not taken.", param)
        if isinstance(value, dict):
            for name, each in value.items():
                if name in ("pattern", "patternProperties") and not isinstance(each, bool):
                    raise _field(f"A JSON schema with {name} is not taken.", param)
                if name in _BOUNDS and isinstance(each, int | float) and each > _MOST_REPEATS:
                    raise _field(f"A JSON schema with {name} above {_MOST_REPEATS} is not taken.", param)
                budget[0] -= len(name)
                self._schema(each, param, budget, depth + 1)
        elif isinstance(value, list):
            for each in value:
                self._schema(each, param, budget, depth + 1)

    def _message(self, message: Any, pictures: _Pictures) -> int:
        """Check one message and return the characters of its texts."""
        if not isinstance(message, dict):
            raise _field("A message must be an object.", "messages")
        if (unknown := _unknown(message, _MESSAGE_FIELDS)) is not None:
            raise _field(f"The field {unknown} of a message is not taken by this server.", "messages")
        if message.get("role") not in _ROLES:
            raise _field(f"A message's role must be one of {', '.join(sorted(_ROLES))}.", "messages")
        content = message.get("content")
        if isinstance(content, list):
            rest = {name: value for name, value in message.items() if name != "content"}
            return self._texts(rest, 2) + self._parts(content, pictures)
        if content is not None and not isinstance(content, str):
            raise _field("A message's content must be a text or a list of parts.", "messages")
        return self._texts(message, 2)

    def _parts(self, parts: list[Any], pictures: _Pictures) -> int:
        texts: list[str] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
                texts.append(part["text"])
                continue
            # vLLM joins texts on both sides of a picture with something between them.
            texts.append("\0")
            if kind == "image_url" and part.keys() == {"type", "image_url"}:
                self._image(part["image_url"], pictures)
            elif kind == "video_url" and part.keys() == {"type", "video_url"}:
                self._video(part["video_url"])
            elif kind in ("text", "image_url", "video_url"):
                raise _field(f"A part of type {kind} has its content under {kind} and no other field.", "messages")
            else:
                raise _field("The parts of a message's content are of type text or image_url.", "messages")
        # Together: templates write parts one after the other, and half a token and its other half make one.
        return self._text("".join(texts))

    def _image(self, image: Any, pictures: _Pictures) -> None:
        pictures.count += 1
        limits = self._limits
        if pictures.count > limits.max_images:
            raise Refusal(400, "image_count", f"At most {limits.max_images} pictures are taken.", "messages")
        if not isinstance(image, dict) or not isinstance(image.get("url"), str) or image.keys() - {"url", "detail"}:
            raise _field('A picture is given as {"image_url": {"url": ...}}.', "messages")
        if image.get("detail") not in (None, "auto", "low", "high"):
            raise _field("A picture's detail is auto, low or high.", "messages")
        url: str = image["url"]
        head = _DATA_URL.match(url)
        if head is None:
            if url[:5].lower() == "data:":
                raise Refusal(
                    400, "image_format", "A picture's data URL begins data:image/TYPE;base64,", "messages"
                )  # fmt: skip
            if not url.lower().startswith(("http://", "https://")):
                raise Refusal(400, "image_url", "A picture is a data URL: data:image/png;base64,...", "messages")
            pictures.remote.append(image)
            return
        if (len(url) - head.end()) // 4 * 3 > limits.max_image_bytes + 2:
            raise self._too_large()
        try:
            content = pybase64.b64decode(url[head.end() :], validate=True)
        except ValueError:
            raise Refusal(400, "image_format", "A picture's base64 is damaged.", "messages") from None
        self._picture(content, pictures, head[1])

    def _too_large(self) -> Refusal:
        most = self._limits.max_image_bytes
        return Refusal(413, "image_bytes", f"A picture has more than {most} bytes. Send a smaller one.", "messages")

    def _picture(self, content: bytes, pictures: _Pictures, declared: str | None) -> str:
        """Check a picture's bytes and return its MIME type."""
        limits = self._limits
        if len(content) > limits.max_image_bytes:
            raise self._too_large()
        picture = examine(content)
        if declared is not None and _SAME_TYPE.get(declared, declared) != picture.mime:
            raise Refusal(
                400, "image_format", f"A picture is declared another type but is {picture.mime}. Declare that.",
                "messages",
            )  # fmt: skip
        size = f"{picture.width} x {picture.height} pixels"
        pixels = picture.width * picture.height
        if pixels > limits.max_image_pixels:
            raise Refusal(
                400, "image_pixels", f"A picture of {size} is too large. At most {limits.max_image_pixels} pixels.",
                "messages",
            )  # fmt: skip
        pictures.pixels += pixels
        if pictures.pixels > limits.max_request_pixels:
            raise Refusal(
                400, "image_pixels", f"The pictures have more than {limits.max_request_pixels} pixels together.",
                "messages",
            )  # fmt: skip
        if picture.frames > limits.max_image_frames:
            most = limits.max_image_frames
            raise Refusal(
                400, "image_frames", f"A picture has {picture.frames} frames. At most {most} taken.", "messages"
            )
        return picture.mime

    def _video(self, video: Any) -> None:
        if not self._limits.allow_video:
            raise Refusal(400, "video", "Videos are not taken by this server.", "messages")
        if not isinstance(video, dict) or video.keys() != {"url"} or not isinstance(video["url"], str):
            raise _field('A video is given as {"video_url": {"url": ...}}.', "messages")
        if not video["url"].startswith("data:video/"):
            raise Refusal(400, "video", "A video is a data URL: data:video/mp4;base64,...", "messages")

    def _texts(self, value: Any, depth: int, special: bool = True) -> int:
        """Return the characters of all texts in a value, each of them checked."""
        if isinstance(value, str):
            return self._text(value, special)
        if isinstance(value, dict | list) and value:
            if depth >= self._limits.max_json_depth:
                raise _too_deep(self._limits)
            if isinstance(value, list):
                return sum([self._texts(each, depth + 1, special) for each in value])
            total = 0
            for name, each in value.items():
                total += self._text(name, special)
                total += self._texts(each, depth + 1, special and not (depth == 0 and name in _NOT_IN_PROMPT))
                if name == "arguments" and isinstance(each, str) and "\\" in each:
                    # A tool call's arguments are JSON in a text, which vLLM parses for the template.
                    self._texts(_arguments(each), depth + 1, special)
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


def _unknown(fields: dict[str, Any], known: frozenset[str] | set[str]) -> str | None:
    """Return a field that is not known, as a message may show it. What is null is as good as absent: clients send back
    answers as they got them, with fields that were empty.
    """
    unknown = [name for name in fields.keys() - known if fields[name] is not None]
    if not unknown:
        return None
    name = min(unknown)
    return name if name.isidentifier() and len(name) <= 60 else "with a name that is none"


def _arguments(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise _field("A tool call's arguments must be JSON.", "messages") from None


def _with_max_tokens(body: bytes, most: int) -> bytes:
    """Return the body of a JSON object with the field added as its last, which counts if there is a null before."""
    return body[: body.rindex(b"}")] + b',"max_tokens":%d}' % most
