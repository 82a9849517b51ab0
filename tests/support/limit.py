"""A test that waits for what does not come ends, says where it was, and lets the others run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail where the block stands after so many seconds. Only in a main thread, which alone hears signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def end(number: int, frame: object) -> None:
        pytest.fail(f"not over after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
