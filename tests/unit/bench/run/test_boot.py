from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from bench.run.boot import booted, free_ports
from toolkit.errors import ServerError


class Server:
    """A server that takes a while to boot and can be ended meanwhile, as a process can."""

    url, pid, log, checkpoint = "http://127.0.0.1:1", 1, Path("log"), Path("dir")
    api_key: str | None = None

    def __init__(self, boot_s: float = 0.0, dies: bool = False, meet: threading.Barrier | None = None) -> None:
        self.boot_s, self.dies, self.meet = boot_s, dies, meet
        self.ended = threading.Event()
        self.begun = 0.0
        self.stopped = 0

    def start(self) -> Server:
        self.begun = time.monotonic()
        self.thread = threading.current_thread()
        if self.meet is not None:
            self.meet.wait(30)
        if self.ended.wait(self.boot_s):
            raise ServerError("ended while booting")
        if self.dies:
            raise ServerError("died at boot")
        return self

    def abort(self) -> None:
        self.ended.set()

    def stop(self) -> None:
        self.stopped += 1


def test_servers_boot_side_by_side_and_are_stopped() -> None:
    both_boot = threading.Barrier(2)
    a, b = Server(meet=both_boot), Server(meet=both_boot)
    with booted({"baseline": (a.start, a.abort), "candidate": (b.start, b.abort)}, at_once=True) as servers:
        assert servers == {"baseline": a, "candidate": b}
        assert a.stopped == b.stopped == 0
        # A process that asked to end with its parent ends with the thread that started it.
        assert a.thread.is_alive() and b.thread.is_alive()
    assert a.stopped == b.stopped == 1
    a.thread.join(5)
    assert not a.thread.is_alive()


def test_servers_can_boot_one_after_the_other() -> None:
    a, b = Server(0.1), Server()
    with booted({"baseline": (a.start, a.abort), "candidate": (b.start, b.abort)}, at_once=False):
        assert b.begun - a.begun >= 0.1


def test_an_error_in_the_block_stops_them() -> None:
    a = Server()
    with pytest.raises(KeyboardInterrupt), booted({"baseline": (a.start, a.abort)}, at_once=True):
        raise KeyboardInterrupt
    assert a.stopped == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_one_that_dies_ends_the_other_at_once(at_once: bool) -> None:
    slow, dead = Server(30.0), Server(0.05, dies=True)
    order = {"candidate": dead, "baseline": slow}
    begun = time.monotonic()
    starts = {role: (server.start, server.abort) for role, server in order.items()}
    with pytest.raises(ServerError, match="died at boot"), booted(starts, at_once=at_once):  # type: ignore[arg-type]
        pass
    assert time.monotonic() - begun < 20
    assert slow.ended.is_set() or not slow.begun
    assert slow.stopped == 0


def test_nothing_to_boot() -> None:
    with booted({}, at_once=True) as servers:
        assert servers == {}


def test_free_ports_differ() -> None:
    assert len(set(free_ports(5))) == 5
