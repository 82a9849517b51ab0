"""Questions about images: one seeded generator a task.

The stream of random numbers is keyed by split, seed, task and index, so training, calibration and held-out
questions never share one, and any question can be drawn again by itself. Two tasks also keep their subject apart:
``unseen_words`` shows only words that no training image shows, ``handwritten`` only scans that training never saw.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from PIL import Image, ImageDraw

from toolkit.tasks import drawing
from toolkit.tasks.drawing import COLOURS, SHAPES, NoRoom
from toolkit.tasks.words import UNSEEN_WORDS, WORDS, pseudo_word

__all__ = [
    "PRACTICE",
    "SIDES",
    "TASKS",
    "ImageQuestion",
    "Split",
    "draw",
    "fits",
    "question",
    "random_size",
    "text_question",
    "warm_up",
]

Split = Literal["train", "held-out"]

#: The tasks that held-out questions are asked about.
TASKS = ("colour_shape", "counting", "where", "digits", "words", "unseen_words", "bars", "handwritten")
#: Lists of all that an image shows, trained on besides: dense answers teach what the short questions need.
PRACTICE = ("scene", "bar_list", "bar_table", "spelling")
#: Sides of images in pixels: multiples of 28, one merged patch, so that no processor resizes them.
SIDES = tuple(range(112, 337, 28))
#: Charts need room for their axis labels.
_CHART_SIDE = 168
_CHARTS = ("bars", "bar_list", "bar_table")
#: scikit-learn's digits: the first scans train, the last 400 are held out.
_HELD_OUT_SCANS = 400


@dataclass(frozen=True, slots=True)
class ImageQuestion:
    """An image, a question about it and the one right answer.

    ``metric`` says how an answer is scored: ``exact``, or ``relaxed`` (a number within 5%).
    """

    task: str
    image: Image.Image
    question: str
    answer: str
    metric: str = "exact"


def random_size(rng: random.Random, task: str) -> tuple[int, int]:
    """Return a width and a height that suit the task."""
    sides = [side for side in SIDES if side >= _CHART_SIDE] if task in _CHARTS else SIDES
    return rng.choice(sides), rng.choice(sides)


def fits(task: str, width: int, height: int) -> bool:
    """Say whether the task can be drawn at this size."""
    return task not in _CHARTS or min(width, height) >= _CHART_SIDE


def question(task: str, split: Split, seed: int, index: int, size: tuple[int, int] | None = None) -> ImageQuestion:
    """Draw question ``index`` of a task: the same image for the same arguments, whatever was drawn before."""
    rng = random.Random(f"{split}/{seed}/{task}/{index}")
    width, height = size or random_size(rng, task)
    return draw(rng, task, width, height, split)


def draw(rng: random.Random, task: str, width: int, height: int, split: Split) -> ImageQuestion:
    """Draw the next question of a task (one of ``TASKS`` or ``PRACTICE``), ``width`` x ``height`` pixels, RGB."""
    painter = _PAINTERS[task]
    while True:
        try:
            return painter(rng, width, height, split)
        except NoRoom:
            continue


def warm_up() -> None:
    """Load what every image may need, so that forked processes share it."""
    _scans()
    for name in drawing.TEXT_FONTS:
        drawing.font(name, 40)
    pseudo_word(random.Random(0))


# ---- objects ---------------------------------------------------------------------------------------------------

_Thing = tuple[str, str]  # colour, shape


def _paint(rng: random.Random, width: int, height: int, things: list[_Thing], spots: list[drawing.Spot]) -> Image.Image:
    image, pen = drawing.canvas(rng, width, height, [colour for colour, _ in things])
    for (colour, shape), spot in zip(things, spots, strict=True):
        drawing.draw_shape(pen, shape, spot, drawing.jitter(rng, COLOURS[colour]))
    return image


def _distinct(rng: random.Random, count: int) -> list[_Thing]:
    return rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)


def _colour_shape(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    count = 1 if rng.random() < 0.6 else rng.randint(2, 3)
    things = list(zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count), strict=True))
    colour, shape = things[0]
    if count == 1:
        spots = drawing.place(rng, width, height, 1, 0.14, 0.4)
        asked, answer = rng.choice(
            [
                ("What is in the picture?", f"{colour} {shape}"),
                ("What colour is the shape?", colour),
                ("Which shape is this?", shape),
            ]
        )
    else:
        spots = drawing.place(rng, width, height, count, 0.13, 0.24)
        asked, answer = rng.choice([(f"What colour is the {shape}?", colour), (f"Which shape is {colour}?", shape)])
    return ImageQuestion("colour_shape", _paint(rng, width, height, things, spots), asked, answer)


def _counting(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    colours = list(COLOURS)
    count = rng.randint(1, 5)
    if rng.random() < 0.7:
        things = [(rng.choice(colours), rng.choice(SHAPES)) for _ in range(count)]
        if rng.random() < 0.4:
            things = [things[0]] * count
        asked = rng.choice(["How many shapes are in the picture?", "How many objects are there?", "Count the shapes."])
        answer = count
    else:
        count = max(2, count)
        answer = rng.randint(1, count)
        shape = rng.choice(SHAPES)
        others = [other for other in SHAPES if other != shape]
        things = [(rng.choice(colours), shape) for _ in range(answer)]
        things += [(rng.choice(colours), rng.choice(others)) for _ in range(count - answer)]
        asked = f"How many {_plural(shape)} are there?"
    spots = drawing.place(rng, width, height, count, 0.1, 0.17 if count > 3 else 0.24)
    return ImageQuestion("counting", _paint(rng, width, height, things, spots), asked, str(answer))


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _where(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    things = _distinct(rng, rng.choice([2, 2, 3]))
    sideways = rng.random() < 0.5
    while True:
        spots = drawing.place(rng, width, height, len(things), 0.11, 0.18)
        dx, dy = spots[0][0] - spots[1][0], spots[0][1] - spots[1][1]
        if sideways and abs(dx) > 1.4 * abs(dy):
            answer = "left" if dx < 0 else "right"
            break
        if not sideways and abs(dy) > 1.4 * abs(dx):
            answer = "top" if dy < 0 else "bottom"
            break
    (colour, shape), (other_colour, other_shape) = things[:2]
    asked = f"On which side of the {other_colour} {other_shape} is the {colour} {shape}?"
    return ImageQuestion("where", _paint(rng, width, height, things, spots), asked, answer)


def _scene(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    things = _distinct(rng, rng.randint(1, 4))
    for _ in range(50):
        spots = sorted(drawing.place(rng, width, height, len(things), 0.1, 0.18))
        if all(right[0] - left[0] > 10 for left, right in itertools.pairwise(spots)):
            break
    else:
        raise NoRoom("shapes stand above each other")
    answer = ", ".join(f"{colour} {shape}" for colour, shape in things)
    return ImageQuestion(
        "scene", _paint(rng, width, height, things, spots), "List the shapes from left to right.", answer
    )


# ---- reading ---------------------------------------------------------------------------------------------------


def _written(rng: random.Random, width: int, height: int, text: str) -> Image.Image:
    """Write ``text`` somewhere, in any font and any size of at least 20 px that fits, with contrast to the paper."""
    paper = drawing.background(rng, 0.3)
    ink = drawing.ink_for(rng, paper)
    if rng.random() < 0.5:
        while True:
            ink = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
            if abs(drawing.luminance(ink) - drawing.luminance(paper)) > 110:
                break
    name = rng.choice(drawing.TEXT_FONTS)
    widest = int(40 * (width - 10) / drawing.font(name, 40).getlength(text))
    largest = max(16, min(64, int(height * 0.6), widest))
    # Even sizes only: each one is a font object that stays loaded.
    size = rng.randint(min(20, largest), largest) // 2 * 2
    face = drawing.font(name, size)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=face)
    x = rng.uniform(2, max(3, width - (right - left) - 3)) - left
    y = rng.uniform(2, max(3, height - (bottom - top) - 3)) - top
    pen.text((x, y), text, font=face, fill=ink)
    if rng.random() < 0.15:
        upper = (max(0, x + left - 5), max(0, y + top - 4))
        lower = (min(width - 1, x + right + 5), min(height - 1, y + bottom + 4))
        pen.rectangle((*upper, *lower), outline=ink)
    return image


def _digits(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    number = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    asked = rng.choice(["What number is written?", "Read the number.", "Which number is shown?"])
    return ImageQuestion("digits", _written(rng, width, height, number), asked, number)


def _read_word(task: str, rng: random.Random, width: int, height: int, word: str) -> ImageQuestion:
    asked = rng.choice(["What word is written?", "Read the word.", "Which word is shown?"])
    return ImageQuestion(task, _written(rng, width, height, word), asked, word)


def _words(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    made_up = split == "train" and rng.random() < 0.65
    return _read_word("words", rng, width, height, pseudo_word(rng) if made_up else rng.choice(WORDS))


def _unseen_words(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    if split == "train":
        raise ValueError("unseen_words are held out: training never draws them")
    return _read_word("unseen_words", rng, width, height, rng.choice(UNSEEN_WORDS))


def _spelling(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    word = rng.choice(WORDS) if rng.random() < 0.25 else pseudo_word(rng)
    return ImageQuestion(
        "spelling", _written(rng, width, height, word), "Spell the word that is written.", " ".join(word)
    )


# ---- bar charts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chart:
    image: Image.Image
    labels: str
    colours: list[str]
    values: list[int]


def _chart(rng: random.Random, width: int, height: int) -> _Chart:
    """Draw 2 to 4 bars of different colours, labelled from A on, over an axis from 0 to 10, 20, 50 or 100."""
    top_value = rng.choice([10, 20, 50, 100])
    step = {10: 1, 20: 2, 50: 5, 100: 10}[top_value] if rng.random() < 0.5 else {10: 1, 20: 1, 50: 5, 100: 5}[top_value]
    count = rng.randint(2, 4)
    values = [rng.randint(1, top_value // step) * step for _ in range(count)]
    colours = rng.sample(list(COLOURS), count)
    labels = "ABCD"[:count]

    paper = drawing.jitter(rng, (248, 248, 248), 7)
    ink = (30, 30, 30)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    size = rng.choice([12, 13, 14])
    face = drawing.font(rng.choice(drawing.CHART_FONTS), size)
    left, right = int(face.getlength(str(top_value))) + 8, width - 5
    bottom, top = height - size - 9, rng.randint(8, 14)

    def level(value: float) -> float:
        return bottom - (bottom - top) * value / top_value

    grid = rng.random() < 0.7
    for tick in range(0, top_value + 1, top_value // 5):
        y = level(tick)
        if grid:
            pen.line((left, y, right, y), fill=(205, 205, 205))
        pen.line((left - 3, y, left, y), fill=ink)
        pen.text((left - 5 - face.getlength(str(tick)), y - size * 0.62), str(tick), font=face, fill=ink)
    pitch = (right - left) / count
    half = pitch * rng.uniform(0.45, 0.8) / 2
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        centre = left + pitch * (i + 0.5)
        fill = drawing.jitter(rng, COLOURS[colour], 10)
        pen.rectangle((centre - half, level(value), centre + half, bottom), fill=fill)
        pen.text((centre - face.getlength(labels[i]) / 2, bottom + 2), labels[i], font=face, fill=ink)
    pen.line((left, top, left, bottom), fill=ink)
    pen.line((left, bottom, right, bottom), fill=ink)
    return _Chart(image, labels, colours, values)


def _bars(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    chart = _chart(rng, width, height)
    at = rng.randrange(len(chart.values))
    label, colour = chart.labels[at], chart.colours[at]
    asked = rng.choice(
        [
            f"What is the value of bar {label}?",
            f"How high is bar {label}?",
            f"What is the value of the {colour} bar?",
        ]
    )
    return ImageQuestion("bars", chart.image, asked, str(chart.values[at]), metric="relaxed")


def _bar_list(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    chart = _chart(rng, width, height)
    return ImageQuestion("bar_list", chart.image, "List the values of the bars.", ", ".join(map(str, chart.values)))


def _bar_table(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    """Name each bar before its value, by label or by colour: what one bar's question has to bind."""
    chart = _chart(rng, width, height)
    by_label = rng.random() < 0.5
    asked = "List the labels and values of the bars." if by_label else "List the colours and values of the bars."
    names: list[str] | str = chart.labels if by_label else chart.colours
    answer = ", ".join(f"{name} {value}" for name, value in zip(names, chart.values, strict=True))
    return ImageQuestion("bar_table", chart.image, asked, answer)


