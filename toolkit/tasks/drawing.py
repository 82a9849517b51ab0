"""What images are painted with: colours, shapes, fonts, backgrounds, and places that do not overlap. PIL only."""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CHART_FONTS",
    "COLOURS",
    "SHAPES",
    "TEXT_FONTS",
    "Colour",
    "Font",
    "NoRoom",
    "Spot",
    "background",
    "canvas",
    "draw_shape",
    "font",
    "ink_for",
    "jitter",
    "luminance",
    "place",
]

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont
#: Centre x, centre y and radius of a shape, in pixels.
Spot = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 35, 35),
    "green": (35, 165, 65),
    "blue": (40, 70, 220),
    "yellow": (240, 215, 40),
    "orange": (245, 135, 25),
    "purple": (140, 45, 175),
    "black": (20, 20, 20),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
CHART_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
#: Fonts that matplotlib ships with itself, so that none has to be shipped here.
TEXT_FONTS = (
    *CHART_FONTS,
    "DejaVuSans-Oblique",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmr10",
    "cmss10",
    "cmtt10",
    "cmb10",
)


class NoRoom(Exception):
    """The shapes asked for do not fit the image; draw again."""


@cache
def _font_dir() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@cache
def font(name: str, size: int) -> Font:
    """Return one of matplotlib's fonts at ``size`` pixels. Loaded once."""
    return ImageFont.truetype(_font_dir() / f"{name}.ttf", size)


def _clamp(value: int) -> int:
    return max(0, min(255, value))


def jitter(rng: random.Random, colour: Colour, by: int = 14) -> Colour:
    """Move each channel by up to ``by``."""
    red, green, blue = (_clamp(channel + rng.randint(-by, by)) for channel in colour)
    return red, green, blue


def luminance(colour: Colour) -> float:
    """Return how light a colour looks, 0 to 255 (Rec. 601 weights)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def background(rng: random.Random, dark: float) -> Colour:
    """Return a nearly grey background, dark with probability ``dark``, else light."""
    level = rng.randint(0, 50) if rng.random() < dark else rng.randint(215, 255)
    return jitter(rng, (level, level, level))


def ink_for(rng: random.Random, paper: Colour) -> Colour:
    """Return a grey that stands out from ``paper``."""
    level = rng.randint(0, 60) if luminance(paper) > 128 else rng.randint(200, 255)
    return level, level, level


def canvas(
    rng: random.Random, width: int, height: int, shown: list[str], dark: float = 0.15
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty image on whose background every colour named in ``shown`` can be told."""
    for _ in range(20):
        paper = background(rng, dark)
        if all(sum(abs(p - c) for p, c in zip(paper, COLOURS[name], strict=True)) > 110 for name in shown):
            break
    else:
        paper = (250, 250, 250)
    image = Image.new("RGB", (width, height), paper)
    return image, ImageDraw.Draw(image)


def place(rng: random.Random, width: int, height: int, count: int, low: float, high: float) -> list[Spot]:
    """Find ``count`` places that do not overlap, radii ``low`` to ``high`` times the shorter side.

    Radii shrink as tries fail; raises ``NoRoom`` when even that does not help.
    """
    side = min(width, height)
    for attempt in range(60):
        top = max(low, high * 0.97**attempt)
        spots: list[Spot] = []
        for _ in range(count * 25):
            radius = max(9.0, rng.uniform(low, top) * side)
            x = rng.uniform(radius + 2, width - radius - 2)
            y = rng.uniform(radius + 2, height - radius - 2)
            if all(math.hypot(x - a, y - b) > (radius + other) * 1.12 for a, b, other in spots):
                spots.append((x, y, radius))
                if len(spots) == count:
                    return spots
        low *= 0.98
    raise NoRoom(f"{count} shapes in {width}x{height}")


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, spot: Spot, fill: Colour) -> None:
    """Paint one of ``SHAPES``; it fits a circle of the spot's radius."""
    x, y, r = spot
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        half = r * 0.88
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r * 0.85), (x + r, y + r * 0.85)], fill=fill)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r * 0.75, y), (x, y + r), (x - r * 0.75, y)], fill=fill)
    elif shape == "star":
        tips = [(r if k % 2 == 0 else r * 0.42, k * math.pi / 5) for k in range(10)]
        pen.polygon([(x + d * math.sin(a), y - d * math.cos(a)) for d, a in tips], fill=fill)
    elif shape == "cross":
        arm = r * 0.34
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")
