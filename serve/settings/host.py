"""The host's memory, as far as this process may have it."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["memory_limit"]


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that this process can have: the machine's, or what its control groups (v2 or v1) allow.

    Args:
        root: of the control groups; in a container the container's own.
        own: which group this process is in, one line for each hierarchy.
    """
    files = [root / "memory.max", root / "memory" / "memory.limit_in_bytes"]
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
        files += [root / parent.relative_to("/") / "memory.max" for parent in (Path(group), *Path(group).parents)]
    except (OSError, StopIteration, ValueError):
        pass
    least = int(psutil.virtual_memory().total)
    for file in files:
        try:
            least = min(least, int(file.read_text()))  # "max" where there is no limit: a ValueError
        except (OSError, ValueError):
            continue
    return least
