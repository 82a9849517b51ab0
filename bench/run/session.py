"""One `qvl bench` from its settings to what was measured: questions, servers, the two systems in turns."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.load.endpoint import discover
from bench.questions import tasks
from bench.questions.datasets import LAYOUTS, load_dataset
from bench.questions.observe import Item, items_from_images, items_from_questions
from bench.questions.tasks import Question
from bench.roles import ROLES, Role
from bench.run.boot import Abort, Here, Start, booted
from bench.run.config import NONE, Settings, is_url
from bench.run.journal import Journal
from bench.run.measure import Progress, measure
from bench.run.measured import Measurements
from bench.run.systems import SystemInfo, described, info, reached, warnings
from toolkit.errors import BenchError, ManifestError

__all__ = ["Dataset", "Outcome", "dataset", "measured"]

DEMO = "demo"


class Booter(Protocol):
    """Knows how servers are started."""

    @property
    def at_once(self) -> bool:
        """Whether servers may boot at the same time."""

    def boot(self, source: str) -> tuple[Start, Abort]:
        """Return how to start a server for a directory, hub id or ``demo``, and how to end it while it boots."""


#: URL -> the server of `qvl serve --detach` that listens there, on this machine.
FindHere = Callable[[str], Here | None]
#: (directory, questions a task or None for the default) -> the file of questions written there.
WriteDemo = Callable[[Path, int | None], Path]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        questions_source: where the questions are from; None without any.
        items: what fidelity was measured on.
        items_source: where they are from.
        interleaved: whether the systems took turns.
        interrupted: Ctrl-C came before all was measured.
        warnings: what a reader should know about the run.
    """

    measured: Measurements
    systems: dict[Role, SystemInfo]
    questions: Sequence[Question]
    questions_source: str | None
    items: Sequence[Item]
    items_source: str
    interleaved: bool
    interrupted: bool
    duration_s: float
    warnings: tuple[str, ...]


@contextmanager
def measured(
    settings: Settings,
    *,
    boot: Booter,
    write_demo: WriteDemo,
    progress: Progress,
    find_here: FindHere = lambda url: None,
    out: Path | None = None,
    resume: bool = False,
    logs: list[Path] | None = None,
) -> Iterator[Outcome]:
    """Measure and hand over what came out, which may be failures, or a part when Ctrl-C came. The images of the demo's
    questions are there until the context ends.

    Args:
        boot: starts servers for what is no URL.
        write_demo: writes the demo's questions.
        find_here: finds a given URL's server on this machine, whose memory and checkpoint can then be told.
        out: directory in which measurements are kept as they come; None keeps none.
        resume: go on with what is kept there.
        logs: filled with the logs of servers that were started.

    Raises:
        QvlError: what is asked for can't be measured: nothing was, and there is no report.
        KeyboardInterrupt: Ctrl-C came before anything was measured.
    """
    clock = _Clock()
    with ExitStack() as stack:
        questions, source = _questions(settings, stack, write_demo)
        items, items_source = _items(settings, questions)
        if not (questions or items or settings.plan.measures_speed):
            raise BenchError("nothing to measure: --tasks none, no --images, and no load (--concurrency none)")
        journal = Journal(out, settings.asked(questions, items)) if out else None
        found = journal.resume() if journal and resume else Measurements()
        if journal:
            stack.callback(journal.close)
        # Servers that are there already are asked before any is started.
        for role in ROLES:
            if is_url(settings.sources[role]):
                asyncio.run(discover(settings.sources[role], settings.api_key))
        here = {role: find_here(settings.sources[role]) for role in ROLES if is_url(settings.sources[role])}
        local: list[Role] = [role for role in ROLES if not is_url(settings.sources[role])]
        together = settings.side_by_side or len(local) < 2
        groups: list[list[Role]] = [list(ROLES)] if together else [[role] for role in ROLES]
        infos: dict[Role, SystemInfo] = {}
        interrupted = False
        for group in groups:
            starts = {role: boot.boot(settings.sources[role]) for role in group if role in local}
            with booted(starts, at_once=bool(starts) and boot.at_once) as servers:
                if logs is not None:
                    logs += [server.log for server in servers.values()]
                known = {role: servers.get(role) or here.get(role) for role in group}
                systems = [reached(role, settings, servers.get(role), known[role]) for role in group]
                try:
                    asyncio.run(
                        measure(
                            systems,
                            questions,
                            settings.plan,
                            items=items,
                            found=found,
                            keep=journal,
                            progress=progress,
                        )
                    )
                except KeyboardInterrupt:
                    if found.empty:
                        raise
                    interrupted = True
                infos |= {s.role: info(s, settings, known[s.role], found) for s in systems}
            if found.failures or interrupted:
                break
        both = described(settings, infos)
        yield Outcome(
            measured=found,
            systems=both,
            questions=questions,
            questions_source=source,
            items=items,
            items_source=items_source,
            interleaved=together,
            interrupted=interrupted,
            duration_s=clock.seconds(),
            warnings=(
                *warnings(settings, both),
                *clock.doubts(),
                *(["the run was interrupted and went on: its parts were measured at different times"] * resume),
            ),
        )


class _Clock:
    """How long a run takes, by a clock that nobody sets; and whether the one on the wall was set meanwhile."""

    #: Seconds that the two may drift apart: what keeps a clock right moves it by less.
    STEP_S = 2.0

    def __init__(self) -> None:
        self._began, self._wall = time.monotonic(), time.time()

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def doubts(self) -> list[str]:
        """Say that the machine's clock was set, or the machine slept."""
        step = time.time() - self._wall - self.seconds()
        if abs(step) < self.STEP_S:
            return []
        return [
            f"the machine's clock moved by {step:+.0f} s against the time that passed: it was set, or the machine "
            "slept; times here are by a clock that is never set, but what ran while it slept is not to be trusted"
        ]


def _items(settings: Settings, questions: Sequence[Question]) -> tuple[list[Item], str]:
    """What fidelity is measured on, and where it is from."""
    if settings.images is not None:
        return items_from_images(settings.images, settings.image_prompt), f"pictures in {settings.images}"
    count = min(settings.fidelity, len(questions))
    # Evenly from all questions, which come task by task.
    chosen = [questions[number * len(questions) // count] for number in range(count)]
    return items_from_questions(chosen), "questions as above"


def _questions(settings: Settings, stack: ExitStack, write_demo: WriteDemo) -> tuple[Sequence[Question], str | None]:
    if settings.tasks == NONE:
        return [], None
    if settings.tasks == DEMO:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvl-questions-")))
        return tasks.load_questions(write_demo(directory, settings.per_task)), DEMO
    chosen = dataset(settings.tasks)
    if chosen:
        shown = f"{chosen.name}, split {chosen.split} of {chosen.source}"
        found = load_dataset(
            chosen.name, chosen.source, split=chosen.split, per_task=settings.per_task, seed=settings.seed
        )
        return found, shown
    file = Path(settings.tasks)
    if not file.exists():
        raise ManifestError(
            f"--tasks {settings.tasks!r}: no such file of questions; pass FILE.jsonl, demo, none, or one of "
            f"{', '.join(LAYOUTS)} (alone, or as {next(iter(LAYOUTS))}:DIR@SPLIT)"
        )
    questions = tasks.load_questions(file)
    if settings.per_task is not None:
        questions = tasks.pick(questions, settings.per_task, settings.seed)
    return questions, file.name


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
