"""How far a bench is, on stderr: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.run.progress import Progress

__all__ = ["progress"]

#: Seconds between two lines of progress where there is no terminal.
NOTE_S = 30.0


@contextmanager
def progress() -> Iterator[tuple[Progress, Callable[[str, str], None]]]:
    """Bars on stderr: one for each phase of the measurement, one for each server that boots."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from toolkit.console import err, note

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}", style="dim"),
    )
    with Bars(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        phases: dict[str, str] = {}
        said = time.monotonic()

        def update(phase: str, done: int, total: int, now: str) -> None:
            nonlocal said
            for source in [name for name in tasks if bars.tasks[bars.task_ids.index(tasks[name])].total is None]:
                bars.remove_task(tasks.pop(source))  # servers have booted when something is measured
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, now="")
                if not err.is_terminal:
                    note(f"{phase}: {total} requests")
            elif not err.is_terminal and time.monotonic() - said > NOTE_S:
                note(f"{phase}: {done} of {total}; {now}")
                said = time.monotonic()
            # Once a phase is over, its rates are too.
            bars.update(tasks[phase], completed=done, total=total, now=now if done < total else "")

        def booting(source: str, phase: str) -> None:
            if phases.get(source) != phase and not err.is_terminal:
                note(f"{source}: {phase}")  # bars are drawn on terminals only
            phases[source] = phase
            if source not in tasks:
                tasks[source] = bars.add_task("", total=None, now="")
            bars.update(tasks[source], description=f"{source}: {phase}")

        yield update, booting
