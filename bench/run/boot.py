"""Starts the servers a bench needs and stops them whatever happens: an error, Ctrl-C, or a second server that dies."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench.roles import Role
from toolkit.errors import ServerError

if TYPE_CHECKING:
    from serve.settings.config import ServerConfig

__all__ = ["Abort", "Here", "Server", "Start", "booted", "free_ports", "server_of"]


class Server(Protocol):
    """A running server, as `serve.process.lifecycle` hands it out."""

    @property
    def url(self) -> str:
        """Root of the server."""

    @property
    def pid(self) -> int:
        """The process whose descendants are the server."""

    @property
    def log(self) -> Path:
        """Where the server's output goes."""

    @property
    def api_key(self) -> str | None:
        """What requests must bring, if anything."""

    @property
    def checkpoint(self) -> Path:
        """The directory that is served, as it was given."""

    def stop(self) -> None:
        """End it with all its processes."""


@dataclass(frozen=True, slots=True)
class Here:
    """What this machine knows of a server that `qvl serve --detach` has left running: as in :class:`Server`."""

    pid: int
    log: Path
    checkpoint: Path


#: Seconds to wait for a boot that was told to end. One that can't be, such as a download, ends with this process.
_ABORT_S = 20.0

#: Starts a server and returns when it answers.
Start = Callable[[], Server]
#: Ends a server that may not have answered yet.
Abort = Callable[[], None]


def free_ports(count: int) -> list[int]:
    """Return so many different TCP ports of 127.0.0.1 that nobody listens on now."""
    held = []
    try:
        for _ in range(count):
            probe = socket.socket()
            held.append(probe)
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()


def _silent(phase: str) -> None:
    pass


def server_of(source: str, options: ServerConfig, on_phase: Callable[[str], None] = _silent) -> tuple[Start, Abort]:
    """Return how to start a server of ``source``, and how to end it while it boots.

    Args:
        source: a directory, a hub id or ``demo``.
        on_phase: told what the boot is doing.
    """
    from serve.process import lifecycle

    def start() -> Server:
        # Attached: the server ends with this process even when that is killed.
        return lifecycle.start(source, options, attached=True, on_phase=lambda phase, seconds: on_phase(phase))

    def abort() -> None:
        with suppress(ServerError):  # not started yet, or gone
            lifecycle.stop(options.port, drain=False)

    return start, abort


@contextmanager
def booted(starts: Mapping[Role, tuple[Start, Abort]], *, at_once: bool) -> Iterator[dict[Role, Server]]:
    """Start all servers, hand them over, and stop all of them in the end.

    Args:
        starts: how to start each, and how to end it before it has started.
        at_once: start them side by side, not one after the other; where two start on one GPU, each would take the
            other's memory for its own while it measures how much there is.
    """
    futures: dict[Role, Future[Server]] = {}
    stopped = threading.Event()
    try:
        for role, (start, _) in starts.items():
            futures[role] = _in_thread(start, stopped)
            if not at_once:
                wait([futures[role]])
                futures[role].result()
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in futures.values():
            if future.done():
                future.result()  # the first error, before waiting for the others
        yield {role: future.result() for role, future in futures.items()}
    finally:
        for role, future in futures.items():
            abort = starts[role][1]
            deadline = time.monotonic() + _ABORT_S
            while not future.done() and time.monotonic() < deadline:
                abort()
                wait([future], timeout=0.5)
            if future.done() and not future.exception():
                future.result().stop()
        stopped.set()


def _in_thread(start: Start, stopped: threading.Event) -> Future[Server]:
    """Call ``start`` in a thread of its own and keep that thread until ``stopped``.

    A server that is to end with this process ends, as Linux sees it, with the thread that started it. The thread is a
    daemon: this process does not wait for it when it ends.
    """
    future: Future[Server] = Future()

    def work() -> None:
        try:
            future.set_result(start())
        except BaseException as error:
            future.set_exception(error)
        else:
            stopped.wait()

    threading.Thread(target=work, name="boot", daemon=True).start()
    return future
