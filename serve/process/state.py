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
    "hostname",
    "load",
    "load_all",
    "locked",
    "numbering",
    "port_holder",
    "process_start",
    "remove",
    "require",
    "save",
    "state_file",
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
    #: The certificate that it shows; None where it speaks plain HTTP.
    certificate: str | None = None
    #: The machine's name, to be told to people.
    host: str = ""
    #: What the numbers of processes above belong to, see `numbering`. Elsewhere they mean other processes, or none.
    numbering: str = ""

    @property
    def here(self) -> bool:
        """Whether its numbers mean processes that this one sees."""
        return self.numbering == numbering()

    @property
    def elsewhere(self) -> bool:
        """Whether it may run where this process can't see it: on another machine, or in another container."""
        return not self.here and (self.host != hostname() or self.numbering.partition(" ")[0] == _boot())

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.here and _runs(self.pid, self.created)

    @property
    def supervised(self) -> bool:
        """Whether a process runs that would start it again."""
        return self.here and self.supervisor is not None and _runs(self.supervisor, self.supervisor_created)

    @property
    def ours(self) -> bool:
        """Whether this very process is the one that would start it again."""
        return self.supervised and self.supervisor == os.getpid()

    @property
    def uptime(self) -> float:
        """Seconds since the process began."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.created


def hostname() -> str:
    """Return the machine's name, in a container the container's."""
    return socket.gethostname()


def _boot() -> str:
    """Return what no two starts of any machine have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return hostname()  # a kernel that hides it


def numbering() -> str:
    """Return what tells this process's view of process numbers from every other one.

    That is the start of the machine (its boot id) and the namespace of process numbers, for containers share the first
    and may share the directory of states. Numbers from before a restart, or from another container, are other
    processes' by now.
    """
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = hostname()
    return f"{_boot()} {namespace}"


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


def state_file(port: int) -> Path:
    """Return the file in which the server on this port is written down."""
    return cache_dir("servers", f"{port}.json")


def save(state: ServerState) -> None:
    """Write the state of a server, whole or not at all."""
    path = state_file(state.port)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(asdict(state), indent=1) + "\n")


def load(port: int) -> ServerState | None:
    """Return what is written down about the server on this port; None if nothing is, or nothing that can be read."""
    try:
        return ServerState(**json.loads(state_file(port).read_text()))
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
    same = current is None or (current.pid, current.created, current.numbering) == (
        state.pid, state.created, state.numbering,
    )  # fmt: skip
    if same or (current is not None and current.ours):  # or one that its supervisor has replaced
        state_file(state.port).unlink(missing_ok=True)


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
    """Return the processes of a server's group that still run.

    A group is known by its leader. Where that is gone, the number may have become another program's since, whose leader
    has ended too: then the group is the server's only if one of it writes to the server's log.
    """
    if not state.here:
        return []
    try:
        if process_start(state.pid) != state.created:
            return []  # the number was given to a new process, which the kernel does only when the group is gone
        led = True
    except psutil.NoSuchProcess:
        led = False
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == state.pid and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    # One is enough: a group's number is given away only when all of it has ended.
    return members if led or any(_writes_to(state.log, process.pid) for process in members) else []


def _writes_to(log: str, pid: int) -> bool:
    """Whether a process's output or errors go to this file, which all of a server's processes inherit."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if Path(f"/proc/{pid}/fd/{number}").samefile(log):
                return True
    return False


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
    if state.supervisor is None or state.ours:
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
