from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.process import state


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own, and no setting from outside."""
    for name in ("QVL_BACKEND", "QVL_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


#: A leader that ends on SIGTERM, with a child that ignores it, in a group of their own; says when both are set up.
#: As a server's processes, both write their errors to the log.
_FAMILY = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""

Start = Callable[[int], state.ServerState]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start such a family and return its state."""
    processes: list[subprocess.Popen[str]] = []

    def run(port: int) -> state.ServerState:
        command = [sys.executable, "-c", _FAMILY]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=log, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        return state.ServerState(
            port=port,
            pid=process.pid,
            created=state.process_start(process.pid),
            url=f"http://127.0.0.1:{port}",
            model_name="m",
            checkpoint="/c",
            served="/c",
            backend="cpu",
            log=str(tmp_path / "log"),
            drain=1,
            host=state.hostname(),
            numbering=state.numbering(),
        )

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
