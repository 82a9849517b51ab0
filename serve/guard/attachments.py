"""The images and videos of one request, held against the limits on each and on all of them together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pybase64

from serve.guard.fields import refused_field
from serve.guard.images import examine
from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = ["Attachments", "Fetch"]

#: Fetches an image by its URL.
Fetch = Callable[[str], Awaitable[bytes]]

#: A bare "image" leaves the type to be found from the bytes, which is done anyway.
_DATA_URL = re.compile(r"data:(image(?:/[a-z0-9.+-]+)?);base64,")
_VIDEO_URL = re.compile(r"data:video/[a-z0-9.+-]+;base64,")
_SAME_TYPE = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}
_ANY_TYPE = "image"


def _refused(reason: str, message: str, status: int = 400) -> Refusal:
    return Refusal(status, reason, message, "messages")


class Attachments:
    """What of a request is no text, so far. All methods raise Refusal.

    Attributes:
        remote: the `image_url` objects of images that are still to be fetched.
        pixels: of all images that were looked at.
        any: whether there is any image or video.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count = self.pixels = 0
        self.any = False
        self.remote: list[dict[str, Any]] = []

    def add_image(self, image: Any) -> None:
        """Check the `image_url` of a part: its content if it is a data URL, else keep it to be fetched."""
        self._count += 1
        self.any = True
        limits = self._limits
        if self._count > limits.max_images:
            raise _refused("image_count", f"At most {limits.max_images} images are taken.")
        if not isinstance(image, dict) or not isinstance(image.get("url"), str) or image.keys() - {"url", "detail"}:
            raise refused_field('An image is given as {"image_url": {"url": ...}}.', "messages")
        if image.get("detail") not in (None, "auto", "low", "high"):
            raise refused_field("An image's detail is auto, low or high.", "messages")
        url: str = image["url"]
        head = _DATA_URL.match(url)
        if head is None:
            if url[:5].lower() == "data:":
                raise _refused("image_format", "An image's data URL begins data:image/TYPE;base64,")
            if not url.lower().startswith(("http://", "https://")):
                raise _refused("image_url", "An image is a data URL: data:image/png;base64,...")
            self.remote.append(image)
            return
        if (len(url) - head.end()) // 4 * 3 > limits.max_image_bytes + 2:
            raise self._too_large()
        try:
            content = pybase64.b64decode(url[head.end() :], validate=True)
        except ValueError:
            raise _refused("image_format", "An image's base64 is damaged.") from None
        self._check(content, head[1])

    def add_video(self, video: Any) -> None:
        """Check the `video_url` of a part."""
        self.any = True
        if not self._limits.allow_video:
            raise _refused("video", "Videos are not taken by this server.")
        if not isinstance(video, dict) or video.keys() != {"url"} or not isinstance(video["url"], str):
            raise refused_field('A video is given as {"video_url": {"url": ...}}.', "messages")
        if not _VIDEO_URL.match(video["url"]):
            raise _refused("video", "A video is a data URL: data:video/mp4;base64,...")

    async def fetch(self, fetch: Fetch) -> None:
        """Put data URLs in the place of the URLs in `remote`, all fetched at once."""
        contents = await asyncio.gather(*(fetch(image["url"]) for image in self.remote))
        for image, content in zip(self.remote, contents, strict=True):
            mime = self._check(content, None)
            image["url"] = f"data:{mime};base64,{pybase64.b64encode(content).decode()}"

    def _too_large(self) -> Refusal:
        most = self._limits.max_image_bytes
        return _refused("image_bytes", f"An image has more than {most} bytes. Send a smaller one.", 413)

    def _check(self, content: bytes, declared: str | None) -> str:
        """Check an image's bytes and return its MIME type."""
        limits = self._limits
        if len(content) > limits.max_image_bytes:
            raise self._too_large()
        image = examine(content)
        if declared not in (None, _ANY_TYPE) and _SAME_TYPE.get(declared or "", declared) != image.mime:
            message = f"An image is declared another type but is {image.mime}. Declare that."
            raise _refused("image_format", message)
        pixels = image.width * image.height
        if pixels > limits.max_image_pixels:
            size, most = f"{image.width} x {image.height} pixels", limits.max_image_pixels
            raise _refused("image_pixels", f"An image of {size} is too large. At most {most} pixels.")
        self.pixels += pixels
        if self.pixels > limits.max_request_pixels:
            most = limits.max_request_pixels
            raise _refused("image_pixels", f"The images have more than {most} pixels together.")
        if image.frames > limits.max_image_frames:
            most = limits.max_image_frames
            raise _refused("image_frames", f"An image has {image.frames} frames. At most {most} taken.")
        return image.mime
