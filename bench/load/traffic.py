"""Requests of the user's own: a manifest of chats, a directory of images, or a trace that `qvl serve --record` wrote.

A manifest is what calibration reads (`toolkit.calibration.manifest`), without videos. A trace is one whose lines have
two more keys: ``at``, when the request came, in seconds, and ``output_tokens``, how long its answer was. Where a trace
says no more of a text than a hash and its length, and of an image than a hash and its size, a text and an image like
that are made: equal hashes get equal ones, so that what requests shared they share again.

A server that has answered the same before answers from its caches. So each pass through the file has marks of its own:
eight words at the beginning of each chat, a square of 24 x 24 pixels in a corner of each image. Within a pass
what is shared stays shared, as in the user's traffic; from pass to pass, and from block to block, nothing is.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from bench.load.client import ChatRequest
from bench.load.inputs import KEY_WORDS, Made, SpeedInputs, image_of, stamped, words_of
from bench.load.workload import PIXELS_MAX, ImageSize, Lengths
from toolkit.calibration import media
from toolkit.calibration.manifest import sample_of
from toolkit.errors import BenchError, ManifestError, MediaError

__all__ = ["TRACE", "Chat", "Traffic", "TrafficInputs", "read"]

#: The file of a trace, in the directory that `qvl serve --record` was given.
TRACE = "trace.jsonl"
#: Files of a directory of images.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
#: A warm-up has images of so many sizes, the most frequent ones.
WARM_SIZES = 4
#: Longest answer that a trace may ask for.
LONGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a request.

    Attributes:
        source: its file, or a data URL; empty: it is to be made.
        key: what tells it from others: the SHA-256 of its bytes.
        size: as the server will see it: width, height in pixels.
    """

    source: str
    key: bytes
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat: messages up to a user's last.

    Attributes:
        messages: in OpenAI's form, but that an image is a `ImageRef`.
        at: seconds since the first of the trace; None: not a trace.
        output_tokens: how long its answer was, at least 2; None: not known.
    """

    messages: tuple[dict[str, Any], ...]
    at: float | None = None
    output_tokens: int | None = None

    @property
    def turns(self) -> list[int]:
        """Of each user's turn, how many messages there are to its end."""
        return [number for number, message in enumerate(self.messages, 1) if message["role"] == "user"]


