"""Held-out questions for the fast model: drawn once, asked during and after training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from toolkit.demo.model import TinyQwen2VL, normalize
from toolkit.demo.prompt import END, PAD, answer_text, pack, prefix
from toolkit.tasks.questions import PRACTICE, SIDES, TASKS, ImageQuestion, fits, question

__all__ = ["Quiz", "Score", "decode", "is_right", "make_quiz", "score"]

#: The longest answer in ids, of tasks that ask for lists and of the others.
_LONGEST_LIST, _LONGEST_ANSWER = 40, 12
#: So many wrong answers a task are kept to look at.
_WRONG_KEPT = 8
#: Held-out questions by image size.
Quiz = dict[tuple[int, int], list[ImageQuestion]]


@dataclass(slots=True)
class Score:
    """(Right answers, questions asked) by task, and some of the wrong answers."""

    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, item: ImageQuestion, answer: str) -> None:
        """Count one answer."""
        good = is_right(item, answer)
        right, asked = self.right.get(item.task, (0, 0))
        self.right[item.task] = (right + good, asked + 1)
        wrong = self.wrong.setdefault(item.task, [])
        if not good and len(wrong) < _WRONG_KEPT:
            size = f"{item.image.width}x{item.image.height}"
            wrong.append({"size": size, "question": item.question, "answer": answer, "right": item.answer})

    def accuracy(self) -> dict[str, float]:
        """Return the share of right answers by task."""
        return {task: round(right / asked, 4) for task, (right, asked) in self.right.items()}


def is_right(item: ImageQuestion, answer: str) -> bool:
    """Say whether an answer is right: equal text, or for ``relaxed`` a number within 5%."""
    if item.metric == "relaxed":
        try:
            return abs(float(answer) - float(item.answer)) <= 0.05 * abs(float(item.answer)) + 1e-9
        except ValueError:
            return False
    return answer.strip() == item.answer


def make_quiz(per_task: int, seed: int, tasks: Sequence[str] = (*TASKS, *PRACTICE), sizes: int = 8) -> Quiz:
    """Draw ``per_task`` held-out questions a task in ``sizes`` image sizes, grouped by size."""
    every = [(width, height) for width in SIDES for height in SIDES]
    chosen = [(224, 224), *random.Random("sizes").sample(every, sizes - 1)]
    quiz: Quiz = {}
    for task in tasks:
        fitting = [size for size in chosen if fits(task, *size)]
        for index in range(per_task):
            size = fitting[index % len(fitting)]
            quiz.setdefault(size, []).append(question(task, "held-out", seed, index, size))
    return quiz


@torch.no_grad()
def decode(model: TinyQwen2VL, items: Sequence[ImageQuestion]) -> list[str]:
    """Answer questions greedily; all images have one size. The prompt is read anew for every id: no cache to keep."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.stack([np.asarray(p.image) for p in items])).to(device)
    packed = pack([p.question for p in items], None)
    batch, length = packed.ids.shape
    longest = _LONGEST_LIST if any(p.task in PRACTICE for p in items) else _LONGEST_ANSWER
    ids = torch.full((batch, length + longest), PAD, device=device)
    ids[:, :length] = torch.from_numpy(packed.ids)
    at = torch.from_numpy(packed.starts).to(device)
    rows = torch.arange(batch, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    before = torch.tensor(prefix(True), device=device)
    grid = (pixels.shape[1] // 28, pixels.shape[2] // 28)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        image: Tensor = model.encode(normalize(pixels))
        for _ in range(longest):
            logits = model(before, image, grid, ids)
            chosen = torch.where(done, PAD, logits[rows, at - 1].argmax(-1))
            ids[rows, at] = chosen
            at = at + 1
            done |= chosen == END
            if bool(done.all()):
                break
    answers = ids.tolist()
    return [answer_text(row[int(start) :]) for row, start in zip(answers, packed.starts, strict=True)]


def score(model: TinyQwen2VL, quiz: Quiz, chunk: int = 512) -> Score:
    """Ask the whole quiz; short answers apart from lists, which take longer."""
    result = Score()
    for items in quiz.values():
        lists = [p for p in items if p.task in PRACTICE]
        short = [p for p in items if p.task not in PRACTICE]
        for group in (short, lists):
            for start in range(0, len(group), chunk):
                part = group[start : start + chunk]
                for item, answer in zip(part, decode(model, part), strict=True):
                    result.add(item, answer)
    return result
