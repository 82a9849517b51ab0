"""What the systems are asked: the questions, the items that fidelity is measured on, the user's own load."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.load.traffic import Traffic, read
from bench.questions import tasks
from bench.questions.datasets import LAYOUTS, load_dataset
from bench.questions.observe import Item, items_from_images, items_from_questions
from bench.questions.tasks import Question
from bench.run.config import DEMO, NONE, BenchConfig
from serve.settings.limits import Limits
from toolkit.errors import BenchError, ManifestError

__all__ = ["Dataset", "WriteDemo", "dataset", "items_of", "questions_of", "traffic_of"]

#: (directory, questions a task or None for the default) -> the file of questions written there.
WriteDemo = Callable[[Path, int | None], Path]


def items_of(config: BenchConfig, questions: Sequence[Question]) -> tuple[list[Item], str]:
    """Return what fidelity is measured on, and where it is from."""
    if config.images is not None:
        return items_from_images(config.images, config.image_prompt), f"images in {config.images}"
    count = min(config.fidelity, len(questions))
    # Evenly from all questions, which come task by task.
    chosen = [questions[number * len(questions) // count] for number in range(count)]
    return items_from_questions(chosen), "questions as above"


def traffic_of(config: BenchConfig) -> Traffic | None:
    """Return the user's own requests, where there are any, fit for what is asked.

    Raises:
        QvlError: they can't be read, have no times to be replayed at, or are fewer than the rounds of a replay.
    """
    if config.traffic is None:
        return None
    traffic = read(config.traffic, config.image_prompt)
    if config.replays:
        if not traffic.timed:
            raise BenchError(
                f"--replay: {config.traffic} does not say when its requests came ('at' in each line); use "
                "--concurrency or --rate, or record a trace with qvl serve --record"
            )
        traffic.stretch(0, config.rounds)
    return traffic


def questions_of(config: BenchConfig, stack: ExitStack, write_demo: WriteDemo) -> tuple[Sequence[Question], str | None]:
    """Return the questions, and where they are from.

    Args:
        stack: what the questions' images need is there until it closes.
    """
    if config.tasks == NONE:
        return [], None
    if config.tasks == DEMO:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvl-questions-")))
        return tasks.load_questions(write_demo(directory, config.per_task)), DEMO
    chosen = dataset(config.tasks)
    if chosen:
        shown = f"{chosen.name}, split {chosen.split} of {chosen.source}"
        found = load_dataset(chosen.name, chosen.source, split=chosen.split, per_task=config.per_task, seed=config.seed)
        return found, shown
    file = Path(config.tasks)
    if not file.exists():
        raise ManifestError(
            f"--tasks {config.tasks!r}: no such file of questions; pass FILE.jsonl, demo, none, or one of "
            f"{', '.join(LAYOUTS)} (alone, or as {next(iter(LAYOUTS))}:DIR@SPLIT)"
        )
    questions = tasks.load_questions(file, limits=_limits(config))
    if config.per_task is not None:
        questions = tasks.pick(questions, config.per_task, config.seed)
    return questions, file.name


def _limits(config: BenchConfig) -> Limits | None:
    """Return a guard's limits where a system is a server that others booted; those that are booted here have none."""
    given = (config.baseline, config.candidate)
    return Limits() if any(str(system).startswith(("http://", "https://")) for system in given) else None


@dataclass(frozen=True, slots=True)
class Dataset:
    """A set of questions, where it is read from, and its split."""

    name: str
    source: str
    split: str


def dataset(text: str) -> Dataset | None:
    """Read ``NAME[:SOURCE][@SPLIT]`` with NAME in `datasets.LAYOUTS`; None when it is something else.

    Raises:
        ManifestError: nothing stands after the colon or the @.
    """
    match = re.match(rf"({'|'.join(LAYOUTS)})(?=[:@]|$)", text)
    if not match:
        return None
    layout, rest = LAYOUTS[match[1]], text[match.end() :]
    source, at, split = rest, "", layout.split
    if "@" in rest and not (rest.startswith(":") and Path(rest[1:]).is_dir()):  # an @ may be part of a directory's name
        source, at, split = rest.rpartition("@")
    if source == ":" or (at and not split):
        raise ManifestError(f"--tasks {text!r}: write {match[1]}[:DIR or hub id][@SPLIT]")
    return Dataset(match[1], source[1:] or layout.hub_id, split)
