"""Requests for speed runs: every picture and prompt is new to the server, so that no cache answers for the model.

All of them are made before the clock starts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from PIL import Image

from bench.load.client import ChatRequest
from toolkit.errors import BenchError

__all__ = ["PRESETS", "ImageSize", "Lengths", "Preset", "SpeedInputs", "parse_lengths", "parse_sizes"]

#: Width, height in pixels; None means a request without a picture.
ImageSize = tuple[int, int] | None

TEXT = "text"
PIXELS_MAX = 4096
#: A lognormal distribution is cut so many standard deviations of the logarithm away from its median.
SIGMAS = 3.0
LENGTH_MAX = 1_000_000

#: Each is one token in Qwen's vocabulary, with the space before it and without. 256 of them: one byte picks one.
WORDS = """
about above after again against air all along also always among animal another answer any area around ask back ball
base because bed been before being below best better between big bird black blue board boat body book both bottom box
boy bring build building built but call came can car care carry center change check child children city class clear
close cold color come common complete could country course cover cross cut dark day deep did different distance does
dog done door down draw drive dry during each early earth east easy eat end even ever every example eye face fact fall
family far farm fast father feel few field figure fill final find fine fire first fish five floor fly follow food foot
for force form found four free friend from front full game general get girl give glass gold good got government great
green ground group grow had half hand hard has have head hear heard heart heat heavy help her here high hill him his
hold home horse hot hour house how idea important inch inside into its job just keep kind king know land language
large last late later learn leave left less let letter life light like line list listen little live long look lost
love low machine made main make man many map mark may mean measure men might mile mind minute miss money moon more
most mother move much music must name near need never new next night north note nothing notice number off often old
once one
""".split()  # noqa: SIM905  # fits on a screen
#: The first words of a prompt say which it is, 8 bits each, so that no two prompts share a prefix of this length.
KEY_WORDS = 8


def parse_sizes(text: str) -> tuple[ImageSize, ...]:
    """Read ``224x224,336x252`` (width x height); ``text`` stands for requests without a picture.

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


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts or answers are, or how many pictures requests have: a distribution over whole numbers.

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


@dataclass(frozen=True, slots=True)
class SpeedInputs:
    """Makes the requests of a run.

    Attributes:
        nonce: different in every run: a server that outlives one run may have cached its pictures.
        sizes: pictures go through them in turn.
        output_tokens: exact length of each answer.
        prompt_tokens: words of each prompt, at least `KEY_WORDS`; each is a token of Qwen's. The chat template's own
            tokens and the pictures' come on top: the server's usage has them all.
        images: pictures of each request; where ``sizes`` has None, one less.
    """

    nonce: str
    sizes: tuple[ImageSize, ...]
    output_tokens: int | Lengths
    prompt_tokens: Lengths = Lengths.fixed(16)  # noqa: RUF009  # frozen
    images: Lengths = Lengths.fixed(1)  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.prompt_tokens.low < KEY_WORDS:
            raise BenchError(
                f"prompts of {self.prompt_tokens} tokens: must have at least {KEY_WORDS}, or two could be equal"
            )

    def request(self, block: str, index: int) -> ChatRequest:
        """Return request ``index`` of ``block``; equal arguments give equal bytes, any other argument other bytes.

        Blocks have disjoint inputs, so that a warm-up block warms no input of a measured one.
        """
        digest = self._digest(block, index)
        prompt, images = _quantile(digest, 1), _quantile(digest, 2)
        return self._make(digest, index, self.images.at(images), self.prompt_tokens.at(prompt))

    def bodies(self, block: str, count: int, model: str) -> list[bytes]:
        """Return the encoded bodies of the first ``count`` requests of ``block``."""
        return [self.request(block, index).body(model) for index in range(count)]

    def warm_up(self, model: str, block: str = "warm-up") -> list[bytes]:
        """Return bodies that show a server every image size in every number of images, with the longest prompt, and
        share no input with any other block."""
        counts = range(self.images.low, self.images.high + 1)
        shapes = [(size, count) for count in counts for size in range(len(self.sizes))]
        return [
            self._make(self._digest(f"{block}/shapes", index), size, count, self.prompt_tokens.high).body(model)
            for index, (size, count) in enumerate(shapes)
        ]

    def _digest(self, block: str, index: int) -> bytes:
        return hashlib.sha256(f"{self.nonce}/{block}/{index}".encode()).digest()

    def _make(self, digest: bytes, turn: int, count: int, words: int) -> ChatRequest:
        """Return the request that ``digest`` stands for; its pictures' sizes start with number ``turn``."""
        turns = [self.sizes[(turn + image) % len(self.sizes)] for image in range(count)]
        pictures = tuple(_picture(digest, image, size) for image, size in enumerate(turns) if size is not None)
        lengths = self.output_tokens
        length = lengths if isinstance(lengths, int) else lengths.at(_quantile(digest, 3))
        return ChatRequest(_prompt(digest, words), pictures, length, fixed_length=True)


