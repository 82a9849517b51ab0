from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from toolkit.calibration import media
from toolkit.errors import MediaError


def picture(kind: str = "PNG", size: tuple[int, int] = (200, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).save(buffer, kind)
    return buffer.getvalue()


def test_a_picture_by_path_file_url_and_data_url_is_one(tmp_path: Path) -> None:
    data = picture()
    (tmp_path / "a b.png").write_bytes(data)
    inline = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for reference in ("a b.png", str(tmp_path / "a b.png"), f"file://{tmp_path}/a%20b.png", inline):
        assert media.read(reference, tmp_path, "here") == data, reference
    assert media.decode(data, "here", "a").size == (200, 200)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent.png", "no file at"),
        (".", "can't be read"),
        ("data:image/png;base64,$$$", "base64 is damaged"),
        ("data:image/png,abc", "only base64"),
        ("data:", "only base64"),
        ("http://127.0.0.1:9/a.png", "can't be fetched"),
        ("http://[/a.png", "can't be fetched"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(MediaError, match=f"^m.jsonl:7: .*{message}"):
        media.read(reference, tmp_path, "m.jsonl:7")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_picture_is_seen(kind: str) -> None:
    data = picture(kind)
    with pytest.raises(MediaError, match=r"^m.jsonl:7: a is a truncated or damaged picture"):
        media.decode(data[: len(data) // 2], "m.jsonl:7", "a")


@pytest.mark.parametrize(("data", "message"), [(b"", "is empty"), (b"hello, I am text", "not a picture")])
def test_what_is_no_picture_is_said(data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=f"^m.jsonl:7: a .*{message}"):
        media.decode(data, "m.jsonl:7", "a")


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # Pillow warns above it and refuses at twice as much
    with pytest.raises(MediaError, match="too large"):
        media.decode(picture(), "m.jsonl:7", "a")


def test_long_references_are_cut_in_messages() -> None:
    assert media.shorten("a.png") == "a.png"
    assert media.shorten("data:" + "A" * 5000).endswith("... (5005 characters)")
    assert len(media.shorten("data:" + "A" * 5000)) < 100
