"""What the supervisor does when servers die, hang or won't boot; tests/e2e/test_faults.py does it to the real vLLM."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve.process.supervisor import GaveUp, Policy, Supervisor
from toolkit.errors import ResourceError, ResourceInUse, ServerError


@dataclass
class Fake:
    """A server that dies after it was looked at `looks` times."""

    log: Path
    looks: int = 0
    url: str = "http://127.0.0.1:9"
    pid: int = 0
    log_start: int = 0
    calls: list[str] = field(default_factory=list)

    def running(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def wait(self) -> int:
        return 3

    def stop(self, drain: bool = True) -> None:
        self.calls.append("drain" if drain else "kill")

    def clear(self) -> None:
        self.calls.append("clear")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text("INFO all is well\nRuntimeError: the cause\n")
    return path


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before restarts, which take no time here."""
    found: list[float] = []
    sleep = time.sleep

    def pause(seconds: float) -> None:
        if seconds > 0.01:
            found.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr("serve.process.supervisor.time.sleep", pause)
    return found


def keep(boot: Callable[[int], Any], said: list[str] | None = None, silence: float = 60, **policy: Any) -> Supervisor:
    say = said.append if said is not None else lambda text: None
    return Supervisor(boot, Policy(**policy), silence, say, _poll=0.001)


def test_it_restarts_with_longer_waits_and_gives_up_loudly(log: Path, waits: list[float]) -> None:
    servers = [Fake(log) for _ in range(9)]
    said: list[str] = []
    own = keep(lambda restarts: servers[restarts], said, restarts=4, longest_wait=6)
    with pytest.raises(GaveUp) as caught:
        own.run()
    assert waits == [1, 2, 4, 6]
    assert [server.calls for server in servers[:5]] == [["clear"]] * 5 and servers[5].calls == []
    message = str(caught.value)
    assert "died 5 times" in message and "exit status 3" in message
    assert "RuntimeError: the cause" in message and str(log) in message
    assert len(said) == 8 and "restart 1" in said[0] and "back at" in said[1]


def test_one_that_is_interrupted_as_soon_as_it_is_up_can_be_stopped(log: Path) -> None:
    server = Fake(log)
    own = keep(lambda restarts: server)

    def interrupted(seen: Any) -> None:
        assert seen is server
        raise KeyboardInterrupt

    own.up = interrupted
    with pytest.raises(KeyboardInterrupt):
        own.run()
    assert own.server is server


def test_each_death_has_its_own_cause(log: Path) -> None:
    said: list[str] = []
    servers = [Fake(log), Fake(log, log_start=log.stat().st_size)]
    with log.open("a") as stream:
        stream.write("ValueError: another one\n")
    with pytest.raises(GaveUp, match="ValueError: another one") as caught:
        keep(lambda restarts: servers[restarts], said, restarts=1).run()
    assert "the cause" in said[0] and "RuntimeError: the cause" not in str(caught.value)


def test_no_restarts(log: Path, waits: list[float]) -> None:
    with pytest.raises(GaveUp, match="is not to be restarted"):
        keep(lambda restarts: Fake(log), restarts=0).run()
    assert waits == []


