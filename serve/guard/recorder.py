"""Writes down requests that were let in, for `qvl bench --traffic`: where `qvl serve --record` asks for it.

A line a request, in the order in which they ended: when it came (``at``, seconds since 1970), its messages, and how
many tokens its answer had. Never a key, an address, a header, or an answer. Requests without an answer are left out,
and those with videos, which nothing replays.

Texts are hashed unless they are to be kept, with a key that is made at the start and forgotten at the end: within one
run of the server equal texts have equal hashes, and nobody can try out which text a hash stands for. Images likewise.

All of it happens in a thread of its own, behind the request: a full disk or a slow one never holds a request up.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybase64

from serve.http.logs import line, write
from serve.settings.environment import RECORD
from serve.settings.recording import MIB, Recording

__all__ = ["TRACE", "Recorder"]

TRACE = "trace.jsonl"
IMAGES = "images"
#: Requests that wait to be written down, at most: each holds its images in memory until then.
WAITING = 32
#: Roles as a manifest knows them; what tools say comes from the user's side.
_ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}
#: EXIF orientations that turn an image on its side.
_TURNED = (5, 6, 7, 8)
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff"}

Told = dict[str, Any] | None


class Recorder:
    """Keeps a trace in a directory, readable by its owner alone."""

    def __init__(self, settings: Recording) -> None:
        if settings.record is None:
            raise ValueError("a recorder without a directory")
        self._settings = settings
        self._directory = settings.record
        self._key = secrets.token_bytes(32)
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._slots = threading.BoundedSemaphore(WAITING)
        self._stopped = self._dropped = False
        self._used: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Recorder | None:
        """Return a recorder where one is asked for. Raises ServerError for a variable that can't be read."""
        return cls(Recording.loads(environment[RECORD])) if RECORD in environment else None

    def begin(self, messages: Any) -> Future[Told] | None:
        """Take note of a checked request to /v1/chat/completions that comes now; None where it is not written down."""
        if self._stopped:
            return None
        if not self._slots.acquire(blocking=False):
            self._say_dropped()
            return None
        return self._thread.submit(self._tell, messages or [], time.time())

    def end(self, begun: Future[Told] | None, output_tokens: int | None) -> None:
        """Write a request down whose answer has ended; None: there was none."""
        if begun is not None:
            self._thread.submit(self._write, begun, output_tokens)

    def close(self) -> None:
        """Write down what waits, and end."""
        self._thread.shutdown()

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _tell(self, messages: list[Any], at: float) -> Told:
        """Return what is written down of a request; None for one that can't be replayed."""
        try:
            if any(part.get("type") == "video_url" for message in messages for part in _parts(message)):
                return None
            told = [self._message(message) for message in messages]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._fail(error)
            return None
        return {"at": round(at, 6), "messages": told}

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        parts = [self._part(part) for part in _parts(message)]
        return {"role": _ROLES.get(str(message.get("role")), "user"), "content": parts}

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image_url":
            return self._image(part["image_url"]["url"])
        text = part["text"]
        if self._settings.record_texts == "kept":
            return {"type": "text", "text": text}
        return {"type": "text", "hash": self._hash(text.encode()), "characters": len(text)}

    def _image(self, url: str) -> dict[str, Any]:
        """Its size and a hash, or where it is kept."""
        from PIL import Image

        data = pybase64.b64decode(url.partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            (width, height), suffix = image.size, _SUFFIXES.get(image.format or "", ".img")
            if image.getexif().get(0x0112) in _TURNED:
                width, height = height, width
        if self._settings.record_images == "size":
            return {"type": "image", "hash": self._hash(data), "width": width, "height": height}
        name = f"{hashlib.sha256(data).hexdigest()}{suffix}"
        file = self._directory / IMAGES / name
        if not file.exists():
            self._room(len(data))
            file.parent.mkdir(mode=0o700, exist_ok=True)
            part = file.with_name(f".{name}.{os.getpid()}")
            _append(part, data)
            part.rename(file)
        return {"type": "image", "image": f"{IMAGES}/{name}"}

    def _hash(self, data: bytes) -> str:
        return hashlib.blake2b(data, key=self._key, digest_size=16).hexdigest()

    def _write(self, begun: Future[Told], output_tokens: int | None) -> None:
        self._slots.release()
        told = begun.result()
        if told is None or output_tokens is None or self._stopped:
            return
        data = json.dumps(told | {"output_tokens": output_tokens}, ensure_ascii=False).encode() + b"\n"
        try:
            self._room(len(data))
            _append(self._directory / TRACE, data)
        except OSError as error:
            self._fail(error)

    def _room(self, size: int) -> None:
        """Count bytes that are about to be written. Raises OSError where they are too many."""
        if self._used is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._used = sum(file.stat().st_size for file in self._directory.rglob("*") if file.is_file())
        self._used += size
        if self._used > self._settings.record_limit * MIB:
            raise OSError(0, f"{self._directory} has reached --record-limit {self._settings.record_limit} MiB")

    def _fail(self, error: Exception) -> None:
        """What can't be written ends the recording; a request that can't be read is left out."""
        if isinstance(error, OSError) and not self._stopped:
            self._stopped = True
            write(line("warning", "qvl.record", f"requests are no longer recorded: {error.strerror or error}"))

    def _say_dropped(self) -> None:
        if not self._dropped:
            self._dropped = True
            write(line("warning", "qvl.record", "requests come faster than they can be recorded: some are left out"))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content; calls of tools as a text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    calls = message.get("tool_calls")
    return [*parts, {"type": "text", "text": json.dumps(calls)}] if calls else list(parts)


def _append(file: Path, data: bytes) -> None:
    """Append to a file that the owner alone can read, in one piece, and through no link. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
