"""Pictures as the API takes them: URLs stay, files become data URLs after a check that they are pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from toolkit.errors import MediaError

__all__ = ["image_url", "sample_picture"]


def image_url(source: str) -> str:
    """Return what goes into a message's `image_url` for a file, an http(s) URL or a data URL.

    A file is decoded once, whole, and sent as it is under the MIME type of its content, whatever its name says.
    Raises MediaError for a file that is missing, truncated or not a picture.
    """
    if source.startswith(("http://", "https://", "data:image/")):
        return source
    path = Path(source.removeprefix("file://")).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError(f"no such image: {path}. Give a file or an http(s) URL.") from error
    except OSError as error:
        raise MediaError(f"{path} can't be read: {error.strerror}.") from error
    return f"data:{_mime_type(content, path)};base64,{base64.b64encode(content).decode()}"


def _mime_type(content: bytes, path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise MediaError(f"{path} is empty: there is no picture in it.")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # verify() would let a truncated JPEG through
            return Image.MIME[image.format or ""]
    except UnidentifiedImageError as error:
        raise MediaError(f"{path} is not a picture that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF).") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} is too large a picture: {error}. Scale it down first.") from error
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise MediaError(f"{path} is a truncated or damaged picture ({error}). Copy or download it again.") from error


def sample_picture() -> str:
    """Return a data URL of a red circle on white, 112 x 112: what a booting server is asked about."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 82, 82), fill=(220, 30, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
