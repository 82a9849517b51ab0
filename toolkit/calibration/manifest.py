"""A calibration manifest: a JSONL file of chats, read and checked line by line.

A line is one sample: ``{"messages": [...]}`` in OpenAI's form (``image_url`` parts) or Qwen's (``image``/``video``
parts), a bare list of messages, or ``{"text": "..."}``. Images are paths (relative to the manifest), ``file://`` or
``http(s)://`` URLs, or data URLs; videos are a list of frames or a file.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ManifestError

__all__ = ["CalibrationSample", "read_manifest"]

#: Keys of a vision part that qwen-vl-utils understands and that are passed through.
_VISION_SETTINGS = (
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "resized_height",
    "resized_width",
    "sample_fps",
    "raw_fps",
)
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class CalibrationSample:
    """One chat in Qwen's form; media are still references, opened by `toolkit.calibration.inputs.prepare`.

    ``where`` names file and line for error messages; ``base`` is the directory that relative paths start from.
    """

    messages: list[dict[str, Any]]
    where: str
    base: Path


def read_manifest(path: Path, samples: int | None = None, seed: int = 0) -> list[CalibrationSample]:
    """Read a JSONL manifest and check the form of every line.

    With ``samples`` below the number of lines, a seeded draw is taken, in the file's order.

    Raises:
        ManifestError: the file is missing, empty or has a malformed line; the message names file and line.
    """
    path = Path(path)
    if path.is_dir():
        raise ManifestError(f"{path} is a directory; a calibration manifest is a JSONL file, one chat a line")
    if not path.is_file():
        raise ManifestError(f"no calibration manifest at {path}: give a JSONL file of chats, or --calib demo")
    found: list[CalibrationSample] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_read_line(line, f"{path}:{number}", path.parent))
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): is it a JSONL file?"
        ) from None
    if not found:
        raise ManifestError(f"{path} has no samples: write one JSON object with a 'messages' list per line")
    if samples is not None and samples < len(found):
        keep = sorted(random.Random(seed).sample(range(len(found)), samples))
        found = [found[i] for i in keep]
    return found


def _read_line(line: str, where: str, base: Path) -> CalibrationSample:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if isinstance(data, dict) and isinstance(data.get("text"), str):
        messages: Any = [{"role": "user", "content": data["text"]}]
    else:
        messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list) or not messages:
        raise ManifestError(f"{where}: expected a non-empty 'messages' list (or a 'text' string)")
    return CalibrationSample([_read_message(m, where) for m in messages], where, base)


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ManifestError(f"{where}: every message needs a 'role' of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ManifestError(f"{where}: a message's 'content' is a string or a list of parts")
    return {"role": message["role"], "content": [_read_part(p, where) for p in content]}


def _read_part(part: Any, where: str) -> dict[str, Any]:
    """Turn one content part, OpenAI's or Qwen's, into Qwen's form."""
    if not isinstance(part, dict):
        raise ManifestError(f"{where}: a content part must be an object, found {type(part).__name__}")
    settings = {k: part[k] for k in _VISION_SETTINGS if k in part}
    for kind in ("image", "video"):
        url = part.get(f"{kind}_url")
        media = part.get(kind) if url is None else url.get("url") if isinstance(url, dict) else url
        if media is None:
            continue
        if kind == "video" and isinstance(media, list):
            if not media or not all(isinstance(m, str) for m in media):
                raise ManifestError(f"{where}: a video given as frames needs a list of image paths or URLs")
        elif not isinstance(media, str) or not media:
            raise ManifestError(f"{where}: an {kind} part needs a path or URL")
        return {"type": kind, kind: media, **settings}
    if isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise ManifestError(
        f"{where}: unknown content part of type {part.get('type')!r}; use text, image(_url) or video(_url)"
    )