def test_deaths_long_ago_do_not_count(log: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("serve.process.supervisor.time.monotonic", lambda: clock[0])
    booted: list[int] = []

    def boot(restarts: int) -> Fake:
        clock[0] += 1000
        booted.append(restarts)
        if restarts == 12:
            raise KeyboardInterrupt
        return Fake(log)

    with pytest.raises(KeyboardInterrupt):
        keep(boot, restarts=2, window=600).run()
    assert booted == list(range(13)) and set(waits) == {1}


def test_setting_the_clock_changes_nothing(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths must not be forgotten, nor waits become endless, because somebody set the time."""
    jumps = iter(range(0, 10**9, 86_400 * 365))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    with pytest.raises(GaveUp, match="died 3 times"):
        keep(lambda restarts: Fake(log), restarts=2).run()


def test_a_first_boot_that_fails_is_the_users_mistake(log: Path) -> None:
    def boot(restarts: int) -> Fake:
        raise ServerError("no such flag")

    with pytest.raises(ServerError, match="no such flag") as caught:
        keep(boot).run()
    assert not isinstance(caught.value, GaveUp)


def test_a_later_boot_that_fails_is_tried_again(log: Path, waits: list[float]) -> None:
    def boot(restarts: int) -> Fake:
        if restarts in (1, 2):
            raise ResourceError("GPU memory is not free yet")
        if restarts == 4:
            raise KeyboardInterrupt
        return Fake(log)

    with pytest.raises(KeyboardInterrupt):
        keep(boot).run()
    assert waits == [1, 2, 4, 8]

    def never(restarts: int) -> Fake:
        if restarts:
            raise ResourceError("no memory")
        return Fake(log)

    with pytest.raises(GaveUp, match="no memory"):
        keep(never, restarts=2).run()


def test_memory_that_others_hold_is_waited_for(log: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour on the card for minutes must not use up the restarts: nothing was started that could have died."""
    clock = [0.0]
    monkeypatch.setattr("serve.process.supervisor.time.monotonic", lambda: clock[0])
    booted: list[int] = []
    said: list[str] = []

    def boot(restarts: int) -> Fake:
        booted.append(restarts)
        if restarts == 1 and len(booted) < 60:
            clock[0] += 5
            raise ResourceInUse("the GPU has 0.1 GiB free")
        if restarts == 2:
            raise KeyboardInterrupt
        return Fake(log)

    own = keep(boot, said, restarts=5)
    with pytest.raises(KeyboardInterrupt):
        own.run()
    assert waits == [1] + [5] * 58 + [2] and own.restarts == 2
    assert len(said) == 4 and "0.1 GiB free" in said[1] and "every 5 s for 600 s" in said[1]
    assert "back at http://127.0.0.1:9 after 290 s" in said[2]


def test_nor_is_it_waited_for_for_ever(log: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("serve.process.supervisor.time.monotonic", lambda: clock[0])

    def boot(restarts: int) -> Fake:
        if not restarts:
            return Fake(log)
        clock[0] += 5
        raise ResourceInUse("the GPU has 0.1 GiB free")

    with pytest.raises(GaveUp, match=r"no memory for 600 s\. the GPU has 0\.1 GiB free"):
        keep(boot).run()
    assert len(waits) == 120


@contextmanager
def saying(answer: dict[str, Any], asked: threading.Event | None = None) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())
            if asked is not None:
                asked.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_one_that_hangs_is_killed(log: Path) -> None:
    answer = {"ready": False, "state": "stalled", "failures": 2, "reason": "the engine has not answered"}
    with saying(answer) as url:
        patient = keep(lambda restarts: Fake(log, looks=200, url=url), restarts=0)
        with pytest.raises(GaveUp, match="ended by itself"):  # two failed probes are not yet enough
            patient.run()
        answer["failures"] = 3
        server = Fake(log, looks=10**9, url=url)
        with pytest.raises(GaveUp, match="has not answered, 3 times in a row: it hangs"):
            keep(lambda restarts: server, restarts=0).run()
    assert server.calls == ["clear"]


def test_an_error_before_the_last_good_answer_is_not_the_cause(log: Path) -> None:
    """It was a client's: the server was healthy after it."""
    log.write_text("ValueError: a client's\n")
    server = Fake(log, looks=10**9)
    said = {"ready": True, "state": "ready", "failures": 0}
    asked = threading.Event()

    def running() -> bool:
        if not asked.is_set():
            return True
        with log.open("a") as stream:
            stream.write("RuntimeError: the cause\n")
        return False

    server.running = running  # type: ignore[method-assign]
    with saying(said, asked) as server.url, pytest.raises(GaveUp, match="RuntimeError: the cause") as caught:
        keep(lambda restarts: server, restarts=0).run()
    assert "a client's" not in str(caught.value)


def test_one_that_says_nothing_at_all_is_killed(log: Path) -> None:
    server = Fake(log, looks=10**9)
    with pytest.raises(GaveUp, match=r"nothing has answered at http://127.0.0.1:9/ready"):
        keep(lambda restarts: server, silence=0.2, restarts=0).run()


def test_the_log_is_kept_small(log: Path) -> None:
    log.write_text("x" * 5000 + "\n")
    with pytest.raises(GaveUp):
        keep(lambda restarts: Fake(log, looks=3), restarts=0, log_bytes=1000).run()
    assert log.stat().st_size == 0 and log.with_suffix(".log.1").stat().st_size == 5001


@pytest.mark.slow
def test_as_the_first_process_it_buries_orphans() -> None:
    """In a process namespace of its own, where it has the number 1."""
    code = """
import os, subprocess, sys, time
from serve.process.supervisor import _reap
subprocess.run([sys.executable, "-c", "import os\\nif os.fork() == 0: os.execvp('sleep', ['sleep', '0.3'])"])
zombies = lambda: subprocess.run(["ps", "-eo", "stat,comm"], capture_output=True, text=True).stdout.count("Z")
deadline = time.monotonic() + 30
while not zombies() and time.monotonic() < deadline:
    time.sleep(0.05)
before = zombies(); _reap(0)
print(os.getpid(), before, zombies())
"""
    command = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "Operation not permitted" in done.stderr or "unshare failed" in done.stderr:
        pytest.skip("this user may not make a process namespace")
    assert done.stdout.split() == ["1", "1", "0"], done.stderr


def test_signals_are_like_ctrl_c() -> None:
    code = """
import os, signal, time
from serve.process.supervisor import stopped_by_signals
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), number)
            while True:
                time.sleep(0.01)  # and no pause(): the signal may have come just before it
    except KeyboardInterrupt:
        print(number.name)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stopped_by_signals():
    os.kill(os.getpid(), signal.SIGHUP)
    print("stays")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [signal.SIGTERM.name, signal.SIGHUP.name, "stays"]
