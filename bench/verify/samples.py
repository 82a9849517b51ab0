"""What both sides are asked: chats with images, of a manifest, a directory of images, or the embedded model's tasks."""

from __future__ import annotations

import base64
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.calibration import media
from toolkit.calibration.manifest import CalibrationSample, read_manifest
from toolkit.errors import ManifestError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["QUESTION", "Asked", "asked"]

#: What is asked about an image that comes without a question.
QUESTION = "Describe this image."
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
#: EXIF's tag of how the camera was held; 1 is upright.
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Asked:
    """One chat, as each side takes it."""

    #: A file and line, or an image's name.
    where: str
    #: The API's form, images as data URLs.
    messages: list[dict[str, Any]]
    #: The same with parts ``{"type": "image"}``, as chat templates take it.
    turns: list[dict[str, Any]]
    #: Upright and in RGB, in the order of the parts.
    images: list[Image]
    #: What may be read in two ways: "image 1 is turned by its EXIF data".
    remarks: tuple[str, ...] = ()


def asked(images: Path | None, count: int, question: str = QUESTION) -> list[Asked]:
    """Read what is to be asked, at most ``count`` chats, the first ones.

    Args:
        images: a JSONL manifest of chats (`toolkit.calibration.manifest`), whose last answers are left out; a directory
            of images; None: the embedded model's tasks.
        count: at least 1.
        question: asked about each image of a directory.

    Raises ManifestError for a manifest or directory that holds nothing to ask, MediaError for an image that can't be
    read.
    """
    with tempfile.TemporaryDirectory(prefix="qvl-verify-") as scratch:
        return [_read(sample) for sample in _samples(images, count, question, Path(scratch))]


def _samples(images: Path | None, count: int, question: str, scratch: Path) -> list[CalibrationSample]:
    if images is None:
        from toolkit.tasks.manifests import write_tasks
        from toolkit.tasks.questions import TASKS

        file = write_tasks(scratch, per_task=-(-count // len(TASKS)))
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = sorted(rows, key=lambda row: str(row["id"]).rpartition("-")[2])[:count]  # one of each task first
        return [_about(str(row["image"]), str(row["question"]), str(row["id"]), scratch) for row in rows]
    if images.is_dir():
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not files:
            raise ManifestError(f"{images} holds no images ({', '.join(sorted(_SUFFIXES))})")
        return [_about(file.name, question, file.name, images) for file in files[:count]]
    return read_manifest(images)[:count]


def _about(image: str, question: str, where: str, base: Path) -> CalibrationSample:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return CalibrationSample([{"role": "user", "content": content}], where, base)


def _read(sample: CalibrationSample) -> Asked:
    turns = list(sample.messages)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ManifestError(f"{sample.where}: there is no question, only answers")
    messages: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    images: list[Image] = []
    remarks: list[str] = []
    for turn in turns:
        content, marks = [], []
        for part in turn["content"]:
            if part["type"] == "text":
                content.append(part)
                marks.append(part)
                continue
            if part["type"] != "image" or part.keys() - {"type", "image"}:
                what = "a video" if part["type"] == "video" else "an image with bounds of its own"
                raise ManifestError(
                    f"{sample.where}: {what} can't be sent to a server as it is: verify asks about plain images"
                )
            found = media.read(part["image"], sample.base, sample.where)
            image = media.decode(found, sample.where, media.shorten(part["image"]))
            if image.getexif().get(_ORIENTATION, 1) != 1:
                remarks.append(f"image {len(images) + 1} is turned by its EXIF data")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                remarks.append(f"image {len(images) + 1} has transparent parts")
            url = f"data:{image.get_format_mimetype()};base64,{base64.b64encode(found).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
            marks.append({"type": "image"})
            images.append(media.as_shown(image))
        messages.append({"role": turn["role"], "content": content})
        plain.append({"role": turn["role"], "content": marks})
    return Asked(sample.where, messages, plain, images, tuple(remarks))
