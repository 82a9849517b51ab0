"""What the guard of a server would refuse of a question's images, said when questions are read and not in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve.guard.images import examine
from serve.http.errors import Refusal

if TYPE_CHECKING:
    from bench.questions.tasks import ImageData
    from serve.settings.limits import Limits

__all__ = ["refusal"]


def refusal(images: Sequence[ImageData], limits: Limits) -> str | None:
    """Return why a guard with these limits would refuse a request with these images, and the option that lets it in.

    None: it would not.

    Raises:
        MediaError: a file is gone.
    """
    pixels = 0
    for image in images:
        data = image.read()
        try:
            found = examine(data)
        except Refusal as error:
            return f"a guarded server will refuse this: {error.message}"
        size = found.width * found.height
        pixels += size
        for name, value, what in (
            ("max_image_bytes", len(data), "bytes"),
            ("max_image_pixels", size, "pixels"),
            ("max_image_frames", found.frames, "frames"),
        ):
            if value > getattr(limits, name):
                return _over(f"an image has {value:,} {what}", name, limits)
    if len(images) > limits.max_images:
        return _over(f"there are {len(images)} images", "max_images", limits)
    if pixels > limits.max_request_pixels:
        return _over(f"its images have {pixels:,} pixels", "max_request_pixels", limits)
    return None


def _over(what: str, name: str, limits: Limits) -> str:
    limit = getattr(limits, name)
    return f"{what}, and `qvl serve` takes {limit:,}, unless it was started with a larger {limits.option(name)}"
