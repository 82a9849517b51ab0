"""How far a tuning is, and what came of it, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.tune.config import TuneConfig
from bench.tune.journal import Journal
from bench.tune.profile import recommendation, table_rows
from serve.settings.profiles import Profile
from toolkit.console import err, note, out
from toolkit.tables import table

__all__ = ["progress", "show"]


def show(journal: Journal, config: TuneConfig, profile: Profile) -> None:
    """Print the table, and what to conclude."""
    names = ["candidate", *(f"{load} in flight" for load in config.concurrencies), ""]
    shown = table(names, range(1, len(names) - 1), ruled=True, wrapped=range(len(names)))
    for name, cells in table_rows(list(journal.trials.values()), config.concurrencies):
        shown.add_row(name, *cells)
    shown.caption = "output tokens/s, * the most"
    out.print(shown)
    for line in recommendation(profile):
        out.print(line, highlight=False, markup=False)


@contextmanager
def progress() -> Iterator[tuple[Callable[[str, str, int, int], None], Callable[[str], None]]]:
    """A bar over all loads of all candidates, with what the current one is doing; lines where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        bar = bars.add_task("", total=None)
        current = ""

        def step_of(name: str, step: str, done: int, total: int) -> None:
            nonlocal current
            current = name
            bars.update(bar, description=f"{name}: {step}", completed=done, total=total)
            if not err.is_terminal:
                note(f"{name}: {step} ({done}/{total})")

        def phase(said: str) -> None:
            bars.update(bar, description=f"{current}: {said}")

        yield step_of, phase
