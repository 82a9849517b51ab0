"""What a system takes: bytes on disk, memory of the server's processes, memory on the GPU."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "FLOATS",
    "Disk",
    "HostMemory",
    "disk",
    "gpu_memory",
    "host_memory",
    "model_type",
    "quantization",
    "weights_in_memory",
]

#: What `quantization` says of weights that are not quantized.
FLOATS = ("float16", "bfloat16", "float32")

DISK_DEFINITION = (
    "Size on disk = bytes of all files of the checkpoint directory; weights = its *.safetensors files alone."
)
HOST_DEFINITION = (
    "Host memory = sum over the server's process tree, after the load, of PSS (proportional set size: a page shared by "
    "k processes counts 1/k in each, so shared libraries are not counted once per process as RSS would); USS (private "
    "pages only) where the system has no PSS."
)
GPU_DEFINITION = (
    "GPU memory = what nvidia-smi reports for the server's processes; it holds weights and the KV cache, whose size is "
    "set by --gpu-memory-utilization and not by the model. Weights = what the server's log says model loading took."
)


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of a checkpoint directory."""

    total: int
    weights: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of a process tree and how they were counted (``pss`` or ``uss``)."""

    total: int
    kind: str


def disk(directory: Path) -> Disk:
    """Return the size of a checkpoint directory; files behind links count (the hub's cache is made of links)."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return Disk(
        total=sum(path.stat().st_size for path in files),
        weights=sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
    )


def quantization(directory: Path) -> str:
    """Return how a checkpoint's weights are stored, in words: ``awq 4 bits, group 128, gemm`` or ``float16``."""
    config = _config(directory)
    if config is None:
        return "unknown"
    found = config.get("quantization_config")
    if isinstance(found, dict):
        groups = found.get("config_groups")
        if isinstance(groups, dict):  # compressed-tensors says it of each group of modules
            weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
            first = next((each for each in weights if isinstance(each, dict)), {})
            found = {"quant_method": found.get("quant_method"), "bits": first.get("num_bits")} | (
                {"group_size": first["group_size"]} if first.get("group_size") else {}
            )
        words = [
            str(found.get("quant_method", "quantized")),
            f"{found['bits']} bits" if found.get("bits") else "",
            f"group {found['group_size']}" if "group_size" in found else "",
            str(found.get("version", "")),
        ]
        return ", ".join(filter(None, [" ".join(filter(None, words[:2])), *words[2:]]))
    text = config.get("text_config") or {}
    return str(
        config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "unknown"
    )


def model_type(directory: Path) -> str | None:
    """Return a checkpoint's ``model_type``, None where its config.json does not say it."""
    found = (_config(directory) or {}).get("model_type")
    return found if isinstance(found, str) else None


def _config(directory: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def host_memory(pid: int) -> HostMemory | None:
    """Return the memory of ``pid`` and its descendants; None when they are gone or may not be looked at."""
    total = {"pss": 0, "uss": 0}
    kinds = {"pss", "uss"}
    for process in _tree(pid):
        try:
            info = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            return None
        for kind in list(kinds):
            if hasattr(info, kind):
                total[kind] += getattr(info, kind)
            else:
                kinds.discard(kind)
    kind = "pss" if "pss" in kinds else "uss"
    return HostMemory(total[kind], kind) if total[kind] else None


def gpu_memory(pid: int) -> int | None:
    """Return the bytes of GPU memory nvidia-smi reports for ``pid`` and its descendants; None where it reports none of
    them."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    pids = {process.pid for process in _tree(pid)}
    used = [
        int(row[1]) * 2**20
        for row in csv.reader(answer.splitlines(), skipinitialspace=True)
        if len(row) == 2 and row[0].strip().isdecimal() and int(row[0]) in pids and row[1].strip().isdecimal()
    ]
    return sum(used) if used else None


_LOADED = re.compile(r"Model loading took ([0-9.]+) GiB")
#: The log has two decimals: below this a figure is mostly rounding, and none is better.
_LEAST_GIB = 0.1


_KERNEL = re.compile(
    r"Using (\w+?)(?:Linear)?(?:Kernel)? for (?:AutoAWQ|AWQ|mixed-precision|CompressedTensorsWNA16|AutoGPTQ)"
)


def kernel(log: str) -> str | None:
    """Return the kernel of quantized linear layers, such as ``Marlin``, from a vLLM log; None when it does not say."""
    found = _KERNEL.search(log)
    return found[1] if found else None


def weights_in_memory(log: str) -> int | None:
    """Return the bytes the engine says its weights take, from a vLLM log; over several ranks, their sum. None when it
    does not say, or says it too coarsely for a model this small."""
    found = [float(match) for match in _LOADED.findall(log)]
    return round(sum(found) * 2**30) if sum(found) >= _LEAST_GIB else None
