"""What this machine offers to a bench: servers that it starts, those that run here already, the demo's questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from bench.run.boot import Abort, Here, Start

__all__ = ["Booter", "find_here", "write_demo"]


def write_demo(directory: Path, per_task: int | None) -> Path:
    """Write the demo's questions and return their file."""
    from toolkit.tasks.manifests import write_tasks

    return write_tasks(directory) if per_task is None else write_tasks(directory, per_task=per_task)


def find_here(url: str) -> Here | None:
    """Return the server that `qvl serve --detach` has left on this machine under a URL, if it is one of those."""
    from bench.run.boot import Here
    from serve.process import state

    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
        return None
    known = state.load(parts.port)
    return Here(known.pid, Path(known.log), Path(known.checkpoint)) if known and known.alive else None


class Booter:
    """Starts servers with `serve.process.lifecycle`, each on a port of its own."""

    def __init__(
        self, arguments: tuple[str, ...], port: int | None, *, shared: bool, on_phase: Callable[[str, str], None]
    ) -> None:
        from bench.run.boot import free_ports

        self._arguments = arguments
        self._ports = iter(free_ports(2) if port is None else [port, port + 1])
        self._shared = shared
        self._on_phase = on_phase

    @property
    def at_once(self) -> bool:
        """Whether servers may boot at the same time: not on a GPU, where each measures how much memory is left."""
        from serve.settings.config import ServerConfig

        return not ServerConfig().on_gpu

    def boot(self, source: str) -> tuple[Start, Abort]:
        """Return how to start a server for ``source`` and how to end it while it boots."""
        from bench.run.boot import server_of
        from serve.settings.config import DEFAULT_GPU_SHARE, ServerConfig

        share = DEFAULT_GPU_SHARE / 2 if self._shared and not self.at_once else None
        options = ServerConfig(port=next(self._ports), gpu_memory_utilization=share, extra=self._arguments)
        return server_of(source, options, partial(self._on_phase, source))
