"""What a quantization shows while it runs, and the peaks it records."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta

from toolkit.console import err, note

__all__ = ["MemoryWatch", "RunProgress"]

T = TypeVar("T")


class RunProgress:
    """One bar a step; the layers' bar shows the last layer's error and the time left."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Eta(elapsed_when_finished=False),
            TextColumn("{task.fields[info]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: TaskID | None = None
        self._layers: TaskID | None = None
        self._finished = 0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        """Start the bar of a step."""
        self._task = self._bar.add_task(what, total=total, info="")

    def advance(self, done: int) -> None:
        """Set the current step's bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=done)

    def track(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Pass items on while a bar counts them."""
        self.begin(what, total)
        for done, item in enumerate(items, 1):
            self.advance(done)
            yield item
        self.advance(total)

    def layers(self, finished: int, total: int) -> None:
        """Start the layers' bar, where an earlier run may have finished some."""
        self._finished = finished
        self._layers = self._bar.add_task("layers", total=total, completed=finished, info="")
        self._total = total

    def layer(self, name: str, error: float, seconds: float, peak: int) -> None:
        """Show a finished layer: its relative error, the time it took, memory so far (bytes)."""
        self._finished += 1
        info = f"{name}: output error {error:.4f}, {seconds:.1f} s, peak {peak / 1e9:.1f} GB"
        if self._layers is not None:
            self._bar.update(self._layers, completed=self._finished, info=info)
        if not err.is_terminal:
            note(f"{info} ({self._finished}/{self._total})")


class MemoryWatch:
    """The most memory that this process has had for itself: anonymous pages, without files that are mapped.

    The kernel keeps a peak only of all resident pages, and mapped weight files count in that although they give way
    when memory is asked for; so this looks 20 times a second. Where there is no /proc it says 0.
    """

    _STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self.now())

    @classmethod
    def now(cls) -> int:
        """Return the bytes of anonymous memory that are resident."""
        try:
            lines = cls._STATUS.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
