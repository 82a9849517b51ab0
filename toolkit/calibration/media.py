"""Images that users name: by path, URL or data URL, read and decoded with one message for whatever is wrong."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from toolkit.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

__all__ = ["as_shown", "decode", "is_url", "local_path", "read", "shorten"]

#: Names longer than this are cut in messages: data URLs run to millions of characters.
_SHOWN = 100


def is_url(reference: str) -> bool:
    """Whether a reference is fetched over the network."""
    return reference.startswith(("http://", "https://"))


def shorten(reference: str) -> str:
    """Return what a message calls a reference: itself, or its beginning and length."""
    return reference if len(reference) <= _SHOWN else f"{reference[:60]}... ({len(reference)} characters)"


def local_path(reference: str, base: Path) -> Path:
    """Return the file that a path or ``file://`` URL means; relative ones start from ``base``."""
    if reference.startswith("file://"):
        return Path(unquote(urlparse(reference).path))
    return base / Path(reference).expanduser()


def read(reference: str, base: Path, where: str, timeout_s: float = 30.0) -> bytes:
    """Return the bytes behind a path, ``file://``, http(s) or data URL.

    Args:
        reference: what the user wrote.
        base: where relative paths start.
        where: what a message names first, such as ``calib.jsonl:3``.
        timeout_s: seconds that a server may keep silent.

    Raises:
        MediaError: there is nothing, or it can't be had.
    """
    if reference.startswith("data:"):
        head, comma, payload = reference.partition(",")
        if not comma or not head.endswith(";base64"):
            raise MediaError(f"{where}: only base64 data URLs are read; write data:image/png;base64,...")
        try:
            return base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise MediaError(f"{where}: a data URL's base64 is damaged ({error})") from None
    if is_url(reference):
        return _fetch(reference, where, timeout_s)
    path = local_path(reference, base)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MediaError(f"{where}: no file at {path}") from None
    except OSError as error:
        raise MediaError(f"{where}: {path} can't be read ({error.strerror})") from None


def _fetch(url: str, where: str, timeout_s: float) -> bytes:
    import httpx

    try:
        answer = httpx.get(url, follow_redirects=True, timeout=timeout_s)
        answer.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise MediaError(f"{where}: {url} can't be fetched (HTTP {error.response.status_code})") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MediaError(f"{where}: {url} can't be fetched ({error or type(error).__name__})") from None
    return answer.content


def decode(data: bytes, where: str, shown: str) -> ImageFile:
    """Decode an image wholly: its header says nothing about truncation.

    Args:
        data: the encoded bytes.
        where: what a message names first.
        shown: what a message calls the image.

    Raises:
        MediaError: it is no image, or one that is truncated, damaged, of more pixels than Pillow takes for safe, of
            several frames, or of 16 bits of gray, whose upper range every server clips to white.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise MediaError(f"{where}: {shown} is empty: there is no image in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
            frames = 1 if image.format in _STILLS else getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, WebP, GIF, BMP, TIFF"
        raise MediaError(f"{where}: {shown} is not an image that can be read ({kinds})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MediaError(f"{where}: {shown} is too large an image: {error} Scale it down first.") from None
    except Exception as error:  # each of Pillow's plugins raises errors of its own on damaged files
        raise MediaError(f"{where}: {shown} is a truncated or damaged image ({error})") from None
    if frames > 1:
        raise MediaError(
            f"{where}: {shown} has {frames} frames or pages, of which a server shows the model the first alone: give "
            "that as an image of its own, or a video as the list of its frames"
        )
    if image.mode in _DEEP:
        raise MediaError(
            f"{where}: {shown} has {'32' if image.mode in 'IF' else '16'} bits of gray a pixel, of which all but 8 are "
            "clipped: scale it to 8 bits first"
        )
    return image


#: Formats that Pillow counts frames in and that are one image: a camera's JPEG with previews behind it.
_STILLS = ("MPO",)
#: Pillow's modes of more than 8 bits a channel: converting them to RGB clips at 255 instead of scaling.
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def as_shown(image: Image.Image) -> Image.Image:
    """Return an image in RGB as a server shows it to the model, for calibration, questions and thumbnails alike.

    What vLLM does when it loads an image (``vllm/multimodal/image.py``: normalize_image, convert_image_mode): turned as
    its EXIF orientation says, then put on white by its alpha, which a palette's transparent entry counts as.

    Args:
        image: decoded, in any mode but those of more than 8 bits a channel (`decode` refuses them).
    """
    from PIL import Image, ImageOps

    # An orientation that can't be read turns nothing, there as here.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":  # vLLM leaves it as it is, with a transparent colour too
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        return paper
    return image.convert("RGB")
