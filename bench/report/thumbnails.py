"""Small copies of the images whose answers flipped, so that a report shows them and stays one file."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.questions.tasks import ImageData
from toolkit.calibration import media

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["BUDGET", "SIZES", "Thumbnails", "thumbnails"]

#: Longest side in pixels, the first that fits is taken.
SIZES = (640, 448, 320, 224, 160)
#: Characters of data URLs in one page.
BUDGET = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Data URLs by the SHA-256 of the original, and how many images there is none for."""

    urls: dict[str, str]
    left_out: int
    unreadable: int


def thumbnails(shown: Sequence[ImageData], budget: int = BUDGET) -> Thumbnails:
    """Scale images down, each as little as its share of what is left of the budget allows.

    Args:
        shown: in the order they are shown; one that is shown twice takes its place twice.
        budget: characters of all data URLs together, as often as they are shown.
    """
    times = Counter(image.sha256 for image in shown)
    places, left = len(shown), budget
    urls: dict[str, str] = {}
    left_out = unreadable = 0
    for image in {image.sha256: image for image in shown}.values():
        count = times[image.sha256]
        url, readable = _fitting(image, left // places)
        if url:
            urls[image.sha256] = url
            left -= count * len(url)
        left_out += readable and url is None
        unreadable += not readable
        places -= count
    return Thumbnails(urls, left_out, unreadable)


def _fitting(image: ImageData, most: int) -> tuple[str | None, bool]:
    """Return the largest data URL of at most ``most`` characters, and whether the image could be read."""
    from PIL import Image

    try:
        # A file may be gone by now: it was decoded when the questions were read.
        data = image.data if image.path is None else image.path.read_bytes()
        with Image.open(io.BytesIO(data or b"")) as opened:
            paper = media.as_shown(opened).copy()
    except (OSError, SyntaxError, ValueError):
        return None, False
    for size in SIZES:
        paper.thumbnail((size, size))
        url = min((_data_url(paper, kind) for kind in ("PNG", "JPEG")), key=len)
        if len(url) <= most:
            return url, True
    return None, True


def _data_url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
