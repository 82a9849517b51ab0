"""What requests are made of and when they come, as it is written on a command line: image sizes, lengths, arrivals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from toolkit.errors import BenchError

__all__ = ["PIXELS_MAX", "Arrivals", "ImageSize", "Lengths", "parse_lengths", "parse_sizes", "written"]

#: When the requests of an open loop are due: at random, at equal distances, or at random in bursts.
Arrivals = Literal["poisson", "constant", "gamma"]
#: Width, height in pixels; None means a request without an image.
ImageSize = tuple[int, int] | None

TEXT = "text"
PIXELS_MAX = 4096
#: A lognormal distribution is cut so many standard deviations of the logarithm away from its median.
SIGMAS = 3.0
LENGTH_MAX = 1_000_000


def parse_sizes(text: str) -> tuple[ImageSize, ...]:
    """Read ``224x224,336x252`` (width x height); ``text`` stands for requests without an image.

    Raises:
        BenchError: on anything else.
    """
    sizes: list[ImageSize] = []
    for part in text.split(","):
        part = part.strip().lower()
        if part == TEXT:
            sizes.append(None)
            continue
        width, cross, height = part.partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise BenchError(f"image size {part!r}: write WIDTHxHEIGHT in pixels, e.g. 448x448, or text")
        size = int(width), int(height)
        if not all(28 <= side <= PIXELS_MAX for side in size):
            raise BenchError(f"image size {part}: each side must be between 28 and {PIXELS_MAX} pixels")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def written(size: ImageSize) -> str:
    """Return how a size is written: what `parse_sizes` reads."""
    return TEXT if size is None else f"{size[0]}x{size[1]}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts or answers are, or how many images requests have: a distribution over whole numbers.

    Attributes:
        low: the least that is drawn.
        high: the most.
        median: of a lognormal distribution; None for a uniform one, which is fixed when ``low`` equals ``high``.
        sigma: standard deviation of a lognormal's logarithm.
    """

    low: int
    high: int
    median: float | None = None
    sigma: float = 0.0

    @classmethod
    def fixed(cls, value: int) -> Lengths:
        """Return the distribution that is always ``value``."""
        return cls(value, value)

    def at(self, quantile: float) -> int:
        """Return the length at a quantile in [0, 1): the inverse of the distribution function."""
        if self.median is None:
            return self.low + int(quantile * (self.high - self.low + 1))
        deviation = NormalDist().inv_cdf(min(max(quantile, 1e-12), 1 - 1e-12))
        return min(max(round(self.median * math.exp(self.sigma * deviation)), self.low), self.high)

    def __str__(self) -> str:
        if self.median is not None:
            return f"lognormal:{self.median:g}:{self.sigma:g}"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def parse_lengths(text: str, option: str, *, least: int = 1) -> Lengths:
    """Read ``128`` (always), ``64-256`` (uniform, both ends included) or ``lognormal:128:0.5`` (median, standard
    deviation of the logarithm; cut 3 of them from the median).

    Args:
        option: what the text was given for; errors begin with it.
        least: the smallest length that makes sense.

    Raises:
        BenchError: on anything else.
    """
    text = text.strip().lower()
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        lengths = Lengths(int(found[1]), int(found[2] or found[1]))
    elif found := re.fullmatch(r"lognormal:(\d+\.?\d*):(\d+\.?\d*)", text):
        median, sigma = float(found[1]), float(found[2])
        if not 0 < sigma <= 3:
            raise BenchError(f"{option} {text}: the standard deviation of the logarithm must be in (0, 3]")
        if not least <= median <= LENGTH_MAX:
            raise BenchError(f"{option} {text}: the median must be between {least} and {LENGTH_MAX}")
        reach = math.exp(SIGMAS * sigma)
        lengths = Lengths(max(least, round(median / reach)), round(median * reach), median, sigma)
    else:
        raise BenchError(f"{option} {text!r}: write a number (128), a range (64-256) or lognormal:MEDIAN:SIGMA")
    if lengths.low > lengths.high:
        raise BenchError(f"{option} {text}: the range runs backwards")
    if lengths.low < least:
        raise BenchError(f"{option} {text}: must be at least {least}")
    if lengths.median is None and lengths.high > LENGTH_MAX:
        raise BenchError(f"{option} {text}: must be at most {LENGTH_MAX}")
    return lengths