# ---- handwriting -----------------------------------------------------------------------------------------------


@cache
def _scans() -> tuple[Any, Any]:
    """Return scikit-learn's digits: uint8 [1797, 8, 8], 0 to 255, and their labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).astype("uint8"), data.target


def _handwritten(rng: random.Random, width: int, height: int, split: Split) -> ImageQuestion:
    scans, labels = _scans()
    first_held_out = len(labels) - _HELD_OUT_SCANS
    at = rng.randrange(first_held_out) if split == "train" else rng.randrange(first_held_out, len(labels))
    side = int(min(width, height) * rng.uniform(0.5, 0.9))
    resample = rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    stroke = Image.fromarray(scans[at]).resize((side, side), resample)
    if split == "train":
        stroke = _slant(rng, stroke)
    paper = drawing.background(rng, 0.4)
    ink = drawing.ink_for(rng, paper)
    if rng.random() < 0.3:
        name = rng.choice(["blue", "red", "purple"]) if drawing.luminance(paper) > 128 else "yellow"
        ink = drawing.jitter(rng, COLOURS[name])
    image = Image.new("RGB", (width, height), paper)
    corner = (rng.randint(0, width - side), rng.randint(0, height - side))
    image.paste(Image.new("RGB", (side, side), ink), corner, stroke)
    asked = rng.choice(["Which digit is handwritten?", "What handwritten digit is this?"])
    return ImageQuestion("handwritten", image, asked, str(int(labels[at])))


def _slant(rng: random.Random, stroke: Image.Image) -> Image.Image:
    """Turn, shear and stretch a scan a little: 1,397 of them are few."""
    angle, shear = math.radians(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    zoom_x, zoom_y = rng.uniform(0.88, 1.15), rng.uniform(0.88, 1.15)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = zoom_x * cos + shear * sin, sin * zoom_x + shear
    d, e = -sin * zoom_y, cos * zoom_y
    mid = stroke.width / 2
    matrix = (a, b, mid - a * mid - b * mid, d, e, mid - d * mid - e * mid)
    return stroke.transform(stroke.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


_PAINTERS: dict[str, Callable[[random.Random, int, int, Split], ImageQuestion]] = {
    "colour_shape": _colour_shape,
    "counting": _counting,
    "where": _where,
    "digits": _digits,
    "words": _words,
    "unseen_words": _unseen_words,
    "bars": _bars,
    "handwritten": _handwritten,
    "scene": _scene,
    "bar_list": _bar_list,
    "bar_table": _bar_table,
    "spelling": _spelling,
}


# ---- no image ------------------------------------------------------------------------------------------------


def text_question(rng: random.Random) -> tuple[str, str]:
    """Return a question without an image and its answer: spelling, joining letters, small sums."""
    kind = rng.random()
    if kind < 0.5:
        word = rng.choice(WORDS) if rng.random() < 0.4 else pseudo_word(rng)
        spelled = " ".join(word)
        if kind < 0.25:
            return f"Spell the word {word}.", spelled
        return f"Which word is spelled {spelled}?", word
    if kind < 0.75:
        word = rng.choice(WORDS) if rng.random() < 0.4 else pseudo_word(rng)
        return f"Repeat the word {word}.", word
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"What is {a} plus {b}?", str(a + b)
