"""A clock that runs only while everybody waits, so that what takes seconds is exact and over at once, however busy the
machine is."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

__all__ = ["virtual"]

T = TypeVar("T")
#: Seconds that pass when the time is asked for: who spins until a moment gets there.
TICK_S = 1e-5


class _Loop(asyncio.SelectorEventLoop):
    """Jumps to the next timer when nothing else is to do; like epoll's, its timers are late up to a millisecond."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def passed(self, seconds: float = TICK_S) -> float:
        self.now += seconds
        return self.now

    def _run_once(self) -> None:
        timers, ready = self._scheduled, self._ready  # type: ignore[attr-defined]
        if not ready and timers:
            self.now = max(self.now, math.ceil(1000 * timers[0].when() - 1e-6) / 1000)
        super()._run_once()  # type: ignore[misc]


def virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` with `time.perf_counter` and `time.sleep` on a clock that starts at 0."""
    loop = _Loop()
    with (
        mock.patch("time.perf_counter", loop.passed),
        mock.patch("time.sleep", lambda seconds: loop.passed(seconds) and None),
        asyncio.Runner(loop_factory=lambda: loop) as runner,
    ):
        return runner.run(main)
