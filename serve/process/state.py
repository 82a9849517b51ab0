"""Which servers run on this machine: one JSON file a port, and the processes behind it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from toolkit import files
from toolkit.errors import ServerError
from toolkit.paths import cache_dir

__all__ = [
    "ServerState",
    "end_group",
    "end_supervisor",
    "group_members",
    "load",
    "load_all",
    "locked",
    "port_holder",
    "process_start",
    "remove",
    "require",
    "save",
]


@dataclass(frozen=True)
class ServerState:
    """What is written down about a server, so that another `qvl` can find, ask and stop it."""

    port: int
    #: The process that was started: vLLM's API server, leader of a process group of its own.
    pid: int
    #: When that process began, see `process_start`, to tell it from a later one with the same number.
    created: float
    url: str
    model_name: str
    #: The directory the user named.
    checkpoint: str
    #: The directory vLLM reads; another one where a GEMV checkpoint was repacked.
    served: str
    backend: str
    log: str
    #: Seconds that requests under way may take to finish.
    drain: float
    #: Whether it has answered an image question.
    ready: bool = False
    #: The process that starts it again when it dies, if any, and when that one began.
    supervisor: int | None = None
    supervisor_created: float = 0.0
    #: How often it has been started again.
    restarts: int = 0

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return _runs(self.pid, self.created)

    @property
    def supervised(self) -> bool:
        """Whether a process runs that would start it again."""
        return self.supervisor is not None and _runs(self.supervisor, self.supervisor_created)

    @property
    def uptime(self) -> float:
        """Seconds since the process began."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.created


def process_start(pid: int) -> float:
    """Return when a process began, in seconds since the machine's own start: setting the clock does not move it.

    Raises psutil.NoSuchProcess.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    ticks = int(stat.rpartition(")")[2].split()[19])  # proc_pid_stat(5), field 22
    return ticks / os.sysconf("SC_CLK_TCK")


def _runs(pid: int, created: float) -> bool:
    """Whether the process that began then still runs, and not a later one that was given its number."""
    try:
        return process_start(pid) == created and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _path(port: int) -> Path:
    return cache_dir("servers", f"{port}.json")


def save(state: ServerState) -> None:
    """Write the state of a server, whole or not at all."""
    path = _path(state.port)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(asdict(state), indent=1) + "\n")


def load(port: int) -> ServerState | None:
    """Return what is written down about the server on this port; None if nothing is, or nothing that can be read."""
    try:
        return ServerState(**json.loads(_path(port).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def load_all() -> list[ServerState]:
    """Return all servers written down, by port."""
    ports = sorted(int(path.stem) for path in cache_dir("servers").glob("*.json") if path.stem.isdigit())
    return [state for port in ports if (state := load(port)) is not None]


def require(port: int) -> ServerState:
    """Return what is written down about the server on this port. Raises ServerError when qvl started none there."""
    known = load(port)
    if known is None:
        others = ", ".join(str(other.port) for other in load_all())
        raise ServerError(
            f"qvl has no server on port {port}. " + (f"It has some on: {others}." if others else "It has none at all.")
        )
    return known


def remove(state: ServerState) -> None:
    """Forget a server, unless its port has a new one."""
    current = load(state.port)
    same = current is None or (current.pid, current.created) == (state.pid, state.created)
    if same or (current is not None and current.supervisor == os.getpid()):  # or one that its supervisor has replaced
        _path(state.port).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(name: str, *parts: str) -> Iterator[None]:
    """Hold the lock `name` under the cache directory `parts`; waits while another process holds it."""
    directory = cache_dir(*parts)
    directory.mkdir(parents=True, exist_ok=True)
    with files.locked(directory / f".{name}.lock"):
        yield


def port_holder(host: str, port: int) -> str | None:
    """Return who listens on a port, in words, or None when it is free.

    Raises ServerError for an address that is not this machine's, or a port that needs more rights.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: connections winding down do not count
        try:
            probe.bind((host.strip("[]"), port))
            return None
        except PermissionError as error:
            raise ServerError(f"--port {port}: ports below 1024 need root. Give a higher one.") from error
        except socket.gaierror as error:
            raise ServerError(f"--host {host}: no such host. Give an address of this machine.") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ServerError(f"--host {host}: {error.strerror}. Give an address of this machine.") from error
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:2] == (port,):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"


def group_members(state: ServerState) -> list[psutil.Process]:
    """Return the processes of a server's group that still run."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process_start(state.pid) != state.created:
            return []  # the number was given to a new process, which the kernel does only when the group is gone
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == state.pid and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def end_group(state: ServerState, grace: float) -> None:
    """End a server's processes: ask its leader to finish, wait up to `grace` seconds, then kill all that is left.

    Raises ServerError when processes remain all the same.
    """
    if state.alive and grace > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while state.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        # Its helpers follow on their own, and one of them gives shared memory back.
        deadline = time.monotonic() + 3
        while group_members(state) and time.monotonic() < deadline:
            time.sleep(0.05)
    deadline = time.monotonic() + 10
    while members := group_members(state):
        if time.monotonic() > deadline:
            raise ServerError(f"processes {', '.join(str(p.pid) for p in members)} of port {state.port} will not end.")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state.pid, signal.SIGKILL)
        time.sleep(0.05)


def end_supervisor(state: ServerState, grace: float) -> None:
    """End the process that would start a server again; with a grace, let it drain the server first and forget it.

    Raises ServerError when it remains all the same.
    """
    if state.supervisor is None or state.supervisor == os.getpid():
        return
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        if seconds <= 0 or not state.supervised:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.supervisor, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not state.supervised:
                return
            time.sleep(0.05)
    if state.supervised:
        raise ServerError(f"the supervisor (pid {state.supervisor}) of port {state.port} will not end.")
