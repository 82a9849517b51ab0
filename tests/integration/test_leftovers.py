"""Tests that are killed leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.leftovers import MARK, Leftovers
from tests.support.paths import ROOT

#: A run of tests: what it starts is in a session of its own, as a detached server, and starts another one, which has no
#: mark, as an engine whose title stands where its environment was.
_RUN = """
import subprocess, sys, time
from tests.support.leftovers import Leftovers
child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={}).pid, flush=True); time.sleep(600)"
with Leftovers():
    started = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE, text=True)
    print(started.pid, started.stdout.readline(), flush=True)
    time.sleep(600)
"""  # noqa: E501


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_a_killed_run_has_started_ends(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", _RUN], stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        assert run.stdout is not None
        started = [psutil.Process(int(pid)) for pid in (run.stdout.readline() + run.stdout.readline()).split()]
        assert len(started) == 2 and not any(map(gone, started))
        run.send_signal(number)
        deadline = time.monotonic() + 60
        while not all(map(gone, started)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_end_of_a_run_ends_them_too(tmp_path: Path) -> None:
    before = os.environ.get(MARK)
    with Leftovers():
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert left.wait(timeout=60) == -signal.SIGKILL
    assert os.environ.get(MARK) == before
