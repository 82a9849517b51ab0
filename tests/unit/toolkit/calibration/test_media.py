from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from toolkit.calibration import media
from toolkit.errors import MediaError


def image(kind: str = "PNG", size: tuple[int, int] = (200, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).save(buffer, kind)
    return buffer.getvalue()


def test_an_image_by_path_file_url_and_data_url_is_one(tmp_path: Path) -> None:
    data = image()
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
def test_a_truncated_image_is_seen(kind: str) -> None:
    data = image(kind)
    with pytest.raises(MediaError, match=r"^m.jsonl:7: a is a truncated or damaged image"):
        media.decode(data[: len(data) // 2], "m.jsonl:7", "a")


@pytest.mark.parametrize(("data", "message"), [(b"", "is empty"), (b"hello, I am text", "not an image")])
def test_what_is_no_image_is_said(data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=f"^m.jsonl:7: a .*{message}"):
        media.decode(data, "m.jsonl:7", "a")


def test_an_image_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # Pillow warns above it and refuses at twice as much
    with pytest.raises(MediaError, match="too large"):
        media.decode(image(), "m.jsonl:7", "a")


def test_long_references_are_cut_in_messages() -> None:
    assert media.shorten("a.png") == "a.png"
    assert media.shorten("data:" + "A" * 5000).endswith("... (5005 characters)")
    assert len(media.shorten("data:" + "A" * 5000)) < 100


# --- as the server shows it: every value below is what vLLM 0.32's ImageMediaIO().load_bytes gives for the same file


def shown(image: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return media.as_shown(media.decode(buffer.getvalue(), "m.jsonl:7", "a"))


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]  # type: ignore[misc]


#: a b c over d e f, each orientation's rows as they are seen.
TURNED = dict(
    enumerate(["abc/def", "cba/fed", "fed/cba", "def/abc", "ad/be/cf", "da/eb/fc", "fc/eb/da", "cf/be/ad"], 1)
)


@pytest.mark.parametrize("orientation", [*TURNED, 9])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_image_is_turned_as_its_exif_orientation_says(orientation: int, kind: str) -> None:
    image = Image.new("RGB", (3, 2))
    for at, letter in enumerate("abcdef"):
        image.putpixel((at % 3, at // 3), (ord(letter), 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = shown(image, kind, exif=exif)
    rows = TURNED.get(orientation, TURNED[1]).split("/")
    assert turned.size == (len(rows[0]), len(rows))
    assert pixels(turned) == [(ord(letter), 0, 0) for row in rows for letter in row]


def test_what_is_transparent_is_put_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        rgba.putpixel((x, 0), (200, 0, 0, alpha))
    assert pixels(shown(rgba)) == [(255, 255, 255), (227, 127, 127), (200, 0, 0)]
    gray = Image.new("LA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        gray.putpixel((x, 0), (100, alpha))
    assert pixels(shown(gray)) == [(255,) * 3, (177,) * 3, (100,) * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(shown(palette)) == [(10, 20, 30), (40, 50, 60)]
    for kind in ("PNG", "GIF"):
        assert pixels(shown(palette, kind, transparency=0)) == [(255, 255, 255), (40, 50, 60)], kind
    assert pixels(shown(Image.new("L", (1, 1), 10), transparency=10)) == [(255, 255, 255)]
    # a transparent colour of an RGB file is left as it is by the server too
    assert pixels(shown(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))) == [(1, 2, 3)]


def test_other_modes_become_rgb() -> None:
    assert pixels(shown(Image.new("L", (1, 1), 7))) == [(7, 7, 7)]
    assert pixels(shown(Image.new("1", (1, 1), 1))) == [(255, 255, 255)]


@pytest.mark.parametrize(("mode", "kind", "bits"), [("I;16", "PNG", 16), ("I;16", "TIFF", 16), ("F", "TIFF", 32)])
def test_gray_of_more_than_8_bits_is_refused(mode: str, kind: str, bits: int) -> None:
    with pytest.raises(MediaError, match=f"^m.jsonl:7: a has {bits} bits of gray a pixel"):
        shown(Image.new(mode, (2, 2), 300), kind)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(MediaError, match="m:1: it has 3 frames or pages"):
        media.decode(buffer.getvalue(), "m:1", "it")


def test_previews_behind_a_photo_are_no_frames() -> None:
    photo, preview = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (15, 10), "red")
    buffer = io.BytesIO()
    photo.save(buffer, "MPO", save_all=True, append_images=[preview])
    assert media.decode(buffer.getvalue(), "m:1", "it").size == (30, 20)


def test_a_data_url_need_not_name_its_kind(tmp_path: Path) -> None:
    data = image()
    for head in ("data:image;base64", "data:;base64", "data:image/png;charset=utf-8;base64"):
        assert media.read(f"{head},{base64.b64encode(data).decode()}", tmp_path, "here") == data
