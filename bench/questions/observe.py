"""What a server answers, and what it thinks of another's answer.

Each item is answered greedily. Then the server is made to read an answer, its own or the baseline's: a chat that ends
with it, of which the server returns the log-probabilities of the prompt's tokens (``prompt_logprobs``, which vLLM has).
What is read is aligned by token ids with what was generated; what does not agree is marked and not used.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from bench.load.client import Failure
from bench.load.endpoint import Endpoint, http_client
from bench.questions.tasks import ImageData, Question, check_image
from toolkit.errors import BenchError, MediaError

__all__ = [
    "IMAGE_PROMPT",
    "Answer",
    "Item",
    "Observation",
    "Observed",
    "Observing",
    "Position",
    "digest",
    "items_from_images",
    "items_from_questions",
    "observe",
]

#: What is asked about images that come without a question.
IMAGE_PROMPT = "Describe this picture."
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
#: Ends of an answer that is not whole.
BROKEN_OFF = ("abort", "error", "content_filter")
#: Statuses that mean "not like this", not "not now" or "not you".
REFUSALS = (400, 404, 405, 422, 501)
T = TypeVar("T")


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt about images.

    Attributes:
        id: unique.
        text: the prompt, which follows the images.
        images: in their order.
        cluster: items with the same one are resampled together: they share an image, or a document.
    """

    id: str
    text: str
    images: tuple[ImageData, ...] = ()
    cluster: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """Return the chat that asks it."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image.data_url()}} for image in self.images
        ]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]


def digest(items: Sequence[Item]) -> str:
    """Return a SHA-256 over the prompts and images."""
    whole = hashlib.sha256()
    for item in items:
        for part in (item.text, *(image.sha256 for image in item.images)):
            whole.update(part.encode() + b"\0")
    return whole.hexdigest()


def items_from_questions(questions: Sequence[Question]) -> list[Item]:
    """Return what the questions ask; their right answers are not needed."""
    return [Item(each.id, each.question, each.images, each.cluster_id) for each in questions]


def items_from_images(directory: Path, prompt: str = IMAGE_PROMPT) -> list[Item]:
    """Return an item for each JPEG, PNG and WebP file under ``directory``, at any depth, in the order of their paths.

    Hidden files are left out. An item's id is the file's path in the directory; each file is decoded once.

    Raises:
        MediaError: there is no such directory, no image in it, or a file that is no readable image (names it).
    """
    if not directory.is_dir():
        raise MediaError(f"{directory}: no such directory of images; give one with .jpg, .png or .webp files")
    items = []
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside.parts) or path.is_dir():
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MediaError(f"{path} can't be read: {error.strerror}") from error
        image = check_image(data, str(directory), inside.as_posix(), path)
        items.append(Item(inside.as_posix(), prompt, (image,), image.sha256))
    if not items:
        raise MediaError(f"{directory}: no images in it; looked for {', '.join(SUFFIXES)} files at any depth")
    return items


# --- what a system said -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: special tokens shown, where the server can; the token that ended the answer left out.
        finish_reason: ``stop`` or ``length``.
        tokens: ids, the one that ended the answer included; None when the server does not tell.
        pieces: the bytes of each token; None when the server returns no ``logprobs``.
        prompt: ids of the prompt with its image placeholders; None when the server does not tell.
    """

    text: str
    finish_reason: str | None = None
    tokens: tuple[int, ...] | None = None
    pieces: tuple[bytes, ...] | None = None
    prompt: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """What a system expected where the baseline's answer has ``token``.

    Attributes:
        token: id.
        text: of the token alone; not valid text by itself where it holds a part of a character.
        logprobs: nats by token id: of the k likeliest tokens and of ``token``.
    """

    token: int
    text: str
    logprobs: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one system did with one item.

    Attributes:
        answer: its own; None when the request failed.
        positions: the baseline's answer as it read it, a position a token; None when that failed or is not to be had.
        failure: of the first request that failed. Kinds are those of `bench.load.client.Failure` and ``mismatch``: the
            server split the answer into other tokens than the baseline generated.
    """

    answer: Answer | None = None
    positions: tuple[Position, ...] | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What one system did with all items, by item id; ``missing``: why nothing was read, None when it was."""

    items: Mapping[str, Observation]
    missing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observing:
    """How items are observed.

    Attributes:
        top_k: likeliest tokens per position; vLLM allows 20 unless started with ``--max-logprobs``.
        max_tokens: longest answer, in tokens.
        concurrency: requests in flight.
        timeout_s: seconds that a request may take.
    """

    top_k: int = 20
    max_tokens: int = 64
    concurrency: int = 4
    timeout_s: float = 120.0