@dataclass(frozen=True)
class Traffic:
    """The requests, in the order of the file, of a trace in the order of their times.

    Attributes:
        source: where they are from, for people.
        digest: SHA-256 of what was read: equal for equal traffic.
    """

    chats: tuple[Chat, ...]
    source: str
    digest: str

    @cached_property
    def timed(self) -> bool:
        """Whether it is known when each came."""
        return all(chat.at is not None for chat in self.chats)

    @cached_property
    def tells_lengths(self) -> bool:
        """Whether it is known how long each answer was."""
        return all(chat.output_tokens is not None for chat in self.chats)

    def stretch(self, number: int, of: int) -> Traffic:
        """Return one of ``of`` stretches that follow each other, of as many chats each.

        Raises:
            BenchError: there are fewer chats than stretches.
        """
        count = len(self.chats)
        if count < of:
            raise BenchError(f"{self.source}: {count} requests can't be shared out over {of} rounds; lower --rounds")
        return replace(self, chats=self.chats[number * count // of : (number + 1) * count // of])

    def due(self, speed: float) -> tuple[float, ...]:
        """Return when its requests are due, in seconds since its first, ``speed`` times as fast as they came."""
        moments = [chat.at or 0.0 for chat in self.chats]
        return tuple((moment - moments[0]) / speed for moment in moments)


def read(path: Path, prompt: str) -> Traffic:
    """Read a manifest, a trace (its file or directory) or a directory of images, and look at every image.

    Args:
        prompt: what is asked about each image of a directory.

    Raises:
        QvlError: there is nothing, or what there is can't be a load; it names the line or the file.
    """
    if path.is_dir() and not (path / TRACE).exists():
        return _images(path, prompt)
    file = path / TRACE if path.is_dir() else path
    if not file.is_file():
        raise ManifestError(f"--traffic {path}: no such file; give a JSONL file of chats or a directory of images")
    reader = _Reader(file.parent)
    chats = [reader.chat(data, where) for data, where in _lines(file)]
    if not chats:
        raise ManifestError(f"{file} holds no request: write one JSON object with a 'messages' list a line")
    timed = sum(chat.at is not None for chat in chats)
    if 0 < timed < len(chats):
        raise ManifestError(f"{file}: {timed} of {len(chats)} lines have 'at': give it in all of them, or in none")
    if timed:
        chats.sort(key=lambda chat: chat.at or 0.0)
        first = chats[0].at or 0.0
        chats = [replace(chat, at=(chat.at or 0.0) - first) for chat in chats]
    kind = "recorded requests" if timed else "chats"
    return Traffic(tuple(chats), f"{len(chats)} {kind} of {path.name}", reader.digest.hexdigest())


def _lines(file: Path) -> Iterator[tuple[Any, str]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}:{number}"
                    try:
                        yield json.loads(line), where
                    except ValueError as error:
                        raise ManifestError(f"{where}: not JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _images(directory: Path, prompt: str) -> Traffic:
    files = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    if not files:
        raise MediaError(f"--traffic {directory}: no {TRACE} and no images in it ({', '.join(SUFFIXES)})")
    reader = _Reader(directory)
    chats = []
    for file in files:
        message = [{"type": "image", "image": str(file)}, {"type": "text", "text": prompt}]
        chats.append(reader.chat([{"role": "user", "content": message}], str(directory)))
    return Traffic(tuple(chats), f"{len(chats)} images of {directory.name}", reader.digest.hexdigest())


# --- a line -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads lines of one file.

    Attributes:
        digest: SHA-256 of what was read so far.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.digest = hashlib.sha256()
        self._seen: dict[str, ImageRef] = {}

    def chat(self, data: Any, where: str) -> Chat:
        """Return a line's chat. Raises QvlError."""
        at = output = None
        if isinstance(data, dict):
            data = dict(data)
            at, output = data.pop("at", None), data.pop("output_tokens", None)
            data = _told(data, where)
        if at is not None and (not isinstance(at, int | float) or isinstance(at, bool) or not math.isfinite(at)):
            raise ManifestError(f"{where}: 'at' must be a number of seconds, found {at!r}")
        if output is not None and (type(output) is not int or not 0 <= output <= LONGEST):
            raise ManifestError(f"{where}: 'output_tokens' must be a whole number up to {LONGEST:,}, found {output!r}")
        messages = [self._message(message, where) for message in sample_of(data, where, self.base).messages]
        messages = [message for message in messages if message["content"]]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise ManifestError(f"{where}: no user's message: there is nothing to ask")
        self.digest.update(repr([*map(_plain, messages), at, output]).encode())
        return Chat(tuple(messages), at, None if output is None else max(2, output))

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                extra = next((key for key in part if key not in ("type", "image")), None)
                if extra:
                    raise ManifestError(f"{where}: {extra} can't be asked of a server; scale the image instead")
                content.append({"type": "image", "image": self._image(part["image"], where)})
            elif part["type"] == "video":
                raise ManifestError(f"{where}: a video; a load is made of texts and images: give frames as images")
            elif part["text"]:
                content.append(part)
        return {"role": message["role"], "content": content}

    def _image(self, reference: str, where: str) -> ImageRef:
        """Look at an image, once."""
        if reference not in self._seen:
            self._seen[reference] = _made_image(reference, where) or self._look(reference, where)
        return self._seen[reference]

    def _look(self, reference: str, where: str) -> ImageRef:
        data = media.read(reference, self.base, where)
        shown = media.as_shown(media.decode(data, where, media.shorten(reference)))
        source = reference
        if media.is_url(reference):
            source = f"data:;base64,{base64.b64encode(data).decode()}"
        elif not reference.startswith("data:"):
            source = str(media.local_path(reference, self.base))
        return ImageRef(source, hashlib.sha256(data).digest(), shown.size)


def _told(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a line with texts and images in the place of what a trace tells of them."""
    messages = data.get("messages")
    if not isinstance(messages, list):
        return data
    found = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message = message | {"content": [_part(part, where) for part in message["content"]]}
        found.append(message)
    return data | {"messages": found}


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, dict) or "hash" not in part:
        return part
    kind, key = part.get("type"), part["hash"]
    try:
        if kind == "text":
            return {"type": "text", "text": _like(str(key), int(part["characters"]))}
        if kind == "image":
            return {"type": "image", "image": f"{_MADE}{int(part['width'])}x{int(part['height'])}:{key}"}
    except (KeyError, ValueError, TypeError) as error:
        raise ManifestError(f"{where}: of a hashed {kind} something is missing ({error!r})") from None
    raise ManifestError(f"{where}: a hash stands for a text or an image, not for {kind!r}")


#: How an image that is to be made is written until it is one; no path holds this character.
_MADE = "\0made:"


def _like(key: str, characters: int) -> str:
    """Return a text of about as many characters, equal for equal keys: words, each a token."""
    if characters <= 0:
        return ""
    # The words have 4.2 letters in the mean, and a blank.
    digest = hashlib.sha256(key.encode()).digest()
    return words_of(digest, math.ceil(characters / 5) + KEY_WORDS)[:characters].strip() or "a"


def _made_image(reference: str, where: str) -> ImageRef | None:
    """Return the image that a trace tells the size of; None: the reference is one."""
    if not reference.startswith(_MADE):
        return None
    size, _, key = reference.removeprefix(_MADE).partition(":")
    width, height = (int(side) for side in size.split("x"))
    if not 1 <= min(width, height) <= max(width, height) <= PIXELS_MAX:
        raise ManifestError(f"{where}: an image of {width} x {height}; each side must be 1 to {PIXELS_MAX} pixels")
    return ImageRef("", key.encode(), (width, height))


def _plain(message: dict[str, Any]) -> list[Any]:
    parts = [part["image"].key if part["type"] == "image" else part["text"] for part in message["content"]]
    return [message["role"], *parts]


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrafficInputs:
    """Makes requests of a `Traffic`; `bench.load.inputs.Inputs`.

    A block begins somewhere in the file, the same place for both systems, and goes on from its beginning at its end.

    Attributes:
        nonce: different in every run.
        output_tokens: exact length of an answer where the traffic does not say.
        whole: blocks begin at the first chat.
    """

    nonce: str
    traffic: Traffic
    output_tokens: Lengths
    whole: bool = False

    @cached_property
    def turns(self) -> int:
        """Most turns of a chat."""
        return max(len(chat.turns) for chat in self.traffic.chats)

    def made(self, block: str, count: int, *, chats: bool = False) -> list[Made]:
        """See `bench.load.inputs.Inputs.made`."""
        known, found = self.traffic.chats, list[Made]()
        start = 0 if self.whole else int.from_bytes(self._digest(block)[:8], "big") % len(known)
        number = 0
        while len(found) < count:
            passed, at = divmod(start + number, len(known))
            chat, marks = known[at], self._digest(f"{block}/{passed}")
            ends = chat.turns if chats else chat.turns[-1:]
            length = chat.output_tokens or self.output_tokens.at(_share(self._digest(f"{block}/length/{number}")))
            for turn, end in enumerate(ends):
                found.append(_made(chat.messages[:end], marks, length, follows=turn > 0))
            number += 1
        return found[:count]

    def warm_up(self, block: str = "warm-up") -> list[Made]:
        """See `bench.load.inputs.Inputs.warm_up`: made images of the traffic's most frequent sizes, as many a request
        as at most, and a text as long as its longest."""
        parts = [part for chat in self.traffic.chats for message in chat.messages for part in message["content"]]
        sizes = Counter(part["image"].size for part in parts if part["type"] == "image")
        images = [len(_images_of(chat.messages)) for chat in self.traffic.chats]
        shown: tuple[ImageSize, ...] = tuple(size for size, _ in sizes.most_common(WARM_SIZES))
        longest = max(_characters(chat.messages) for chat in self.traffic.chats)
        made = SpeedInputs(
            self.nonce,
            shown or (None,),
            self.output_tokens,
            Lengths.fixed(max(KEY_WORDS, longest // 5)),
            Lengths.fixed(max(1, *images) if images else 1),
        ).warm_up(block)
        texts = SpeedInputs(self.nonce, (None,), self.output_tokens).warm_up(f"{block}/text")
        return [*made, *(texts if shown and 0 in images else [])]

    def _digest(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.nonce}/{text}".encode()).digest()


def _share(digest: bytes) -> float:
    """Return a number in [0, 1)."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _images_of(messages: Sequence[dict[str, Any]]) -> list[ImageRef]:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def _characters(messages: Sequence[dict[str, Any]]) -> int:
    return sum(len(part["text"]) for message in messages for part in message["content"] if part["type"] == "text")


def _made(messages: Sequence[dict[str, Any]], marks: bytes, length: int, *, follows: bool) -> Made:
    """Return a request for the last of ``messages``, with the marks of its pass."""
    words, said = words_of(marks, KEY_WORDS), []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                content.append({"type": "image_url", "image_url": {"url": _marked(part["image"], marks)}})
            else:
                text = part["text"] if words == "" else f"{words} {part['text']}"
                content.append({"type": "text", "text": text})
                words = ""
        said.append({"role": message["role"], "content": content})
    if words:  # no text at all
        said[0]["content"].append({"type": "text", "text": words})
    images = _images_of(messages)
    shape = "text" if not images else "1 image" if len(images) == 1 else f"{len(images)} images"
    sizes = tuple(image.size for image in images)
    return Made(ChatRequest("", (), length, fixed_length=True, before=tuple(said)), shape, sizes, follows)


@lru_cache(maxsize=64)
def _marked(ref: ImageRef, marks: bytes) -> str:
    """Return an image as a data URL, with the marks of its pass in a corner, in its own format where that can be."""
    key = hashlib.sha256(marks + ref.key).digest()
    if not ref.source:
        return image_of(key, 0, ref.size)
    image = Image.open(io.BytesIO(media.read(ref.source, Path(), ref.source[:80])))
    kind = image.format if image.format in ("PNG", "WEBP") else "JPEG"
    buffer = io.BytesIO()
    settings: dict[str, Any] = {} if kind == "PNG" else {"quality": 90}
    stamped(media.as_shown(image), key).save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
