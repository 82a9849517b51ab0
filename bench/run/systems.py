"""The two systems: where each answers, what it is, and what its server takes."""

from __future__ import annotations

import asyncio
import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from bench.load.endpoint import Endpoint, discover, normalise_url, public_url
from bench.machine import resources
from bench.roles import ROLES, Role
from bench.run.boot import Here, Server
from bench.run.config import BenchConfig, is_url
from bench.run.loads import PART
from bench.run.measured import Measurements

__all__ = ["Memory", "System", "SystemInfo", "described", "info", "reached", "warnings"]


@dataclass(frozen=True, slots=True)
class System:
    """One of the two that are measured.

    Attributes:
        pid: of its server's process, when that runs here: whose GPUs' energy is counted.
    """

    role: Role
    endpoint: Endpoint
    pid: int | None = None


class Memory(BaseModel):
    """Memory of a server; None where it can't be known. All but the KV cache of servers that this run started.

    Attributes:
        kv_cache_tokens: of all requests together that fit into the server's KV cache.
    """

    model_config = PART

    host_bytes: int | None = None
    host_kind: Literal["pss", "uss"] | None = None
    gpu_bytes: int | None = None
    weights_bytes: int | None = None
    kv_cache_tokens: int | None = None


class SystemInfo(BaseModel):
    """Who was measured."""

    model_config = PART

    role: Role
    label: str
    source: str = Field(description="as given on the command line")
    booted: bool = Field(description="whether this run started the server")
    model: str
    url: str
    server_version: str | None = None
    model_type: str | None = Field(default=None, description="of its config.json: which family it is of")
    quantization: str | None = None
    kernel: str | None = Field(default=None, description="of its quantized linear layers, as the engine's log says")
    disk_bytes: int | None = None
    disk_weights_bytes: int | None = None
    memory: Memory = Memory()
    serve_arguments: list[str] = []


def reached(role: Role, config: BenchConfig, server: Server | None, known: Server | Here | None) -> System:
    """Ask a system what it serves.

    Args:
        server: that this run has started for it.
        known: that, or what this machine knows of the server under its URL.

    Raises:
        ServerError: it does not answer as a server does.
    """
    url, key = (server.url, server.api_key) if server else (config.sources[role], config.key(role))
    found = asyncio.run(discover(url, key, model=None if server else config.models[role]))
    return System(role, found, known.pid if known else None)


def _name(source: str) -> str:
    """A short name for a directory, a hub id or ``demo``."""
    return Path(source).name or Path(source).resolve().name or source


def info(system: System, config: BenchConfig, server: Server | Here | None, found: Measurements) -> SystemInfo:
    """Describe a system while it still runs: its memory is read after the load."""
    source, end = config.sources[system.role], system.endpoint
    kv_cache = found.kv_cache_tokens.get(system.role)
    if server is None:
        shown = public_url(end.url)
        return SystemInfo(
            role=system.role,
            label=end.model,
            source=public_url(source),
            booted=False,
            model=end.model,
            url=shown,
            server_version=end.version,
            memory=Memory(kv_cache_tokens=kv_cache),
        )
    given = is_url(source)
    disk = resources.disk(server.checkpoint)
    host = resources.host_memory(server.pid)
    try:
        log = server.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        log = ""
    return SystemInfo(
        role=system.role,
        label=end.model if given else _name(source),
        source=public_url(source) if given else source,
        booted=not given,
        model=end.model,
        url=public_url(end.url) if given else end.url,
        server_version=end.version,
        model_type=resources.model_type(server.checkpoint),
        quantization=resources.quantization(server.checkpoint),
        kernel=resources.kernel(log),
        disk_bytes=disk.total,
        disk_weights_bytes=disk.weights,
        memory=Memory.model_validate(
            {
                "host_bytes": host.total if host else None,
                "host_kind": host.kind if host else None,
                "gpu_bytes": resources.gpu_memory(server.pid),
                "weights_bytes": resources.weights_in_memory(log),
                "kv_cache_tokens": kv_cache,
            }
        ),
        serve_arguments=[] if given else list(config.serve_arguments),
    )


def _unmet(role: Role, config: BenchConfig) -> SystemInfo:
    source = config.sources[role]
    shown = public_url(source) if is_url(source) else source
    label = urlsplit(shown).netloc if is_url(source) else _name(source)
    return SystemInfo(role=role, label=label, source=shown, booted=False, model="", url="")


def described(config: BenchConfig, found: dict[Role, SystemInfo]) -> dict[Role, SystemInfo]:
    """Return both systems in order, told apart by role where their names are equal; a run that ended at the first never
    met the second."""
    infos = {role: found.get(role) or _unmet(role, config) for role in ROLES}
    if infos["baseline"].label != infos["candidate"].label:
        return infos
    return {role: one.model_copy(update={"label": f"{one.label} ({role})"}) for role, one in infos.items()}


def warnings(config: BenchConfig, infos: dict[Role, SystemInfo]) -> list[str]:
    """Say why the two can't be compared, or not as it seems."""
    a, b = config.sources["baseline"], config.sources["candidate"]
    if is_url(a) and is_url(b):
        names = [infos[role].model for role in ROLES]
        if normalise_url(a) == normalise_url(b):
            if names[0] != names[1]:
                return ["baseline and candidate are models of one server, which had other inputs for each"]
            return ["baseline and candidate are one server: differences are noise"]
        if names[0] and names[0] == names[1]:
            return [f"both servers call their model {names[0]}: when it is one checkpoint, differences are noise"]
        return []
    local = not is_url(a) and not is_url(b)
    if a == b or (local and _same_weights(Path(a), Path(b))):
        return ["baseline and candidate are the same model: differences are noise"]
    if local and infos["baseline"].booted != infos["candidate"].booted:
        return ["only one of the two systems was reached"]
    return []


def _same_weights(a: Path, b: Path) -> bool:
    """Whether two directories hold the same weights, byte for byte; they are read only when their sizes are equal."""
    files = [{path.name: path for path in directory.glob("*.safetensors")} for directory in (a, b)]
    if not files[0] or files[0].keys() != files[1].keys():
        return False
    return all(filecmp.cmp(path, files[1][name], shallow=False) for name, path in files[0].items())
