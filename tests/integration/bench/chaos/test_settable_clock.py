"""A clock for some processes: what they are told is the time, and what they wait by."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.chaos.settable_clock import Clock
from toolkit.errors import ResourceError

_TELL = """
import datetime, time
for _ in range(3):
    input()
    began = time.monotonic()
    time.sleep(0.05)
    waited = time.monotonic() - began
    print(time.time(), datetime.datetime.now().timestamp(), time.time_ns() / 1e9, waited, flush=True)
"""


def test_it_is_set_under_a_process_that_runs(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    environment = {**os.environ, **clock.environment}
    with subprocess.Popen(
        [sys.executable, "-c", _TELL], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for ahead in (0, 86_400, -1_000_000):
            clock.set(ahead)
            process.stdin.write("\n")
            process.stdin.flush()
            *told, waited = map(float, process.stdout.readline().split())
            assert all(abs(each - time.time() - ahead) < 60 for each in told)
            assert 0.05 <= waited < 60
    assert process.returncode == 0


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="install a C compiler"):
        Clock(tmp_path)
