"""Headers read by hand, held against Pillow, which wrote the files and would decode them."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.chaos.hostile import gif_of, jpeg_of_scans, png_bomb, webp_of
from serve.guard.images import examine
from serve.http.errors import Refusal

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
sides = st.integers(1, 60)


def written(format: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = Random(0).randbytes(3 * size[0] * size[1])
    Image.frombytes("RGB", size, noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def reason_of(data: bytes) -> str:
    with pytest.raises(Refusal) as caught:
        examine(data)
    return caught.value.reason


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), sides, sides, st.sampled_from(("RGB", "L", "P", "RGBA")), st.booleans())
def test_sizes_are_those_that_pillow_sees(format: str, width: int, height: int, mode: str, alternative: bool) -> None:
    if format == "JPEG":
        mode = "L" if mode in ("P", "RGBA") else mode
    option = {"JPEG": "progressive", "WEBP": "lossless", "PNG": "optimize", "GIF": "interlace"}.get(format)
    data = written(format, (width, height), mode, **({option: alternative} if option else {}))
    found = examine(data)
    with Image.open(io.BytesIO(data)) as image:
        assert (found.width, found.height) == image.size
        assert found.mime == image.get_format_mimetype()
    assert found.frames == 1


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_a_file_cut_anywhere_is_refused(format: str, data: st.DataObject) -> None:
    whole = written(format, (17, 13))
    keep = data.draw(st.integers(0, len(whole) - 1))
    assert reason_of(whole[:keep]) == "image_format"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(min_size=4, max_size=60))
def test_a_file_that_goes_on_is_refused(format: str, more: bytes) -> None:
    if format == "JPEG" and (not more.strip(b"\0") or more.lstrip(b"\0").startswith(b"\xff\xd8")):
        return
    if format == "GIF" and more[0] == 0:
        more = b"x" + more
    assert reason_of(written(format, (17, 13)) + more) == "image_format"


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_files_are_refused_or_read_never_more(format: str, data: st.DataObject) -> None:
    """Whatever bytes change, the answer is an image or a Refusal, and an image is no smaller than Pillow's."""
    whole = bytearray(written(format, (17, 13)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(2, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = examine(bytes(whole))
    except Refusal:
        return
    try:
        with Image.open(io.BytesIO(bytes(whole)), formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # Pillow will not have it: then nothing is decoded
        return
    assert found.width * found.height >= width * height


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF")), st.binary(max_size=80))
def test_noise_is_refused(start: bytes, rest: bytes) -> None:
    assert reason_of(start + rest) in ("image_format", "image_pixels")


@pytest.mark.parametrize(("format", "lossless"), [("PNG", True), ("GIF", True), ("WEBP", True), ("WEBP", False)])
def test_frames_are_counted(format: str, lossless: bool) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    more = {"lossless": lossless} if format == "WEBP" else {}
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], **more)
    image = examine(buffer.getvalue())
    assert (image.frames, image.width, image.height) == (3, 20, 10)


def test_bombs_are_seen_without_being_unpacked() -> None:
    assert (examine(png_bomb(5000, 4000)).width, examine(png_bomb(5000, 4000)).height) == (5000, 4000)
    assert examine(gif_of(10_000)).frames == 10_000
    assert examine(webp_of(16_384, 16_384)).height == 16_384


def test_a_gif_frame_beyond_its_screen_counts() -> None:
    data = bytearray(gif_of(1))
    data[data.index(b"\x2c") + 5 : data.index(b"\x2c") + 9] = struct.pack("<HH", 3000, 2000)
    found = examine(bytes(data))
    with Image.open(io.BytesIO(bytes(data))) as image:
        assert (found.width, found.height) == image.size == (3000, 2000)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    assert examine(jpeg_of_scans(1)).width == 4000
    assert reason_of(jpeg_of_scans(40)) == "image_format"


def test_a_jpeg_may_be_followed_by_padding_and_jpegs() -> None:
    jpeg = written("JPEG", (17, 13))
    assert examine(jpeg + b"\0" * 100).width == 17
    assert examine(jpeg + jpeg).width == 17
    assert reason_of(jpeg + b"PK\x03\x04") == "image_format"
    assert reason_of(jpeg + b"\xff\xd8\xff" + b"PK\x03\x04") == "image_format"


def test_a_jpeg_with_a_preview_inside_is_read() -> None:
    preview = written("JPEG", (8, 8))
    exif = Image.Exif()
    exif[270] = "caption"
    whole = written("JPEG", (40, 30), exif=exif.tobytes())
    segment = b"\xff\xe5" + struct.pack(">H", len(preview) + 2) + preview
    image = examine(whole[:2] + segment + whole[2:])
    assert (image.width, image.height) == (40, 30)


def test_two_headers_are_refused() -> None:
    jpeg = written("JPEG", (17, 13))
    at = jpeg.index(b"\xff\xc0")
    frame = jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
    assert reason_of(jpeg[:at] + frame + jpeg[at:]) == "image_format"
    png = written("PNG", (17, 13))
    assert reason_of(png[:33] + png[8:33] + png[33:]) == "image_format"


def test_files_of_countless_pieces_end_soon() -> None:
    def chunk(kind: bytes) -> bytes:
        return struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))

    png = written("PNG", (17, 13))
    assert reason_of(png[:33] + chunk(b"teXt") * 200_000 + png[33:]) == "image_format"
    gif = gif_of(1)
    assert reason_of(gif[:-2] + b"\x01\0" * 200_000 + b"\0;") == "image_format"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"  <?xml version='1.0'?><svg/>", "SVG"),
        (b"II*\0" + b"\0" * 40, "TIFF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04", "ZIP"),
        (b"", "no known format"),
    ],
)
def test_other_formats_are_named(data: bytes, name: str) -> None:
    with pytest.raises(Refusal, match=name):
        examine(data)


def test_a_sliver_is_refused() -> None:
    assert reason_of(png_bomb(1, 201)) == "image_pixels"
    assert examine(png_bomb(1, 200)).height == 200
