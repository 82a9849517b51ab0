"""The real vLLM breaks under load: clients get errors, not silence, and the server comes back. Or it gives up loudly.

bench/chaos/faults.py measures the same faults at length.
"""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from bench.chaos.faults import (
    KEY,
    Result,
    Watched,
    allocation_fails,
    clock_moved,
    detached,
    disk_full,
    engine_hangs,
    engine_killed,
    keys_replaced,
    server_killed,
    tmpfs,
)
from bench.chaos.settable_clock import Clock
from serve.process import memory, state
from serve.process.supervisor import Policy, Supervised, supervisor
from serve.settings.config import ServerConfig
from tests.e2e.conftest import free_port
from toolkit.paths import demo_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SHORT = {"before": 2.0, "after": 2.0}


def came_back(result: Result) -> None:
    assert result.during.get("ok", 0) > 0, result  # by a client that only tried again
    assert "no answer in time" not in result.during, result
    assert result.ready_again_after is not None and result.restarts == 1, result


def test_a_server_that_breaks_comes_back_and_one_that_keeps_breaking_ends(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(demo_checkpoint())
    with detached(str(model), tmp_path / "cache", "--restarts", "4") as server:
        assert keys_replaced(server, **SHORT).during.keys() == {"ok"}
        came_back(engine_killed(server, **SHORT))
        came_back(server_killed(server, **SHORT))
        hung = engine_hangs(server, **SHORT)
        came_back(hung)
        assert hung.not_ready_after is not None and hung.not_ready_after < 20
        came_back(allocation_fails(server, **SHORT))
        log = server.log.read_text()
        assert "it hangs" in log and "restart 4" in log
        downs = [line for line in log.splitlines() if "the server is down" in line]
        assert len(downs) == 4 and "can't allocate memory" in downs[-1], downs
        gives_up(server)


def gives_up(server: Watched) -> None:
    """The fifth death is one too many."""
    known = server.known
    assert known.supervisor is not None
    os.kill(known.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(known.supervisor):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert state.group_members(known) == []
    assert "died 5 times within 600 s" in server.log.read_text()
    environment = {**os.environ, "QVL_CACHE": str(server.cache)}
    command = [sys.executable, "-m", "toolkit.cli", "status", "--port", str(server.port)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and "dead" in told.stdout


def test_a_restart_waits_for_memory_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real server, on a machine that says for a while that others have taken all memory."""
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    held = threading.Event()
    available, gpus = memory.available_host_memory, memory.find_gpus
    monkeypatch.setattr(memory, "available_host_memory", lambda: 0 if held.is_set() else available())
    monkeypatch.setattr(
        memory, "find_gpus", lambda: [replace(gpu, free=0) for gpu in gpus()] if held.is_set() else gpus()
    )
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "can't be started yet" in text:
            threading.Timer(2, held.clear).start()  # ten looks later
        if "the server is back" in text:
            threading.Timer(2, _thread.interrupt_main).start()

    def up(server: Supervised) -> None:
        held.set()
        os.kill(server.pid, signal.SIGKILL)

    policy = Policy(restarts=1, wait=0.1, wait_for_others=0.2, window=90)  # one death is all it may have
    own = supervisor("demo", ServerConfig(port=free_port()), policy, say, None)
    own.up = up
    try:
        with pytest.raises(KeyboardInterrupt):
            own.run()
        assert own.server is not None and own.restarts == 1
        assert httpx.get(f"{own.server.url}/ready", trust_env=False).status_code == 200
    finally:
        if own.server is not None:
            own.server.stop(drain=False)
    down, waits, back = said
    assert "the server is down: vLLM ended by itself" in down and "is back" in back
    assert "Stop what" in waits and "looking again every 0.2 s for 90 s" in waits


def test_a_clock_that_is_set_stops_no_answer(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    with detached("demo", tmp_path / "cache", **clock.environment) as server:
        result = clock_moved(server, clock, **SHORT)
        assert result.note == "answers were dated +1 days, -2 days, today"  # so it was set
        assert set(result.during) == {"ok"} and result.not_ready_after is None, result
        clock.set(-400 * 24 * 3600)  # and a server that breaks under a wrong clock comes back as ever
        came_back(engine_killed(server, **SHORT))


def test_a_full_disk_for_logs_stops_no_answer(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk") as allowed:
        if not allowed:
            pytest.skip("this user may not mount a file system")
        with detached("demo", tmp_path / "disk") as server:
            result = disk_full(server, **SHORT)
            assert set(result.during) == {"ok"} and result.not_ready_after is None, result
            assert result.note.startswith("0 blocks were free; the log goes on"), result
            # It is stopped as ever, although nothing can be written down.
            server.log.with_name("filler").write_bytes(b"x" * 1024)
            headers = {"authorization": f"Bearer {KEY}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers, trust_env=False).status_code == 200
            assert replace(server.known, ready=True).alive
