"""A program that takes what memory of a GPU is left, as another one on the same card would.

    python -m bench.chaos gpu-memory cuda      # until its standard input ends

As a process of its own it takes blocks, halving their size where it gets none, and goes on taking whatever becomes
free. The device "cpu" is for trying it out under a limit on memory; pages are not touched, so that takes none.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.errors import BenchError

if TYPE_CHECKING:
    import torch

__all__ = ["Neighbour", "neighbour", "run"]

#: Bytes of a block, the largest and the smallest tried. PyTorch takes no less than 2 MiB of a GPU at once.
_LARGEST = 1 << 30
_SMALLEST = 2 << 20


@dataclass
class Neighbour:
    """What is known of the program while it runs."""

    #: Bytes that it has taken so far.
    taken: int


@contextlib.contextmanager
def neighbour(device: str = "cuda", *, prefix: tuple[str, ...] = ()) -> Iterator[Neighbour]:
    """Have all memory taken that is or becomes free; on entering, until nothing is left.

    Args:
        device: as PyTorch names it.
        prefix: a command that runs the command it is given.

    Raises:
        RuntimeError: the program ended before it had taken anything.
    """
    command = [*prefix, sys.executable, "-m", "bench.chaos", "gpu-memory", device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        output = process.stdout
        first = output.readline()  # comes when a first round has left nothing
        if not first:
            raise RuntimeError(f"the neighbour on {device} ended before it had taken anything: see its message above")
        told = Neighbour(int(first))

        def read() -> None:
            for line in output:
                told.taken = int(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield told
        finally:
            process.stdin.close()
            reader.join()


def _take(held: list[torch.Tensor], ended: threading.Event) -> None:
    """Take all that the device of the first tensor has, say how much in all, and look again a tenth of a second later.

    What is taken goes into the list.
    """
    import torch

    device = held[0].device
    taken, said = 0, -1
    while not ended.is_set():
        size = _LARGEST
        while size >= _SMALLEST:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device=device))
                taken += size
            except RuntimeError:  # torch.OutOfMemoryError, and what a CPU's allocator raises
                size //= 2
        if taken > said:
            said = taken
            print(taken, flush=True)
        ended.wait(0.1)


def run(device: str) -> None:
    """Take memory of ``device`` until the standard input ends, or whoever has it open is gone.

    Raises:
        BenchError: no memory can be taken of it.
    """
    import torch

    try:
        first = torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise BenchError(f"no memory can be taken of {device}: {error}") from error
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    _take([first], ended)
