"""A program that takes what memory of a GPU is left, as another one on the same card would.

    python -m bench.neighbour cuda      # until its standard input ends

As a process of its own it takes blocks, halving their size where it gets none, and goes on taking whatever becomes
free. The device "cpu" is for trying it out under a limit on memory; pages are not touched, so that takes none.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

__all__ = ["Neighbour", "neighbour"]

#: Bytes of a block, the largest and the smallest tried. PyTorch takes no less than 2 MiB of a GPU at once.
_LARGEST = 1 << 30
_SMALLEST = 2 << 20


class Neighbour:
    """What is known of the program while it runs."""

    def __init__(self) -> None:
        #: Bytes that it has taken so far.
        self.taken = 0


@contextlib.contextmanager
def neighbour(device: str = "cuda", *, prefix: tuple[str, ...] = ()) -> Iterator[Neighbour]:
    """Have all memory taken that is or becomes free; on entering, until nothing is left.

    Args:
        device: as PyTorch names it.
        prefix: a command that runs the command it is given.

    Raises:
        RuntimeError: the program ended before it had taken anything.
    """
    told = Neighbour()
    command = [*prefix, sys.executable, "-m", "bench.neighbour", device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        output = process.stdout

        def read() -> None:
            for line in output:
                told.taken = int(line)

        first = output.readline()  # comes when a first round has left nothing
        if not first:
            raise RuntimeError(f"the neighbour on {device} ended before it had taken anything: see its message above")
        told.taken = int(first)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield told
        finally:
            process.stdin.close()
            reader.join()


def _take(device: str, ended: threading.Event) -> None:
    """Take all there is, say how much in all, and look again a tenth of a second later."""
    import torch

    held = [torch.empty(1, device=device)]  # a device that is none ends this here
    taken = said = 0
    while not ended.is_set():
        size = _LARGEST
        while size >= _SMALLEST:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device=device))
                taken += size
            except RuntimeError:  # torch.OutOfMemoryError, and what a CPU's allocator raises
                size //= 2
        if taken > said or not said:
            said = taken
            print(taken, flush=True)
        ended.wait(0.1)


def main() -> None:
    """Take memory until the standard input ends, or whoever has it open is gone."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    _take(sys.argv[1], ended)


if __name__ == "__main__":
    main()
