"""Tests that hang end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from tests.support.limit import at_most


def wait() -> None:
    while True:
        time.sleep(0.01)


def wait_in_a_loop() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    asyncio.run(main())


@pytest.mark.parametrize("hanging", [wait, wait_in_a_loop])
def test_what_hangs_fails(hanging: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(pytest.fail.Exception, match=r"not over after 0\.05 s"), at_most(0.05):
        hanging()
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_what_ends_is_left_alone() -> None:
    with at_most(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
