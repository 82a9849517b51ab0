"""What an image is, from its headers alone: format, size and frames, before anything decodes it.

A decoder allocates what a header promises, so the promise is read first. An image also has to end where its format
says: what is cut short would fail later, and what goes on is a second file in disguise. Formats: PNG (RFC 2083 and
APNG), JPEG (ITU T.81), WebP (RFC 9649), GIF (89a), BMP. All others are refused by name where they are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve.http.errors import Refusal

__all__ = ["ImageInfo", "examine"]

#: Pieces of a file that are walked one by one, above what any encoder writes for the largest image allowed: a file
#: made of many tiny pieces costs time here and in the decoder.
_MOST_PIECES = 100_000
#: Passes over a progressive JPEG. Encoders write about ten; each costs a walk over all pixels, and few bytes.
_MOST_SCANS = 32
#: Qwen2-VL's processor refuses images with a longer side more than this many times the shorter.
_MOST_ASPECT = 200

_KNOWN = "PNG, JPEG, WebP, GIF or BMP"
_OTHERS = (
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF"),
    (re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:\?xml|svg|!)", re.IGNORECASE), "SVG or XML"),
    (re.compile(rb"....ftyp(?:avi|heic|heix|mif1|hevc)", re.DOTALL), "AVIF or HEIC"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"%PDF|%!PS"), "PDF or PostScript"),
    (re.compile(rb"PK\x03\x04"), "ZIP"),
)
#: The first byte that a JPEG's entropy-coded data can't hold: 0xFF that is neither stuffed, nor a restart, nor fill.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What headers say. Width and height in pixels are the largest a decoder may allocate."""

    mime: str
    width: int
    height: int
    frames: int


def examine(data: bytes) -> ImageInfo:
    """Return what an image is. Its pixels are not decoded.

    Raises Refusal (reason image_format) for what is no image of a known format, is cut short, or goes on after its
    end, and (image_pixels) for one that is empty or far too narrow.
    """
    try:
        image = _examine(data)
    except IndexError:  # a read beyond the end
        raise _refusal("is cut short. Send the whole file.") from None
    width, height = image.width, image.height
    if min(width, height) < 1 or max(width, height) > _MOST_ASPECT * min(width, height):
        raise Refusal(
            400, "image_pixels", f"An image of {width} x {height} pixels can't be shown to the model.", "messages"
        )
    return image


def _examine(data: bytes) -> ImageInfo:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif(data)
    if data.startswith(b"BM") and len(data) > 18:
        return _bmp(data)
    name = next((name for pattern, name in _OTHERS if pattern.match(data[:512])), None)
    raise _refusal(f"is {name}" + f". Send {_KNOWN}." if name else f"has no known format. Send {_KNOWN}.")


def _refusal(what: str) -> Refusal:
    return Refusal(400, "image_format", f"An image {what}", "messages")


def _number(data: bytes, start: int, size: int, order: str = "big") -> int:
    piece = data[start : start + size]
    if len(piece) < size:
        raise IndexError
    return int.from_bytes(piece, order)  # type: ignore[arg-type]  # "big" or "little"


def _ends(data: bytes, end: int) -> None:
    """Refuse a file that is shorter or longer than its format says."""
    if len(data) < end:
        raise IndexError
    if len(data) > end:
        raise _refusal(f"has {len(data) - end} bytes after its end. Save it again without them.")


def _png(data: bytes) -> ImageInfo:
    if data[12:16] != b"IHDR" or _number(data, 8, 4) != 13:
        raise _refusal("claims to be PNG but has no header.")
    width, height = _number(data, 16, 4), _number(data, 20, 4)
    if data[24:26] == b"\x10\0":
        # As toolkit.calibration.media has it: Pillow clips at 255 instead of scaling.
        raise _refusal("has 16 bits of gray a pixel, of which all but 8 are clipped: scale it to 8 bits first.")
    position, frames, controls = 33, 1, 0
    for _ in range(_MOST_PIECES):
        length, kind = _number(data, position, 4), data[position + 4 : position + 8]
        if kind == b"acTL":
            frames = max(frames, _number(data, position + 8, 4))
        elif kind == b"fcTL":
            controls += 1
        elif kind == b"IHDR":
            raise _refusal("has two headers.")
        position += 12 + length
        if kind == b"IEND":
            _ends(data, position)
            return ImageInfo("image/png", width, height, max(frames, controls))
    raise _refusal("is made of too many pieces. Save it again.")


