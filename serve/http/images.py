"""Images as the API takes them: URLs stay, files become data URLs after a check that they are images."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from toolkit.calibration import media

__all__ = ["image_url", "sample_image"]


def image_url(source: str) -> str:
    """Return what goes into a message's `image_url` for a file, an http(s) URL or a data URL.

    A file is decoded once, whole, and sent as it is under the MIME type of its content, whatever its name says.
    Raises MediaError for a file that is missing, truncated or not an image.
    """
    if media.is_url(source) or source.startswith("data:image/"):
        return source
    content = media.read(source, Path(), "--image")
    mime = media.decode(content, "--image", source).get_format_mimetype()
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def sample_image() -> str:
    """Return a data URL of a red circle on white, 112 x 112: what a booting server is asked about."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 82, 82), fill=(220, 30, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
