"""How far a measurement is, for whoever shows it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from bench.load.client import Trace

__all__ = ["Live", "Progress"]

#: Called with the name of the phase, the requests done in it, their total, and what is going on just now.
Progress = Callable[[str, int, int, str], None]
#: Seconds over which live rates are taken.
LIVE_S = 5.0


class Live:
    """Counts the requests of a phase and the rates of the last seconds.

    Args:
        show: called after each request.
    """

    def __init__(self, show: Progress) -> None:
        self._show = show
        self._phase, self._done, self._total, self._now = "", 0, 0, ""
        self._ended: deque[tuple[float, int]] = deque()

    def begin(self, phase: str, total: int) -> None:
        """Begin a phase of about ``total`` requests."""
        self._phase, self._done, self._total = phase, 0, total
        self._ended.clear()

    def doing(self, now: str) -> None:
        """Say what goes on from now on."""
        self._now = now

    def tick(self, trace: Trace | None = None) -> None:
        """Count a request that has ended, and show the rates of the last seconds."""
        self._done += 1
        self._total = max(self._total, self._done)
        now, text = time.perf_counter(), self._now
        self._ended.append((now, trace.completion_tokens or 0 if trace else 0))
        while now - self._ended[0][0] > LIVE_S:
            self._ended.popleft()
        seconds = now - self._ended[0][0]
        if seconds >= LIVE_S / 5:  # less is chance
            ended = list(self._ended)[1:]  # the first marks where the window begins
            tokens = sum(count for _, count in ended) / seconds
            text += f", {len(ended) / seconds:.1f} requests/s" + (f", {tokens:.0f} tokens/s" if tokens else "")
        self._show(self._phase, self._done, self._total, text)
