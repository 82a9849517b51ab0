"""The README's images, drawn from held-out questions and the embedded model's own answers to them.

``python -m toolkit.demo gallery`` writes shapes.png, which ``make ask`` shows, and tasks.png: the first question of
each task, then the first ones that the model gets wrong.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from toolkit.demo.evaluate import Reader
from toolkit.demo.quiz import is_right
from toolkit.paths import demo_checkpoint
from toolkit.tasks.manifests import TASKS_SEED
from toolkit.tasks.questions import TASKS, ImageQuestion, question

__all__ = ["draw_gallery", "shapes_image"]

#: An image with five shapes of five colours, chosen by eye.
_SHAPES_INDEX = 268
_COLUMNS = 4
#: Mistakes are looked for among so many questions a task.
_SEARCHED = 60
_GREEN, _RED = "#1a7f37", "#b42318"


def shapes_image() -> ImageQuestion:
    """Return the question behind docs/images/shapes.png."""
    return question("counting", "held-out", TASKS_SEED, _SHAPES_INDEX, (336, 224))


def draw_gallery(entries: Sequence[tuple[ImageQuestion, str]], out: Path) -> None:
    """Draw images with question, right answer and the model's answer to a PNG file, four a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = -(-len(entries) // _COLUMNS)
    figure = Figure(figsize=(10, 3.3 * rows), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (item, answer) in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, entries, strict=False):
        width, height = item.image.size
        axes.imshow(item.image, interpolation="lanczos", extent=(0, width, height, 0))
        # Every image fills a square of its longer side, at the bottom where it is lower than wide.
        side = max(width, height)
        axes.set(xlim=((width - side) / 2, (width + side) / 2), ylim=(height, height - side), xticks=[], yticks=[])
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor="#bbbbbb", linewidth=0.8))
        question_lines = textwrap.fill(item.question, 34)
        axes.text(0.5, 1.20, item.task, transform=axes.transAxes, ha="center", va="top", fontsize=8, color="#777777")
        axes.text(0.5, 1.14, question_lines, transform=axes.transAxes, ha="center", va="top", fontsize=9)
        good = is_right(item, answer)
        axes.set_xlabel(
            answer if good else f"{answer}  (right: {item.answer})", color=_GREEN if good else _RED, weight="bold"
        )
    for axes in figure.axes:
        axes.spines[:].set_visible(False)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.935, bottom=0.035, wspace=0.12, hspace=0.38)
    figure.savefig(out)


def _entries(reader: Reader) -> list[tuple[ImageQuestion, str]]:
    """Return the first question of each task, then the first wrong ones of different tasks to fill another row."""
    first: list[tuple[ImageQuestion, str]] = []
    wrong: list[tuple[ImageQuestion, str]] = []
    for task in TASKS:
        asked = [question(task, "held-out", TASKS_SEED, index) for index in range(_SEARCHED)]
        answered = list(zip(asked, reader.ask(asked), strict=True))
        first.append(answered[0])
        wrong += [(p, answer) for p, answer in answered[1:] if not is_right(p, answer)][:1]
    return first + wrong[:_COLUMNS]


def draw(out: Path) -> None:
    """Draw shapes.png and tasks.png into ``out`` and print what the embedded model says of the first."""
    out.mkdir(parents=True, exist_ok=True)
    shapes_image().image.save(out / "shapes.png", optimize=True)
    reader = Reader(demo_checkpoint())
    print("shapes.png:", *reader.ask([shapes_image()]))
    draw_gallery(_entries(reader), out / "tasks.png")
