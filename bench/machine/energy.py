"""The energy that GPUs take, from NVML's counters (millijoules since the driver was loaded, Volta and later).

Needs ``pynvml`` (the package nvidia-ml-py, which vLLM's GPU build brings); without it, or without a GPU, there is no
meter.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFINITION", "Meter", "joules_per_token", "open_meter"]

DEFINITION = (
    "Energy per output token = difference of NVML's energy counters over the point, summed over the GPUs the server "
    "computes on / output tokens of the point; the whole GPU counts, its idle draw and other processes on it too, the "
    "rest of the machine does not."
)


@dataclass(frozen=True, slots=True)
class Meter:
    """The energy counters of some GPUs.

    Attributes:
        indices: of the GPUs, as NVML and nvidia-smi count them.
    """

    indices: tuple[int, ...]
    nvml: Any

    def joules(self) -> float | None:
        """Return the sum of the counters in joules; only differences mean something. None when a GPU fails to tell."""
        try:
            handles = map(self.nvml.nvmlDeviceGetHandleByIndex, self.indices)
            return sum(int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles) / 1000.0
        except self.nvml.NVMLError:
            return None


def open_meter(pids: Collection[int] = ()) -> Meter | None:
    """Return a meter of the GPUs on which the processes ``pids`` compute.

    Where NVML knows none of them (in a container process numbers are others), it is of the GPUs that
    CUDA_VISIBLE_DEVICES names, else of all. None without NVML, without a GPU, with one that has no counter, and with
    one shared by MIG, whose counter holds the neighbours' energy too.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None
    try:
        handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())}
        used = tuple(index for index, handle in handles.items() if _computes(nvml, handle, pids))
        meter = Meter(used or _visible(nvml, handles), nvml)
        shared = any(_mig(nvml, handles[index]) for index in meter.indices)
    except nvml.NVMLError:
        return None
    return None if shared or not meter.indices or meter.joules() is None else meter


def _computes(nvml: Any, handle: Any, pids: Collection[int]) -> bool:
    return any(process.pid in pids for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))


def _mig(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:
        return False  # a GPU that can't be shared in this way


def _visible(nvml: Any, handles: dict[int, Any]) -> tuple[int, ...]:
    """Indices that CUDA_VISIBLE_DEVICES names, by number or by the beginning of a UUID; all without it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return tuple(handles)
    wanted = [name.strip() for name in named.split(",") if name.strip()]
    found = []
    for index, handle in handles.items():
        uuid = str(nvml.nvmlDeviceGetUUID(handle))
        if any(name == str(index) or (not name.isdecimal() and uuid.startswith(name)) for name in wanted):
            found.append(index)
    return tuple(found)


def joules_per_token(before: float | None, after: float | None, tokens: int | None) -> float | None:
    """Return the energy of an output token in joules; None when a reading is missing, the counter was reset, or no
    tokens were counted."""
    if before is None or after is None or not tokens or after < before:
        return None
    return (after - before) / tokens
