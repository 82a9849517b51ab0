"""What a quantization shows while it runs, and the peaks it records."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta

from toolkit.console import err, note

if TYPE_CHECKING:
    import torch

__all__ = ["RunProgress"]

T = TypeVar("T")


class RunProgress:
    """One bar a step; the layers' bar shows the last layer's error, memory and the time left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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

    def layer(self, index: int, total: int, error: float) -> None:
        """Show a finished layer."""
        if self._layers is None:
            self._layers = self._bar.add_task("layers", total=total, info="")
        peak = self.peak_device_bytes() or self.peak_host_bytes()
        info = f"layer {index}: output error {error:.4f}, peak {peak / 1e9:.1f} GB"
        self._bar.update(self._layers, completed=index + 1, info=info)
        if not err.is_terminal:
            note(f"layer {index + 1}/{total}: output error {error:.4f}, peak {peak / 1e9:.1f} GB")

    @property
    def device_name(self) -> str:
        """What the search ran on, in words."""
        if self._device.type == "cuda":
            import torch

            return str(torch.cuda.get_device_name(self._device))
        import torch

        return f"CPU, {torch.get_num_threads()} threads"

    def peak_device_bytes(self) -> int:
        """Most GPU memory allocated so far, 0 on a CPU."""
        if self._device.type != "cuda":
            return 0
        import torch

        return int(torch.cuda.max_memory_allocated(self._device))

    @staticmethod
    def peak_host_bytes() -> int:
        """Most resident memory of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
