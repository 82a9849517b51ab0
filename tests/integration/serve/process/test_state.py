from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from serve.process import state
from tests.support.serve import Start
from toolkit.errors import ServerError


def test_saved_and_found(start: Start) -> None:
    assert state.load_all() == []
    one, two = start(18140), start(18101)
    state.save(one)
    state.save(two)
    assert state.load(18140) == one
    assert state.load_all() == [two, one]
    state.save(replace(one, ready=True))
    assert state.load(18140) == replace(one, ready=True)
    state.remove(one)
    assert state.load_all() == [two]


def test_a_damaged_file_is_nothing(cache: Path) -> None:
    (cache / "servers").mkdir(parents=True)
    (cache / "servers" / "18140.json").write_text('{"port": 18140,')
    (cache / "servers" / "18141.json").write_text('{"unknown": 1}')
    assert state.load(18140) is None
    assert state.load_all() == []


def test_a_new_server_is_not_forgotten_with_the_old(start: Start) -> None:
    old, new = start(18140), start(18140)
    state.save(new)
    state.remove(old)
    assert state.load(18140) == new


def test_ending_leaves_no_process(start: Start) -> None:
    family = start(18140)
    members = state.group_members(family)
    assert len(members) == 2
    assert family.alive
    state.end_group(family, grace=5)
    assert state.group_members(family) == []
    assert not family.alive
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in members)
    state.end_group(family, grace=5)  # once more does no harm


def test_ending_without_grace_asks_nobody(start: Start) -> None:
    family = start(18140)
    state.end_group(family, grace=0)
    _, status = os.waitpid(family.pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert state.group_members(family) == []


def test_a_leader_that_is_gone_leaves_its_child_to_be_ended(start: Start) -> None:
    family = start(18140)
    os.kill(family.pid, signal.SIGKILL)
    os.waitpid(family.pid, 0)
    assert not family.alive
    assert len(state.group_members(family)) == 1
    state.end_group(family, grace=0)
    assert state.group_members(family) == []


def test_a_number_given_to_another_process_is_left_alone(start: Start) -> None:
    family = start(18140)
    impostor = replace(family, created=family.created - 1000)
    assert not impostor.alive
    assert state.group_members(impostor) == []
    state.end_group(impostor, grace=5)
    assert family.alive


@pytest.fixture
def strangers() -> Iterator[int]:
    """A group of another program's whose leader has ended: its number, which a server may have had before."""
    leader = "import subprocess; subprocess.Popen(['sleep', '600'])"
    process = subprocess.Popen([sys.executable, "-c", leader], start_new_session=True)
    process.wait()
    yield process.pid
    os.killpg(process.pid, signal.SIGKILL)


def in_group(number: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # others end meanwhile
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},  # the number was given away while the machine ran
        {"numbering": "another-boot pid:[1]"},
        {"numbering": "another-boot pid:[1]", "host": "another"},
        {"numbering": ""},  # written by a release that did not say
    ],
)
def test_a_group_that_only_has_the_number_is_left_alone(start: Start, strangers: int, changes: dict[str, str]) -> None:
    stale = replace(start(18140), pid=strangers, created=1.0, **changes)
    assert state.group_members(stale) == []
    state.end_group(stale, grace=1)
    state.end_supervisor(replace(stale, supervisor=strangers, supervisor_created=1.0), grace=1)
    assert len(in_group(strangers)) == 1


def test_what_another_boot_or_container_wrote_down_is_not_here(start: Start) -> None:
    """Its leader runs under the very number and start time, and is somebody else's all the same."""
    family = start(18140)
    boot, _, namespace = state.numbering().partition(" ")
    for numbering, host, elsewhere in (
        (f"another-boot {namespace}", state.hostname(), False),  # this machine was restarted since
        (f"another-boot {namespace}", "another", True),
        (f"{boot} pid:[1]", "container", True),
        (f"{boot} pid:[1]", state.hostname(), True),
    ):
        other = replace(family, numbering=numbering, host=host, supervisor=os.getpid(), supervisor_created=1.0)
        assert (other.here, other.alive, other.supervised, other.ours) == (False,) * 4
        assert other.elsewhere == elsewhere
        state.end_group(other, grace=5)
        state.end_supervisor(other, grace=5)
    assert family.alive and len(state.group_members(family)) == 2 and not family.elsewhere


def test_ports() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert state.port_holder("127.0.0.1", port) == f"{psutil.Process().name()} (pid {os.getpid()})"
        assert state.port_holder("0.0.0.0", port) is not None
    assert state.port_holder("127.0.0.1", port) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_addresses_of_other_machines(host: str) -> None:
    with pytest.raises(ServerError, match=f"--host {host}"):
        state.port_holder(host, 18140)


def waiting() -> bool:
    """Whether a thread of this process waits for a lock of a file: proc_locks(5) marks it with an arrow."""
    return any("->" in line and f" {os.getpid()} " in line for line in Path("/proc/locks").read_text().splitlines())


def test_locks_exclude_one_another() -> None:
    order = []

    def wait_for_it() -> None:
        with state.locked("x", "servers"):
            order.append("second")

    with state.locked("x", "servers"):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        while not waiting():
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_setting_the_clock_moves_no_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a process began is counted from the machine's start, so a server is known after the clock was set."""
    known = start(18140)
    assert 0 < known.created < time.clock_gettime(time.CLOCK_BOOTTIME)
    for jump in (-86_400.0, 86_400.0 * 365):
        wrong = time.time() + jump
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        assert known.alive and 0 <= known.uptime < 600
        assert len(state.group_members(known)) == 2
        monkeypatch.undo()
    with pytest.raises(psutil.NoSuchProcess):
        state.process_start(2**22 + 1)


def test_a_supervisor_is_asked_first_and_killed_if_it_does_not_heed(start: Start) -> None:
    keeper = start(18141)
    known = replace(start(18140), supervisor=keeper.pid, supervisor_created=keeper.created)
    assert known.supervised
    state.end_supervisor(known, grace=5)
    assert not known.supervised and known.alive
    state.end_supervisor(known, grace=5)  # it is gone: nothing to do
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        known = replace(known, supervisor=process.pid, supervisor_created=state.process_start(process.pid))
        state.end_supervisor(known, grace=0.3)
        assert process.wait(timeout=5) == -signal.SIGKILL


def test_a_supervisor_forgets_what_it_started_last(start: Start) -> None:
    first = replace(start(18140), supervisor=os.getpid(), supervisor_created=state.process_start(os.getpid()))
    state.save(replace(start(18140), supervisor=os.getpid(), supervisor_created=first.supervisor_created))
    state.remove(first)  # it holds the one before the last restart
    assert state.load(18140) is None
