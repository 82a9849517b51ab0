"""A calibration manifest: a JSONL file of chats, read and checked line by line.

A line is one sample: ``{"messages": [...]}`` in OpenAI's form (``image_url`` parts) or Qwen's (``image``/``video``
parts), a bare list of messages, ``{"text": "..."}``, or what other tools write (`toolkit.calibration.forms`). A key
that is not understood is refused. Images are paths (relative to the manifest), ``file://`` or ``http(s)://`` URLs, or
data URLs; videos are a list of frames or a file.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.calibration.forms import messages_of, refuse_unknown
from toolkit.errors import ManifestError

__all__ = ["CalibrationSample", "read_manifest", "sample_of"]

#: Whole numbers that a vision part may set; the first four an image, all a video.
_COUNTS = (
    "min_pixels",
    "max_pixels",
    "resized_height",
    "resized_width",
    "total_pixels",
    "nframes",
    "min_frames",
    "max_frames",
)
#: Frames a second that a video part may set.
_RATES = ("fps", "sample_fps", "raw_fps")
_IMAGE_SETTINGS, _VIDEO_SETTINGS = _COUNTS[:4], (*_COUNTS, *_RATES)
#: Tokens that the chat template writes. In a text they would be read as an image or a turn that is not there.
_TEMPLATE_TOKEN = re.compile(r"<\|(?:(?:image|video|vision)_pad|vision_(?:start|end)|im_(?:start|end))\|>")
#: Qwen-VL's own way of naming an image within a text.
_INLINE_IMAGE = re.compile(r"<img>[^<]*</img>")
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
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not found and line.lstrip().startswith("["):
                    _refuse_array(path)
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


def _refuse_array(path: Path) -> None:
    """Raise if the whole file is one JSON array of samples. A line that is a list of messages is a sample."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:  # several lines, or broken ones, which are named when they are read
        return
    if isinstance(whole, list) and not all(isinstance(one, dict) and "role" in one for one in whole):
        raise ManifestError(
            f"{path}:1: a JSON array; a manifest is JSONL, one chat a line. Convert it: "
            f"jq -c '.[]' {path.name} > {path.stem}.jsonl"
        )


def _read_line(line: str, where: str, base: Path) -> CalibrationSample:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    return sample_of(data, where, base)


def sample_of(data: Any, where: str, base: Path) -> CalibrationSample:
    """Return the sample that a line's JSON stands for.

    Args:
        data: the line, parsed.
        where: file and line, for messages.
        base: the directory that relative paths start from.

    Raises:
        ManifestError: it is none; the message begins with ``where``.
    """
    messages = messages_of(data, where)
    if not messages:
        raise ManifestError(f"{where}: expected a non-empty 'messages' list (or a 'text' string)")
    return CalibrationSample([_read_message(m, where) for m in messages], where, base)


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ManifestError(f"{where}: every message needs a 'role' of {', '.join(_ROLES)}")
    refuse_unknown(message, ("role", "content"), "a message", where)
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
    for kind, settings in (("image", _IMAGE_SETTINGS), ("video", _VIDEO_SETTINGS)):
        key = next((key for key in (f"{kind}_url", kind) if part.get(key) is not None), None)
        if key is None or part.get("type", kind) not in (kind, f"{kind}_url"):
            continue
        refuse_unknown(part, ("type", key, *settings), f"{'an' if kind == 'image' else 'a'} {kind} part", where)
        return {"type": kind, kind: _reference(part[key], kind, where), **_settings(part, settings, where)}
    if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        refuse_unknown(part, ("type", "text"), "a text part", where)
        token = _TEMPLATE_TOKEN.search(part["text"])
        if token:
            raise ManifestError(
                f"{where}: a text holds {token[0]}, which only the chat template writes: "
                "give images as parts, turns as messages"
            )
        inline = _INLINE_IMAGE.search(part["text"])
        if inline:
            raise ManifestError(
                f"{where}: a text names an image, {inline[0]}, which would be read as words: "
                "list its path in 'images' and write <image> in its place"
            )
        return {"type": "text", "text": part["text"]}
    raise ManifestError(
        f"{where}: unknown content part of type {part.get('type')!r}; use text, image(_url) or video(_url)"
    )


def _reference(media: Any, kind: str, where: str) -> Any:
    """Return an image's or video's path or URL, or a video's list of them."""
    if isinstance(media, dict):
        refuse_unknown(media, ("url", "detail"), f"'{kind}_url'", where)  # servers of this model take no note of detail
        media = media.get("url")
    if kind == "video" and isinstance(media, list):
        if not media or not all(isinstance(m, str) for m in media):
            raise ManifestError(f"{where}: a video given as frames needs a list of image paths or URLs")
    elif not isinstance(media, str) or not media:
        raise ManifestError(f"{where}: an {kind} part needs a path or URL")
    return media


def _settings(part: dict[str, Any], known: tuple[str, ...], where: str) -> dict[str, Any]:
    """Return the part's settings of sizes and frames, each checked alone and against the others."""
    found = {key: part[key] for key in known if part.get(key) is not None}
    for key, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not number or (key in _COUNTS and value != int(value)):
            wanted = "whole number" if key in _COUNTS else "number"
            raise ManifestError(f"{where}: {key} must be a {wanted} above 0, found {value!r}")
        found[key] = int(value) if key in _COUNTS else float(value)
    for least, most in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
        if least in found and most in found and found[least] > found[most]:
            raise ManifestError(f"{where}: {least} {found[least]} is above {most} {found[most]}")
    if ("resized_height" in found) != ("resized_width" in found):
        raise ManifestError(f"{where}: resized_height and resized_width go together")
    if "fps" in found and ("nframes" in found or "sample_fps" in found):
        raise ManifestError(f"{where}: give one of fps, nframes and sample_fps")
    if "nframes" in found and ("min_frames" in found or "max_frames" in found):
        raise ManifestError(f"{where}: nframes is a number of frames already; leave min_frames and max_frames out")
    if isinstance(part.get("video"), list):
        counted = next((key for key in ("nframes", "min_frames", "max_frames") if key in found), None)
        if counted:
            raise ManifestError(f"{where}: {counted} goes with a video file; a list of frames is taken whole")
        if "fps" in found:
            found["sample_fps"] = found.pop("fps")  # how fast the listed frames follow each other
    return found
