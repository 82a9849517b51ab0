"""The real vLLM breaks under load: clients get errors, not silence, and the server comes back. Or it gives up loudly.

An engine that dies and one that hangs are always tried, the other faults before a release; bench/chaos/faults.py
measures them at length. tests/integration/serve/process/test_supervisor.py has the supervisor's logic without vLLM.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from bench.chaos.faults import (
    KEY,
    Result,
    Timing,
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
from serve.process.supervisor import GaveUp, Policy, Supervised, supervisor
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits
from tests.e2e.conftest import BOOT_SECONDS, free_port
from toolkit.paths import demo_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

#: Seconds of requests before a fault and after it is over.
SHORT = Timing(before=2.0, after=2.0)


def came_back(result: Result) -> None:
    assert result.during.get("ok", 0) > 0, result  # by a client that only tried again
    assert "no answer in time" not in result.during, result
    assert result.ready_again_after is not None and result.restarts == 1, result


@contextlib.contextmanager
def supervised(cache: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy, said: list[str]) -> Iterator[Watched]:
    """A server of the embedded model whose supervisor is a thread here, with short probes, as `detached` has them.

    It ends only by giving up: the test must see to that.
    """
    cache.mkdir()
    monkeypatch.setenv("QVL_CACHE", str(cache))
    server = Watched(free_port(), cache, cache / "keys")
    server.keys.write_text(f"{KEY}\n")
    limits = Limits(api_key_file=str(server.keys))
    options = ServerConfig(port=server.port, timeout=BOOT_SECONDS, guard=limits, probe_every=1, probe_timeout=5)
    own = supervisor("demo", options, policy, said.append, None)
    up = threading.Event()
    own.up = lambda booted: up.set()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(own.run)
        try:
            while not up.wait(0.1):
                assert not ended.done(), ended.exception()
            yield server
            with pytest.raises(GaveUp):
                ended.result(timeout=180)
        finally:
            own.policy = replace(policy, restarts=0)
            if own.server is not None and not ended.done():
                own.server.stop(drain=False)


def test_a_server_that_hangs_is_replaced_and_one_that_dies_again_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with supervised(tmp_path / "cache", monkeypatch, Policy(restarts=1), said) as server:
        hung = engine_hangs(server, SHORT)
        came_back(hung)
        assert hung.not_ready_after is not None
        last = server.known
        os.kill(last.pid, signal.SIGKILL)  # the second death is one too many
    assert state.group_members(last) == []
    downs = [text for text in said if "the server is down" in text]
    assert len(downs) == 1 and "it hangs" in downs[0]


@pytest.mark.release
def test_a_server_that_breaks_comes_back_and_one_that_keeps_breaking_ends(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(demo_checkpoint())
    with detached(str(model), tmp_path / "cache", "--restarts", "4") as server:
        assert keys_replaced(server, SHORT).during.keys() == {"ok"}
        came_back(engine_killed(server, SHORT))
        came_back(server_killed(server, SHORT))
        hung = engine_hangs(server, SHORT)
        came_back(hung)
        assert hung.not_ready_after is not None
        came_back(allocation_fails(server, SHORT))
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
    deadline = time.monotonic() + 180
    while psutil.pid_exists(known.supervisor):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert state.group_members(known) == []
    assert "died 5 times within 600 s" in server.log.read_text()
    environment = {**os.environ, "QVL_CACHE": str(server.cache)}
    command = [sys.executable, "-m", "toolkit.cli", "status", "--port", str(server.port)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and "dead" in told.stdout


@pytest.mark.release
def test_a_restart_waits_for_memory_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real server, on a machine that says for a while that others have taken all memory.

    With a server that only says that it is ready: tests/integration/serve/process/test_lifecycle.py.
    """
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    held = threading.Event()
    looks = itertools.count(1)
    available, gpus = memory.available_memory, memory.find_gpus

    def taken() -> bool:
        if held.is_set() and next(looks) > 10:
            held.clear()
        return held.is_set()

    monkeypatch.setattr(memory, "available_memory", lambda: 0 if taken() else available())
    monkeypatch.setattr(memory, "find_gpus", lambda: [replace(gpu, free=0) for gpu in gpus()] if taken() else gpus())
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "the server is back" in text:
            threading.Thread(target=interrupt, args=(own.server,)).start()

    def interrupt(first: Supervised) -> None:
        while own.server is first:
            time.sleep(0.01)
        _thread.interrupt_main()

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
    assert "the server is down: vLLM was killed (SIGKILL)" in down and "is back" in back
    assert "Stop what" in waits and "looking again every 0.2 s for 90 s" in waits


@pytest.mark.release
def test_a_clock_that_is_set_stops_no_answer(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    with detached("demo", tmp_path / "cache", **clock.environment) as server:
        result = clock_moved(server, clock, SHORT)
        assert result.note == "answers were dated +1 days, -2 days, today"  # so it was set
        assert set(result.during) == {"ok"} and result.not_ready_after is None, result
        clock.set(-400 * 24 * 3600)  # and a server that breaks under a wrong clock comes back as ever
        came_back(engine_killed(server, SHORT))


@pytest.mark.release
def test_a_full_disk_for_logs_stops_no_answer(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk") as allowed:
        if not allowed:
            pytest.skip("this user may not mount a file system")
        with detached("demo", tmp_path / "disk") as server:
            result = disk_full(server, SHORT)
            assert set(result.during) == {"ok"} and result.not_ready_after is None, result
            assert result.note.startswith("0 blocks were free; the log goes on"), result
            # It is stopped as ever, although nothing can be written down.
            server.log.with_name("filler").write_bytes(b"x" * 1024)
            headers = {"authorization": f"Bearer {KEY}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers, trust_env=False).status_code == 200
            assert replace(server.known, ready=True).alive
