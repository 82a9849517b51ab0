"""The host's memory, as far as this process may have it: the machine's, or less where control groups limit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["available_memory", "memory_limit"]

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return the bytes that this process can have: the machine's, or what its control groups (v2 or v1) allow.

    Args:
        root: of the control groups; in a container the container's own.
        own: which group this process is in, one line for each hierarchy.
    """
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits(root, own))])


def available_memory(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return the bytes that this process may still take: what the machine has free, or what the tightest of its control
    groups leaves.

    Files in the page cache count as used in a group. All of them give way when memory is asked for, the active ones
    too, as they do in the machine's own figure (MemAvailable).

    Args:
        root: of the control groups; in a container the container's own.
        own: which group this process is in, one line for each hierarchy.
    """
    return min([int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in _limits(root, own))])


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group that has one, and the bytes used of it but for the page cache."""
    groups = [root]
    try:
        path = Path(next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")))
        groups += [root / group.relative_to("/") for group in (path, *path.parents)]
    except (OSError, StopIteration, ValueError):
        pass
    first = root / "memory"  # version 1
    files = [(group / "memory.max", group / "memory.current", group / "memory.stat", "") for group in groups]
    files += [(first / "memory.limit_in_bytes", first / "memory.usage_in_bytes", first / "memory.stat", "total_")]
    for maximum, current, stat, prefix in files:
        try:
            limit = int(maximum.read_text())  # "max" where there is no limit: a ValueError
        except (OSError, ValueError):
            continue
        try:
            counts = dict(line.split() for line in stat.read_text().splitlines())
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            used = max(0, int(current.read_text()) - cached)
        except (OSError, ValueError):
            used = 0
        yield limit, used
