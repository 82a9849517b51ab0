"""Training batches from worker processes: images through shared memory, the rest through a queue.

No torch here: workers are forked before a GPU is touched, and never touch one.
"""

from __future__ import annotations

import mmap
import multiprocessing as mp
import queue
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.demo.prompt import Packed, pack
from toolkit.tasks import questions

__all__ = ["ASKED", "SIZES", "TRAIN_TASKS", "Batch", "Feed", "FeedSettings", "Shape"]

#: Tasks that are drawn in training; ``text`` has no image.
TRAIN_TASKS = (*(task for task in questions.TASKS if task != "unseen_words"), *questions.PRACTICE, "text")
#: Suffix lengths (question + answer) in ids. Each kind is a batch of its own, so that short ones are not padded up.
_LENGTHS = {"short": 36, "long": 56, "text": 40}
_LONG = ("where", "scene", "bar_list", "bar_table")
_KINDS: dict[str, tuple[str, ...]] = {
    "short": tuple(task for task in TRAIN_TASKS if task not in (*_LONG, "text")),
    "long": _LONG,
    "text": ("text",),
}
#: A third of all pairs of sides, each side in three of them: fewer shapes to capture, all positions seen.
SIZES = tuple((w, h) for i, w in enumerate(questions.SIDES) for j, h in enumerate(questions.SIDES) if (i + j) % 3 == 0)
#: How often a task is drawn, before its error is taken into account.
ASKED: dict[str, float] = {
    "colour_shape": 0.7,
    "counting": 1.0,
    "where": 1.0,
    "digits": 1.2,
    "words": 2.2,
    "bars": 1.2,
    "handwritten": 0.6,
    "scene": 0.6,
    "bar_list": 0.5,
    "bar_table": 0.9,
    "spelling": 0.8,
    "text": 0.3,
}


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What batches have in common that one CUDA graph can run: image size (0 x 0: none), batch, suffix length."""

    width: int
    height: int
    batch: int
    length: int

    @property
    def pixels(self) -> int:
        """Bytes of the batch's images."""
        return self.batch * self.height * self.width * 3

    @property
    def grid(self) -> tuple[int, int]:
        """Merged patches down and across."""
        return self.height // 28, self.width // 28


@dataclass(frozen=True, slots=True)
class FeedSettings:
    """How much is drawn at once and by how many processes."""

    seed: int
    workers: int
    slots: int
    patches: int = 57_344
    most: int = 448

    def batch(self, width: int, height: int) -> int:
        """Return how many questions make a batch of this image size: as many as ``patches`` allow."""
        return self.most if not width else max(1, min(self.most, self.patches * 196 // (width * height)))

    @property
    def slot_bytes(self) -> int:
        """Bytes that the largest batch's images need."""
        return max(self.batch(w, h) * w * h * 3 for w, h in SIZES)


@dataclass(slots=True)
class Batch:
    """A batch as it comes from a worker; ``pixels`` uint8 [B, H, W, 3] lives in shared memory until released."""

    slot: int
    shape: Shape
    packed: Packed
    tasks: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.uint8]


class Feed:
    """Worker processes that draw training questions without end."""

    def __init__(self, settings: FeedSettings) -> None:
        self.settings = settings
        context: Any = mp.get_context("fork")
        self._slots = [mmap.mmap(-1, settings.slot_bytes) for _ in range(settings.slots)]
        self._free = context.Queue()
        self._ready = context.Queue()
        self._weights = context.Array("d", [ASKED[task] for task in TRAIN_TASKS], lock=False)
        for slot in range(settings.slots):
            self._free.put(slot)
        questions.warm_up()
        self._workers = [
            context.Process(target=self._work, args=(number,), daemon=True) for number in range(settings.workers)
        ]
        for worker in self._workers:
            worker.start()

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Set how often each task is drawn from now on."""
        for index, task in enumerate(TRAIN_TASKS):
            self._weights[index] = weights.get(task, self._weights[index])

    def get(self, timeout: float) -> Batch:
        """Return the next batch; ``queue.Empty`` after ``timeout`` seconds, ``RuntimeError`` when a worker died."""
        try:
            slot, shape, packed, tasks = self._ready.get(timeout=timeout)
        except queue.Empty:
            if any(worker.exitcode for worker in self._workers):
                raise RuntimeError("a process that draws training images died") from None
            raise
        view = np.frombuffer(self._slots[slot], np.uint8, shape.pixels)
        return Batch(slot, shape, packed, tasks, view.reshape(shape.batch, shape.height, shape.width, 3))

    def release(self, batch: Batch) -> None:
        """Give a batch's shared memory back to the workers. Its pixels must not be read any more."""
        self._free.put(batch.slot)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join(timeout=5)
        for channel in (self._free, self._ready):
            channel.cancel_join_thread()

    def _work(self, number: int) -> None:
        """Fill free slots for ever; ``number`` makes this worker's random numbers its own."""
        rng = random.Random(f"train/{self.settings.seed}/worker {number}")
        while True:
            slot = self._free.get()
            weights = dict(zip(TRAIN_TASKS, self._weights, strict=True))
            kind = rng.choices(list(_KINDS), [sum(weights[task] for task in tasks) for tasks in _KINDS.values()])[0]
            size = (0, 0) if kind == "text" else rng.choice(SIZES)
            fitting = [task for task in _KINDS[kind] if questions.fits(task, *size)]
            shape = Shape(*size, self.settings.batch(*size), _LENGTHS[kind])
            tasks = rng.choices(fitting, [weights[task] for task in fitting], k=shape.batch)
            self._ready.put((slot, shape, self._draw(rng, slot, shape, tasks), _numbers(tasks)))

    def _draw(self, rng: random.Random, slot: int, shape: Shape, tasks: list[str]) -> Packed:
        """Draw one question for each of ``tasks``: images into the slot, texts into what is returned."""
        if not shape.width:
            asked = [questions.text_question(rng) for _ in tasks]
            return pack([q for q, _ in asked], [a for _, a in asked], image=False, length=shape.length)
        pixels = np.frombuffer(self._slots[slot], np.uint8, shape.pixels)
        pixels = pixels.reshape(shape.batch, shape.height, shape.width, 3)
        drawn = []
        for row, task in enumerate(tasks):
            item = questions.draw(rng, task, shape.width, shape.height, "train")
            pixels[row] = np.asarray(item.image)
            drawn.append(item)
        return pack([p.question for p in drawn], [p.answer for p in drawn], length=shape.length)


def _numbers(tasks: list[str]) -> npt.NDArray[np.int64]:
    return np.array([TRAIN_TASKS.index(task) for task in tasks], np.int64)
