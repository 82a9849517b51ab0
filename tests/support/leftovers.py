"""Ends what tests have started and left, once the tests' process is gone, however it went.

An interrupted run stops its servers as it unwinds. One that is killed, or a worker that xdist kills because it did not
end in time, can't: servers, their supervisors and commands like `qvl serve --detach` would stay. So a process of its
own waits for the end of the tests' process, and then kills all that carry the mark which that process has given its
environment. What `tests/support/zygote.py` forks is killed by the kernel instead: it has no environment of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

#: The variable of the mark.
MARK = "TESTS_OF_QVL"
#: Seconds in which a process that was just started may begin another one.
_SETTLES = 0.5


class Leftovers:
    """Marks the environment; what has the mark is killed when this process ends, or at the end of the context."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def __enter__(self) -> Self:
        self._before = os.environ.get(MARK)
        command = [sys.executable, str(Path(__file__).resolve()), self.mark]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        os.environ[MARK] = self.mark
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()
        if self._before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = self._before


def marked(mark: str) -> list[int]:
    """Return the processes that were started with this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def end(pid: int) -> None:
    """Kill a process; of one that leads a group all that is in it: an engine writes its title over the mark."""
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def main(mark: str) -> None:
    """Wait until standard input closes, then kill what has the mark until nothing has it any more."""
    sys.stdin.read()
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < _SETTLES:
        for pid in marked(mark):
            quiet_since = time.monotonic()
            end(pid)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
