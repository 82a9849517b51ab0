"""Programs that have the number 1, as the first of a container has."""

from __future__ import annotations

import subprocess

#: Put before a command: in a process namespace of its own, which ends with what started it.
ALONE = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]


def may_unshare() -> bool:
    """Whether this user may make a process namespace, which a machine for tests may forbid."""
    return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0
