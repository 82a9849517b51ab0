from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from serve.http.images import image_url, sample_image
from toolkit.errors import MediaError


def image(path: Path, kind: str, size: tuple[int, int] = (64, 48)) -> Path:
    Image.effect_noise(size, 60).convert("RGB").save(path, kind)
    return path


@pytest.mark.parametrize(
    ("kind", "mime"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")]
)
def test_type_by_content_not_by_name(tmp_path: Path, kind: str, mime: str) -> None:
    path = image(tmp_path / "image.dat", kind)
    head, _, data = image_url(str(path)).partition(",")
    assert head == f"data:{mime};base64"
    assert base64.b64decode(data) == path.read_bytes()
    assert image_url(f"file://{path}") == image_url(str(path))


@pytest.mark.parametrize("url", ["http://a/b.png", "https://a/b.png", "data:image/png;base64,AAAA"])
def test_urls_stay(url: str) -> None:
    assert image_url(url) == url


def test_missing() -> None:
    with pytest.raises(MediaError, match=r"--image: no file at nowhere\.png"):
        image_url("nowhere.png")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="can't be read"):
        image_url(str(tmp_path))


def test_what_is_no_image_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello, I am text")
    with pytest.raises(MediaError, match=r"--image: .*a\.png is not an image"):
        image_url(str(tmp_path / "a.png"))


def test_sample_image_is_one() -> None:
    head, _, data = sample_image().partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        image.load()
        assert image.size == (112, 112)
        assert image.getpixel((56, 56)) == (220, 30, 30)
        assert image.getpixel((2, 2)) == (255, 255, 255)
