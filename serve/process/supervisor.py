"""Keeps a server running: starts it again when it dies or stops answering, and gives up when that does not help.

In the foreground it is `qvl serve` itself, so it works as the first process of a container. With --detach it is a
process of its own, see `serve.process.detached`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from serve.process.bootlog import cap, cause_of_death, read_from, size
from serve.process.lifecycle import OnPhase, start
from serve.process.status import readiness
from serve.process.trust import quick_client
from serve.settings.config import ServerConfig
from toolkit.errors import QvlError, ResourceInUse, ServerError

__all__ = [
    "WAITS",
    "GaveUp",
    "Policy",
    "Supervised",
    "Supervisor",
    "stopped_by_signals",
    "supervisor",
]


#: How its line begins where others hold the memory that a restart takes.
WAITS = "the server can't be started yet"


class GaveUp(ServerError):
    """A server that keeps dying."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to start a server again, and when to stop trying. Times in seconds."""

    #: Restarts within `window` before giving up; 0 never restarts.
    restarts: int = 5
    window: float = 600.0
    #: Wait before a restart; twice as long for each further one within the window, up to `longest_wait`.
    wait: float = 1.0
    longest_wait: float = 60.0
    #: Between looks at whether memory that others hold is free again; after `window` of them it gives up.
    wait_for_others: float = 5.0
    #: Probes in a row without an answer after which the server is killed.
    failed_probes: int = 3
    #: Bytes of log that are kept twice: this much in PORT.log and as much in PORT.log.1.
    log_bytes: int = 64 << 20


class Supervised(Protocol):
    """What the supervisor needs of a server; `serve.process.lifecycle.Server` is one."""

    url: str
    pid: int
    log: Path
    #: Bytes at the log's beginning that tell of earlier starts.
    log_start: int

    def running(self) -> bool:
        """Whether its process still runs."""

    def wait(self) -> int:
        """Return its exit status, when it has ended."""

    def stop(self, drain: bool = True) -> None:
        """End it with all its processes, and forget it."""

    def clear(self) -> None:
        """Kill its processes; it stays known, as one that is down."""


@dataclass
class Supervisor:
    """Runs one server after another until it is interrupted or gives up."""

    #: Boots the server, given how often that has been done before. Raises QvlError when that fails.
    boot: Callable[[int], Supervised]
    policy: Policy
    #: Seconds after which a server that does not even say that it is not ready counts as wedged.
    silence: float
    #: Told of deaths and restarts.
    say: Callable[[str], None]
    #: Told of the server when it is up for the first time; `server` is set by then, so it can be stopped.
    up: Callable[[Supervised], None] = lambda server: None
    server: Supervised | None = None
    restarts: int = 0
    _deaths: list[float] = field(default_factory=list, repr=False)
    _poll: float = 1.0

    def run(self) -> None:
        """Start the server and keep it running; returns only by an exception.

        Raises what the first boot raises, GaveUp when the server keeps dying, KeyboardInterrupt when this process is
        told to end (the server still runs then).
        """
        self.server = self.boot(0)
        self.up(self.server)
        while True:
            cause = self._watch(self.server)
            self.server.clear()
            self.server = self._again(cause)

    def _again(self, cause: str) -> Supervised:
        """Wait, boot, and do so again while booting fails."""
        log = self.server.log if self.server is not None else ""
        began = time.monotonic()
        while True:
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < self.policy.window] + [now]
            count = len(self._deaths)
            if count > self.policy.restarts:
                how_often = (
                    f"{count} times within {self.policy.window:g} s" if count > 1 else "and is not to be restarted"
                )
                raise GaveUp(f"the server died {how_often}. The last cause:\n{cause}\nIts log is {log}")
            wait = min(self.policy.wait * 2 ** (count - 1), self.policy.longest_wait)
            self.say(f"the server is down: {cause}\nstarting it again in {wait:g} s (restart {count})")
            time.sleep(wait)
            self.restarts += 1
            try:
                server = self._boot_when_free()
            except GaveUp:
                raise
            except QvlError as error:
                cause = str(error)
                continue
            self.say(f"the server is back at {server.url} after {time.monotonic() - began:.0f} s")
            return server

    def _boot_when_free(self) -> Supervised:
        """Boot as soon as others do not hold the memory that it takes: nothing has been started then that could die."""
        began = time.monotonic()
        told = False
        while True:
            try:
                return self.boot(self.restarts)
            except ResourceInUse as error:
                if time.monotonic() - began >= self.policy.window:
                    raise GaveUp(f"the server has had no memory for {self.policy.window:g} s. {error}") from error
                if not told:
                    every = f"{self.policy.wait_for_others:g} s for {self.policy.window:g} s"
                    self.say(f"{WAITS}: {error}\nlooking again every {every}")
                    told = True
                time.sleep(self.policy.wait_for_others)

    def _watch(self, server: Supervised) -> str:
        """Return, when the server has died or had to be killed, why."""
        heard_at = asked_at = time.monotonic()
        healthy = server.log_start  # bytes of the log that were written before the last sign of health
        with quick_client(server.url, 5) as client:
            while server.running():
                time.sleep(self._poll)
                _reap(server.pid)
                cap(server.log, self.policy.log_bytes)
                if time.monotonic() - asked_at < 5 * self._poll:
                    continue
                written = size(server.log)
                said = readiness(client)
                asked_at = time.monotonic()
                if said is not None:
                    heard_at = asked_at
                    healthy = written if said["ready"] else healthy
                if said is not None and said.get("failures", 0) >= self.policy.failed_probes:
                    return f"{said['reason']}, {said['failures']} times in a row: it hangs"
                if asked_at - heard_at > self.silence and server.running():
                    return f"nothing has answered at {server.url}/ready for {asked_at - heard_at:.0f} s: it hangs"
        return cause_of_death(read_from(server.log, healthy), server.wait())


def _reap(server: int) -> None:
    """As the first process of a container, bury what dead servers leave: nobody else would."""
    if os.getpid() != 1:
        return
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.pid != server and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that what cleans up after one does after all."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup stays
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervisor(
    model: str, config: ServerConfig, policy: Policy, say: Callable[[str], None], on_phase: OnPhase | None
) -> Supervisor:
    """Return the supervisor of a server of vLLM. `on_phase` is told of the first boot only."""

    def boot(restarts: int) -> Supervised:
        return start(
            model,
            config,
            on_phase=on_phase if restarts == 0 else None,
            attached=True,
            supervised=True,
            restarts=restarts,
        )

    silence = policy.failed_probes * (config.probe_every + config.probe_timeout)
    return Supervisor(boot, policy, silence, say)