def _jpeg(data: bytes) -> ImageInfo:
    position, size, scans = 2, None, 0
    for _ in range(_MOST_PIECES):
        while data[position] == 0xFF and data[position + 1] == 0xFF:  # fill bytes
            position += 1
        if data[position] != 0xFF:
            raise _refusal("claims to be JPEG but its segments are damaged.")
        marker = data[position + 1]
        position += 2
        if marker == 0xD9:  # the end
            if size is None or not scans:
                raise _refusal("claims to be JPEG but holds no image.")
            _jpeg_ends(data, position)
            return ImageInfo("image/jpeg", size[0], size[1], 1)
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without content
            continue
        if marker in (0x00, 0xD8):
            raise _refusal("claims to be JPEG but its segments are damaged.")
        length = _number(data, position, 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size is not None:
                raise _refusal("has two headers.")
            size = _number(data, position + 5, 2), _number(data, position + 3, 2)
        position += max(length, 2)
        if marker == 0xDA:
            scans += 1
            if scans > _MOST_SCANS:
                raise _refusal(f"is a JPEG of more than {_MOST_SCANS} scans. Save it again.")
            following = _MARKER.search(data, position)
            if following is None:
                raise IndexError
            position = following.start()
    raise _refusal("is made of too many pieces. Save it again.")


def _jpeg_ends(data: bytes, end: int) -> None:
    """Let a JPEG be followed by padding and by further JPEGs: cameras append previews and depth maps (CIPA DC-007)."""
    rest = data[end:].lstrip(b"\0")
    if not (rest.startswith(b"\xff\xd8\xff") and rest.rstrip(b"\0").endswith(b"\xff\xd9")):
        _ends(data, end if rest else len(data))


def _webp(data: bytes) -> ImageInfo:
    end = 8 + _number(data, 4, 4, "little")
    _ends(data, end)
    position, width, height, frames, stills = 12, 0, 0, 0, 0
    for _ in range(_MOST_PIECES):
        if position >= end:
            if not stills and not frames:
                raise _refusal("claims to be WebP but holds no image.")
            return ImageInfo("image/webp", width, height, frames or 1)
        kind, length = data[position : position + 4], _number(data, position + 4, 4, "little")
        start = position + 8
        w = h = 0
        if kind == b"VP8X":
            w, h = _number(data, start + 4, 3, "little") + 1, _number(data, start + 7, 3, "little") + 1
        elif kind == b"VP8 ":
            stills += 1
            w, h = _number(data, start + 6, 2, "little") & 0x3FFF, _number(data, start + 8, 2, "little") & 0x3FFF
        elif kind == b"VP8L":
            stills += 1
            bits = _number(data, start + 1, 4, "little")
            w, h = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"ANMF":
            frames += 1
            w, h = _number(data, start + 6, 3, "little") + 1, _number(data, start + 9, 3, "little") + 1
        width, height = max(width, w), max(height, h)
        position = start + length + (length & 1)
        if position > end:
            raise IndexError
    raise _refusal("is made of too many pieces. Save it again.")


def _gif(data: bytes) -> ImageInfo:
    width, height = _number(data, 6, 2, "little"), _number(data, 8, 2, "little")
    position = 13 + _colours(data[10])
    frames = pieces = 0
    while True:
        kind = data[position]
        if kind == 0x3B:
            if not frames:
                raise _refusal("claims to be GIF but holds no image.")
            _ends(data, position + 1)
            return ImageInfo("image/gif", width, height, frames)
        if kind == 0x2C:
            frames += 1
            left, top = _number(data, position + 1, 2, "little"), _number(data, position + 3, 2, "little")
            w, h = _number(data, position + 5, 2, "little"), _number(data, position + 7, 2, "little")
            width, height = max(width, left + w), max(height, top + h)
            position += 11 + _colours(data[position + 9])
        elif kind == 0x21:
            position += 2
        else:
            raise _refusal("claims to be GIF but its blocks are damaged.")
        while (length := data[position]) != 0:
            position += 1 + length
            pieces += 1
            if pieces > _MOST_PIECES:
                raise _refusal("is made of too many pieces. Save it again.")
        position += 1


def _colours(flags: int) -> int:
    """Return the bytes of the colour table that follows."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _bmp(data: bytes) -> ImageInfo:
    offset, header = _number(data, 10, 4, "little"), _number(data, 14, 4, "little")
    if header == 12:
        width, height = _number(data, 18, 2, "little"), _number(data, 20, 2, "little")
        bits, compression = _number(data, 24, 2, "little"), 0
    elif header in (40, 52, 56, 64, 108, 124):
        width, height = _number(data, 18, 4, "little"), _number(data, 22, 4, "little")
        height = height if height < 1 << 31 else (1 << 32) - height  # negative: stored from the top
        bits, compression = _number(data, 28, 2, "little"), _number(data, 30, 4, "little")
    else:
        raise _refusal("claims to be BMP but has no header that is known.")
    if compression not in (0, 3) or bits not in (1, 4, 8, 16, 24, 32):
        raise _refusal("is a compressed BMP. Send PNG instead.")
    end = offset + (width * bits + 31) // 32 * 4 * height
    _ends(data, end if len(data) < end or len(data) > end + 3 else len(data))  # some writers pad the file
    return ImageInfo("image/bmp", width, height, 1)