async def observe(
    endpoint: Endpoint,
    items: Sequence[Item],
    how: Observing,
    *,
    reference: Observed | None = None,
    on_done: Callable[[], None] = lambda: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Observed:
    """Have a server answer every item, and read the reference's answers.

    Two requests an item and a small one before them, which finds out what the server can do. Failed requests are marked
    and not repeated; items whose reference failed are left out.

    Args:
        reference: the baseline; None reads the system's own answers.
        on_done: called after each item, those left out included.

    Raises:
        BenchError: a setting that makes no sense.
    """
    _check(items, how)
    found: dict[str, Observation] = {}
    waiting = iter(items)
    async with http_client(
        endpoint.url, endpoint.api_key, timeout_s=how.timeout_s, connections=how.concurrency, transport=transport
    ) as http:
        reader = await _meet(http, endpoint.model, how.top_k, how.max_tokens)

        async def work() -> None:
            for item in waiting:
                before = reference.items.get(item.id) if reference else None
                if reference is None or (before and before.answer):
                    found[item.id] = await reader.observe(item, before.answer if before else None)
                on_done()

        await asyncio.gather(*(work() for _ in range(min(how.concurrency, len(items)))))
    return Observed(found, reader.missing)


def _check(items: Sequence[Item], how: Observing) -> None:
    if not items:
        raise BenchError("nothing to ask: give images or questions")
    if len({item.id for item in items}) < len(items):
        raise BenchError("two items have the same id; ids are unique")
    for name, value in (("top_k", how.top_k), ("max_tokens", how.max_tokens), ("concurrency", how.concurrency)):
        if value < 1:
            raise BenchError(f"{name} {value}: must be at least 1")


class _MalformedError(Exception):
    """A 200 that is not what was asked for."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """Asks one server, in as much of vLLM's dialect as it understands.

    ``vllm`` sends vLLM's own fields, ``logprobs`` asks for tokens; ``missing`` says why answers can't be read.
    """

    http: httpx.AsyncClient
    model: str
    top_k: int
    max_tokens: int
    vllm: bool = True
    logprobs: bool = True
    missing: str | None = None

    async def observe(self, item: Item, reference: Answer | None) -> Observation:
        """Answer ``item``, then read the reference, or else that answer."""
        try:
            messages = item.messages()
        except MediaError as error:
            return Observation(failure=Failure("client", str(error)))
        answer = await self.answer(messages)
        if isinstance(answer, Failure):
            return Observation(failure=answer)
        target = reference or answer
        if self.missing or target.tokens is None:
            return Observation(answer)
        positions = await self.read(messages, answer, target)
        if isinstance(positions, Failure):
            return Observation(answer, failure=positions)
        return Observation(answer, positions)

    async def answer(self, messages: list[dict[str, Any]]) -> Answer | Failure:
        """Answer greedily."""
        body: dict[str, Any] = {"messages": messages, "max_tokens": self.max_tokens}
        if self.logprobs:
            body["logprobs"] = True
        if self.vllm:
            # Special tokens are shown, so that the text stands for all the tokens; a model's own defaults
            # (generation_config.json) may hold a penalty, under which the likeliest token is not what comes.
            body |= {"return_token_ids": True, "skip_special_tokens": False, "spaces_between_special_tokens": False}
            body |= {"repetition_penalty": 1.0}
        return await self._post(body, _answer)

    async def read(self, messages: list[dict[str, Any]], own: Answer, target: Answer) -> tuple[Position, ...] | Failure:
        """Return what the server expected at each token of ``target``; ``own`` is its own answer to ``messages``."""
        # A whole assistant's message, its end included: whether the model would stop there counts too.
        chat = [*messages, {"role": "assistant", "content": target.text}]
        body = {"messages": chat, "max_tokens": 1, "add_generation_prompt": False, "return_token_ids": True}
        return await self._post(
            body | {"prompt_logprobs": self.top_k}, lambda response: _positions(response, own.prompt, target)
        )

    async def _post(self, body: dict[str, Any], parse: Callable[[Any], T]) -> T | Failure:
        """Send the request and return what ``parse`` makes of the response's JSON, or why there is none."""
        try:
            response = await self.http.post(
                "/v1/chat/completions", json={"model": self.model, "temperature": 0, **body}
            )
        except httpx.TimeoutException as error:
            return Failure("timeout", f"no answer in time ({type(error).__name__})")
        except httpx.HTTPError as error:
            return Failure("connect", f"{type(error).__name__}: {error}".rstrip(": "))
        if response.status_code != 200:
            said = _error_text(response)
            return Failure("http", f"HTTP {response.status_code}: {said}".rstrip(": "), response.status_code)
        try:
            return parse(response.json())
        except _MalformedError as error:
            return Failure("malformed", str(error))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            return Failure("malformed", f"not a chat completion ({type(error).__name__}: {error})")


async def _meet(http: httpx.AsyncClient, model: str, top_k: int, max_tokens: int) -> _Reader:
    """Find out by a small request what the server understands. What fails for other reasons will fail again, item by
    item, and is marked there."""
    hello = [{"role": "user", "content": "Hello"}]
    reader = _Reader(http, model, top_k, max_tokens)
    read = await reader.read(hello, Answer("", prompt=()), Answer("Hello", tokens=()))
    why = None
    if isinstance(read, Failure):
        if read.status in REFUSALS:
            why = f"the server refuses prompt_logprobs={top_k} ({read.message})"
        elif read.kind == "malformed":
            why = f"the server returns no prompt_logprobs, as vLLM does ({read.message})"
    for vllm, logprobs in ((True, True), (False, True), (False, False)):
        reader = _Reader(http, model, top_k, max_tokens, vllm, logprobs, why)
        answer = await _Reader(http, model, top_k, 1, vllm, logprobs).answer(hello)
        if not (isinstance(answer, Failure) and answer.status in REFUSALS):
            return reader
    return reader


def _error_text(response: httpx.Response) -> str:
    try:
        said = response.json()
        said = said.get("error") or said.get("detail") or said
        said = said.get("message") or said if isinstance(said, dict) else said
    except (ValueError, AttributeError, RecursionError):
        said = response.text
    return " ".join(str(said).split())[:300]


def _answer(response: dict[str, Any]) -> Answer:
    choice = response["choices"][0]
    listed = (choice.get("logprobs") or {}).get("content")
    tokens, prompt = choice.get("token_ids"), response.get("prompt_token_ids")
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise _MalformedError("the answer is not a text")
    if choice.get("finish_reason") in BROKEN_OFF:
        raise _MalformedError(f"the server broke its answer off ({choice['finish_reason']})")
    return Answer(
        text=text,
        finish_reason=choice.get("finish_reason"),
        tokens=None if tokens is None else tuple(map(int, tokens)),
        pieces=None if listed is None else tuple(map(_piece, listed)),
        prompt=None if prompt is None else tuple(map(int, prompt)),
    )


def _piece(entry: dict[str, Any]) -> bytes:
    known = entry.get("bytes")
    return str(entry["token"]).encode() if known is None else bytes(known)


def _positions(
    response: dict[str, Any], prompt: tuple[int, ...] | None, target: Answer
) -> tuple[Position, ...] | Failure:
    """Return the positions of ``target``'s tokens, which must follow ``prompt``."""
    ids, listed = response.get("prompt_token_ids"), response.get("prompt_logprobs")
    if listed is None or ids is None:
        absent = "prompt_logprobs" if listed is None else "prompt_token_ids"
        raise _MalformedError(f"there is no {absent} in its response")
    if prompt is None or target.tokens is None:
        raise _MalformedError("there are no token ids in the response to a question")
    if len(listed) != len(ids):
        raise _MalformedError(f"{len(listed)} prompt_logprobs for {len(ids)} tokens")
    start = len(prompt)
    if tuple(ids[:start]) != prompt:
        return Failure("mismatch", "before the answer, the chat does not hold the prompt that was answered")
    if tuple(ids[start : start + len(target.tokens)]) != target.tokens:
        return Failure("mismatch", "read again, the answer's text makes other tokens than were generated")
    found = []
    for token, entries in zip(target.tokens, listed[start:], strict=False):
        logprobs = {int(key): float(entry["logprob"]) for key, entry in entries.items()}
        if token not in logprobs or not all(value <= 1e-3 and math.isfinite(value) for value in logprobs.values()):
            raise _MalformedError("prompt_logprobs that are no log-probabilities of the prompt")
        found.append(Position(token, str(entries[str(token)].get("decoded_token") or ""), logprobs))
    return tuple(found)
