"""The program that takes a device's memory, tried out on a CPU under a limit."""

from __future__ import annotations

import sys

import pytest

from bench.chaos.gpu_memory import neighbour


def limited(gibibytes: int) -> tuple[str, ...]:
    """Return a command that runs another with no more address space than that."""
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({gibibytes << 30},) * 2)"
    code = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    return (sys.executable, "-c", code)


def test_it_takes_all_that_is_left_and_ends_when_left() -> None:
    with neighbour("cpu", prefix=limited(8)) as small:
        pass
    with neighbour("cpu", prefix=limited(12)) as large:
        pass
    # What torch itself takes of the limit is the same for both.
    assert abs(large.taken - small.taken - (4 << 30)) < 256 << 20
    assert 4 << 30 < small.taken < 8 << 30


def test_one_that_cannot_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before it had taken anything"), neighbour("nonsense"):
        pass
