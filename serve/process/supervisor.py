"""Keeps a server running: starts it again when it dies or stops answering, and gives up when that does not help.

In the foreground it is `qvl serve` itself, so it works as the first process of a container. With --detach it is a
process of its own: `python -m serve.process.supervisor` reads from its standard input what to start and writes to its
standard
output, one JSON object a line, how the first boot goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from serve.http.logs import line
from serve.process.bootlog import cap, decisive_lines, read_from
from serve.process.lifecycle import Drained, OnPhase, Server, start
from serve.process.status import readiness
from serve.settings.config import ServerConfig
from toolkit import errors
from toolkit.errors import QvlError, ResourceInUse, ServerError
from toolkit.paths import source_root

__all__ = [
    "WAITS",
    "Booted",
    "GaveUp",
    "Policy",
    "Supervised",
    "Supervisor",
    "detach",
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
        with httpx.Client(base_url=server.url, timeout=5, trust_env=False) as client:
            while server.running():
                time.sleep(self._poll)
                _reap(server.pid)
                cap(server.log, self.policy.log_bytes)
                if time.monotonic() - asked_at < 5 * self._poll:
                    continue
                said = readiness(client)
                asked_at = time.monotonic()
                if said is not None:
                    heard_at = asked_at
                if said is not None and said.get("failures", 0) >= self.policy.failed_probes:
                    return f"{said['reason']}, {said['failures']} times in a row: it hangs"
                if asked_at - heard_at > self.silence and server.running():
                    return f"nothing has answered at {server.url}/ready for {asked_at - heard_at:.0f} s: it hangs"
        lines = "; ".join(decisive_lines(read_from(server.log, server.log_start), limit=2))
        return f"vLLM ended by itself (exit status {server.wait()}): {lines}"


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


@dataclass(frozen=True)
class Booted:
    """What is known of a detached server once it is ready."""

    url: str
    model_name: str
    log: Path
    boot_seconds: float


def detach(model: str, config: ServerConfig, policy: Policy, on_phase: OnPhase | None = None) -> Booted:
    """Start a server under a supervisor of its own and return when it is ready; both outlive this process.

    Raises what `serve.process.lifecycle.start` raises. No process is left behind then, nor when this one is
    interrupted.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.process.supervisor"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        try:
            # Through the pipe, since it holds API keys, which the command line and the environment would show.
            process.stdin.write(pickle.dumps((model, config, policy)))
            process.stdin.close()
            for text in process.stdout:
                said: dict[str, Any] = json.loads(text)
                if "phase" in said and on_phase is not None:
                    on_phase(said["phase"], said["seconds"])
                elif "error" in said:
                    raise getattr(errors, said["kind"], ServerError)(said["error"])
                elif "url" in said:
                    return Booted(said["url"], said["model_name"], Path(said["log"]), said["boot_seconds"])
            raise ServerError(f"the supervisor ended before the server was ready (exit status {process.wait()}).")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()
            raise


_ROOT = str(source_root())


def _tell(said: dict[str, Any]) -> None:
    """Write a line to whoever waits for the first boot; nobody may wait any more."""
    with contextlib.suppress(OSError):
        os.write(1, f"{json.dumps(said)}\n".encode())


def main() -> int:
    """Run as a process of its own; returns its exit status."""
    model, config, policy = pickle.loads(sys.stdin.buffer.read())
    log: Path | None = None

    def say(text: str) -> None:
        if log is not None:
            with contextlib.suppress(OSError), log.open("a") as stream:
                stream.write(line("warning", "qvl.supervisor", text, pid=os.getpid()) + "\n")

    def up(server: Supervised) -> None:
        nonlocal log
        assert isinstance(server, Server)
        log = server.log
        _tell(
            {
                "url": server.url,
                "model_name": server.model_name,
                "log": str(server.log),
                "boot_seconds": server.boot_seconds,
            }
        )
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # the reader has gone its way

    own = supervisor(model, config, policy, say, lambda phase, s: _tell({"phase": phase, "seconds": s}))
    own.up = up
    with stopped_by_signals():
        try:
            own.run()
        except Drained:
            return 0
        except KeyboardInterrupt:
            if own.server is None:
                return 130
            with contextlib.suppress(KeyboardInterrupt):
                own.server.stop()
                return 0
            own.server.stop(drain=False)
            return 0
        except GaveUp as error:
            say(str(error))
            return 1
        except QvlError as error:
            _tell({"error": str(error), "kind": type(error).__name__})
            return 2
        except Exception:  # nobody reads this process's stderr; its end takes the server with it
            text = f"the supervisor itself failed:\n{traceback.format_exc()}"
            say(text)
            _tell({"error": text, "kind": "ServerError"})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
