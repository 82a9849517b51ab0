"""What a server's processes hold, on the host and on GPUs, at each scrape of /metrics: what grows shows over hours.

Host memory is what the processes of the server's group hold for themselves, by kind of process: anonymous pages, as the
kernel counts them in /proc/PID/status. Files that are mapped (weights while they load, libraries) are left out, for the
kernel drops them when it needs room. Shared memory is counted once, as the most that any of them has.

GPU memory is NVML's: of the server's processes where it knows them, of whole cards where it does not, as in containers,
which are told other process numbers. A CPU server has none.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["MemoryCollector", "gpu_memory", "group", "host_memory", "register"]

#: Kinds of a server's processes, by what vLLM calls them.
_KINDS = (("EngineCore", "engine"), ("Worker", "worker"))
_PROC = Path("/proc")


def group(leader: int, proc: Path = _PROC) -> list[int]:
    """Return the processes of the group that ``leader`` is in; only that one where there is no /proc."""
    try:
        number = os.getpgid(leader)
        found = [int(entry.name) for entry in os.scandir(proc) if entry.name.isdecimal()]
    except OSError:
        return [leader]
    return [pid for pid in found if _group_of(pid) == number]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:  # it has ended
        return None


def host_memory(pids: Collection[int], own: int, proc: Path = _PROC) -> dict[str, int]:
    """Return bytes by kind of process: "api" (the process ``own``), "engine", "worker", "other" and "shared"."""
    found: Counter[str] = Counter()
    shared = 0
    for pid in pids:
        try:
            status = (proc / str(pid) / "status").read_text(encoding="utf-8")
            title = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        sizes = {
            key: 1024 * int(value.split()[0])
            for key, _, value in (line.partition(":") for line in status.splitlines())
            if key in ("RssAnon", "RssShmem")
        }
        kind = "api" if pid == own else next((kind for word, kind in _KINDS if word in title), "other")
        found[kind] += sizes.get("RssAnon", 0)
        shared = max(shared, sizes.get("RssShmem", 0))
    return {**found, "shared": shared} if found else {}


def gpu_memory(nvml: Any, pids: Collection[int]) -> dict[tuple[int, str], int]:
    """Return bytes by a GPU's index and whose they are: "server", or "card" where NVML knows none of ``pids``."""
    count = nvml.nvmlDeviceGetCount()
    handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)}
    own: Counter[tuple[int, str]] = Counter()
    for index, handle in handles.items():
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid in pids and process.usedGpuMemory:
                own[index, "server"] += int(process.usedGpuMemory)
    if own:
        return dict(own)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = set(named.split(",")) if named else {str(index) for index in handles}
    return {
        (index, "card"): int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        for index, handle in handles.items()
        if {str(index), str(nvml.nvmlDeviceGetUUID(handle))} & seen
    }


@functools.cache
def _nvml() -> Any:
    """Return NVML, begun; None without a driver for it."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None
    return nvml


class MemoryCollector(Collector):
    """Two gauges that are read when they are asked for."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the memory of this process's group now."""
        host = GaugeMetricFamily(
            "qvl_host_memory_bytes",
            "Bytes that processes hold for themselves, and share among themselves (process=shared).",
            labels=["process"],
        )
        gpu = GaugeMetricFamily(
            "qvl_gpu_memory_bytes", "Bytes in use on a GPU: of this server, or of the whole card.", labels=["gpu", "of"]
        )
        pids = group(os.getpid())
        for kind, size in host_memory(pids, os.getpid()).items():
            host.add_metric([kind], size)
        nvml = _nvml()
        if nvml is not None:
            try:
                for (index, of), size in gpu_memory(nvml, pids).items():
                    gpu.add_metric([str(index), of], size)
            except nvml.NVMLError:
                pass  # a scrape without it, and the next has it again
        yield host
        yield gpu

    def describe(self) -> list[GaugeMetricFamily]:
        """Name nothing beforehand: registering must not read memory."""
        return []


@functools.cache
def register() -> None:
    """Put the gauges on /metrics, once a process."""
    REGISTRY.register(MemoryCollector())
