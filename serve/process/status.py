"""What is known about the servers of this machine: what is written down, what their processes are, what they say."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from serve.process import state
from serve.process.bootlog import decisive_lines, last_words, read_from
from serve.process.trust import quick_client

__all__ = ["Status", "describe", "known_server", "known_servers", "readiness"]


State = Literal["booting", "ready", "stalled", "draining", "silent", "restarting", "dead", "elsewhere"]


@dataclass(frozen=True)
class Status:
    """What is known about one server."""

    port: int
    #: "booting": not ready yet; "ready"; "stalled": its engine stopped answering; "draining": it is being stopped;
    #: "silent": it runs but nothing answers; "restarting": it died and is about to be started again; "dead";
    #: "elsewhere": it was started on another machine or in another container, and can't be seen from here.
    state: State
    url: str
    model_name: str
    checkpoint: str
    backend: str
    pid: int
    #: Seconds since its start; None when dead.
    uptime: float | None
    #: Bytes of host memory of all its processes, shared pages counted once; None when dead.
    memory: int | None
    log: str
    #: How often its supervisor has started it again.
    restarts: int = 0
    #: Why, where it is stalled or dead.
    reason: str | None = None


def known_server(port: int) -> Status:
    """Return what is known about the server on this port. Raises ServerError when qvl started none there."""
    return describe(state.require(port))


def known_servers() -> list[Status]:
    """Return what is known about all servers that were started and not stopped, by port."""
    return [describe(known) for known in state.load_all()]


def readiness(client: httpx.Client) -> dict[str, Any] | None:
    """Return what /ready says, see `serve.app.ready`; None when nothing answers there."""
    try:
        said = client.get("/ready").json()
    except (httpx.HTTPError, ValueError):
        return None
    return said if isinstance(said, dict) and {"ready", "state"} <= set(said) else None


def describe(known: state.ServerState) -> Status:
    """Ask and look at a server that is written down."""
    alive = known.alive
    kind: State
    reason = None
    if known.elsewhere:
        kind, reason = "elsewhere", f"started on {known.host or 'another machine'}: ask there"
    elif not alive:
        kind = "restarting" if known.supervised else "dead"
        reason = "; ".join(decisive_lines(last_words(read_from(Path(known.log))), limit=2)) or None
    elif not known.ready:
        kind = "booting"
    else:
        with quick_client(known.url, 5) as client:
            said = readiness(client)
        kind = "silent" if said is None else "stalled" if said["state"] == "failed" else said["state"]
        reason = None if said is None else said.get("reason")
    return Status(
        port=known.port,
        state=kind,
        url=known.url,
        model_name=known.model_name,
        checkpoint=known.checkpoint,
        backend=known.backend,
        pid=known.pid,
        uptime=known.uptime if alive else None,
        memory=_memory(known) if alive else None,
        log=known.log,
        restarts=known.restarts,
        reason=reason,
    )


def _memory(known: state.ServerState) -> int:
    """Return the bytes of all of a server's processes, each shared page split among its users (PSS)."""
    total = 0
    for process in state.group_members(known):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total