def _quantile(digest: bytes, word: int) -> float:
    """Return a number in [0, 1) from the digest's 64-bit word ``word``."""
    return (int.from_bytes(digest[8 * word : 8 * word + 8], "big") >> 11) / 2**53


def _prompt(digest: bytes, words: int) -> str:
    """Return so many words; the unique ones come first, because a prefix cache matches from the left."""
    rest = random.Random(digest).choices(WORDS, k=words - KEY_WORDS)
    return " ".join([*(WORDS[byte] for byte in digest[:KEY_WORDS]), *rest])


def _picture(digest: bytes, image: int, size: tuple[int, int]) -> str:
    """Return a data URL of a JPEG like no other: its size's noise with 64 bits of the key stamped into a corner.

    What a picture shows does not change its cost; its size and novelty do. A server may know pictures by their pixels,
    so the stamp is made of those, in 3 x 3 squares of black and white that JPEG keeps apart.
    """
    key = np.frombuffer(hashlib.sha256(digest + image.to_bytes(2, "big")).digest()[:8], np.uint8)
    stamp = Image.fromarray(np.kron(np.unpackbits(key).reshape(8, 8), np.full((3, 3), 255, np.uint8)))
    picture = _noise(size).copy()
    picture.paste(stamp, (0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@lru_cache(maxsize=16)
def _noise(size: tuple[int, int]) -> Image.Image:
    """Return smooth colour noise, about as many bytes a pixel in JPEG as a photograph."""
    width, height = size
    coarse = np.random.default_rng(0).integers(0, 256, (max(2, height // 14), max(2, width // 14), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True, slots=True)
class Preset:
    """A workload by name. The lengths are choices that stand for a use, not statistics of one.

    Attributes:
        use: what it stands for, with the tokens its pictures cost Qwen2-VL (one for 28 x 28 pixels).
    """

    use: str
    sizes: tuple[ImageSize, ...]
    images: Lengths
    prompt_tokens: Lengths
    output_tokens: Lengths

    def inputs(self, nonce: str) -> SpeedInputs:
        """Return what makes its requests."""
        return SpeedInputs(nonce, self.sizes, self.output_tokens, self.prompt_tokens, self.images)


def _lognormal(median: int, sigma: float, least: int) -> Lengths:
    return parse_lengths(f"lognormal:{median}:{sigma}", "preset", least=least)


PRESETS: dict[str, Preset] = {
    "chat": Preset(
        "a question of a few sentences about one picture of 448x448 (256 tokens), an answer of a paragraph",
        ((448, 448),),
        Lengths.fixed(1),
        _lognormal(64, 0.6, KEY_WORDS),
        _lognormal(128, 0.5, 2),
    ),
    "ocr-document": Preset(
        "a scanned page of 1092x1540 (2145 tokens) or 1540x1092, a short instruction, the page's text as the answer",
        ((1092, 1540), (1540, 1092)),
        Lengths.fixed(1),
        Lengths.fixed(32),
        _lognormal(512, 0.4, 2),
    ),
    "multi-image": Preset(
        "2 to 6 pictures of 448x448 (256 tokens), 336x252 (108) and 252x336 in a request, a short answer about all",
        ((448, 448), (336, 252), (252, 336)),
        Lengths(2, 6),
        Lengths.fixed(64),
        Lengths.fixed(64),
    ),
}
