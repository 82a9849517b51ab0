"""One `qvl bench` from its settings to what was measured: questions, servers, the two systems in turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.load.endpoint import discover
from bench.load.traffic import Traffic
from bench.questions import observe, tasks
from bench.questions.observe import Item
from bench.questions.tasks import Question
from bench.roles import ROLES, Role
from bench.run.asked import WriteDemo, items_of, questions_of, traffic_of
from bench.run.boot import Abort, Here, Start, booted
from bench.run.config import NONE, BenchConfig, is_url
from bench.run.journal import Journal
from bench.run.measure import measure
from bench.run.measured import Measurements
from bench.run.progress import Progress
from bench.run.systems import SystemInfo, described, info, reached, warnings
from toolkit.errors import BenchError

__all__ = ["Host", "Outcome", "measured"]


class Booter(Protocol):
    """Knows how servers are started."""

    @property
    def at_once(self) -> bool:
        """Whether servers may boot at the same time."""

    def boot(self, source: str) -> tuple[Start, Abort]:
        """Return how to start a server for a directory, hub id or ``demo``, and how to end it while it boots."""


def _nowhere(url: str) -> Here | None:
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine offers to a run.

    Attributes:
        boot: starts servers for what is no URL.
        write_demo: writes the demo's questions.
        find_here: finds a given URL's server on this machine, whose memory and checkpoint can then be told.
        logs: filled with the logs of servers that were started.
    """

    boot: Booter
    write_demo: WriteDemo
    find_here: Callable[[str], Here | None] = _nowhere
    logs: list[Path] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        questions_source: where the questions are from; None without any.
        items: what fidelity was measured on.
        items_source: where they are from.
        interleaved: whether the systems took turns.
        interrupted: Ctrl-C came before all was measured.
        traffic: what the load was made of; None: requests were made.
        warnings: what a reader should know about the run.
    """

    measured: Measurements
    systems: dict[Role, SystemInfo]
    questions: Sequence[Question] = ()
    questions_source: str | None = None
    items: Sequence[Item] = ()
    items_source: str = ""
    interleaved: bool = True
    interrupted: bool = False
    duration_s: float = 0.0
    traffic: Traffic | None = None
    warnings: Sequence[str] = ()


@contextmanager
def measured(config: BenchConfig, host: Host, progress: Progress) -> Iterator[Outcome]:
    """Measure and hand over what came out, which may be failures, or a part when Ctrl-C came. The images of the demo's
    questions are there until the context ends.

    Raises:
        QvlError: what is asked for can't be measured: nothing was, and there is no report.
        KeyboardInterrupt: Ctrl-C came before anything was measured.
    """
    clock = _Clock()
    with ExitStack() as stack:
        questions, questions_source = questions_of(config, stack, host.write_demo)
        items, items_source = items_of(config, questions)
        traffic = traffic_of(config)
        if not (questions or items or config.measures_speed):
            raise BenchError("nothing to measure: --tasks none, no --images, and no load (--concurrency none)")
        journal = Journal(config.out, _asked(config, questions, items, traffic))
        found = journal.resume() if config.resume else Measurements()
        stack.callback(journal.close)
        run = _Session(config, host, found, journal, progress)
        run.traffic = traffic
        run.measure(questions, items)
        systems = described(config, run.infos)
        went_on = ["the run was interrupted and went on: its parts were measured at different times"]
        yield Outcome(
            measured=found,
            systems=systems,
            questions=questions,
            questions_source=questions_source,
            items=items,
            items_source=items_source,
            interleaved=run.together,
            interrupted=run.interrupted,
            traffic=traffic,
            duration_s=clock.seconds(),
            warnings=(*warnings(config, systems), *clock.doubts(), *(went_on if config.resume else ())),
        )


def _asked(
    config: BenchConfig, questions: Sequence[Question], items: Sequence[Item], traffic: Traffic | None
) -> dict[str, str]:
    """What decides the measurement: a run goes on only where all is equal."""
    own = {"the traffic's SHA-256": traffic.digest} if traffic else {}
    return (
        config.asked()
        | own
        | {
            "the questions' SHA-256": tasks.digest(questions) if questions else NONE,
            "the SHA-256 of what fidelity is measured on": observe.digest(items),
        }
    )


class _Session:
    """Has servers for both systems, side by side or one after the other, and measures them.

    Attributes:
        infos: who was met.
    """

    def __init__(
        self, config: BenchConfig, host: Host, found: Measurements, journal: Journal, progress: Progress
    ) -> None:
        self.config, self.host, self.found, self.journal, self.progress = config, host, found, journal, progress
        self.infos: dict[Role, SystemInfo] = {}
        self.traffic: Traffic | None = None
        self.interrupted = False
        local = [role for role in ROLES if not is_url(config.sources[role])]
        self.local: list[Role] = local
        self.together = not config.sequential or len(local) < 2

    def measure(self, questions: Sequence[Question], items: Sequence[Item]) -> None:
        """Measure until all is, something failed, or Ctrl-C came."""
        sources = self.config.sources
        given = [role for role in ROLES if role not in self.local]
        # Servers that are there already are asked before any is started.
        for role in given:
            asyncio.run(discover(sources[role], self.config.key(role), model=self.config.models[role]))
        here = {role: self.host.find_here(sources[role]) for role in given}
        groups: list[list[Role]] = [list(ROLES)] if self.together else [[role] for role in ROLES]
        for group in groups:
            self._group(group, here, questions, items)
            if self.found.failures or self.interrupted:
                break

    def _group(
        self, group: list[Role], here: dict[Role, Here | None], questions: Sequence[Question], items: Sequence[Item]
    ) -> None:
        """Measure the systems that run side by side."""
        config, boot = self.config, self.host.boot
        starts = {role: boot.boot(config.sources[role]) for role in group if role in self.local}
        with booted(starts, at_once=bool(starts) and boot.at_once) as servers:
            self.host.logs.extend(server.log for server in servers.values())
            known = {role: servers.get(role) or here.get(role) for role in group}
            systems = [reached(role, config, servers.get(role), known[role]) for role in group]
            try:
                asyncio.run(
                    measure(
                        systems,
                        questions,
                        config,
                        items=items,
                        found=self.found,
                        keep=self.journal,
                        traffic=self.traffic,
                        progress=self.progress,
                    )
                )
            except KeyboardInterrupt:
                if self.found.empty:
                    raise
                self.interrupted = True
            self.infos |= {s.role: info(s, config, known[s.role], self.found) for s in systems}


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
