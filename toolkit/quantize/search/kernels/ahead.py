"""Triton kernels compiled beside what comes before the search, whose first layer would wait for them: seconds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from toolkit.quantize.recipe import Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["compiled_ahead"]


@contextlib.contextmanager
def compiled_ahead(devices: Sequence[str], recipe: Recipe) -> Iterator[None]:
    """Compile the kernels of a recipe's search in a thread, which has ended when the block has.

    One device, whose search is in this process: several have a process each, which compile their own.
    """
    import torch

    if len(devices) > 1 or torch.device(devices[0]).type != "cuda":
        yield
        return
    thread = threading.Thread(target=_compile, args=(torch.device(devices[0]), recipe), name="kernels", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _compile(device: torch.device, recipe: Recipe) -> None:
    import torch

    from toolkit.quantize.search.clips import has_clip_kernel
    from toolkit.quantize.search.compensate import has_rounding_kernel

    if recipe.search != "moments":
        return
    there = torch.empty(0, device=device)
    device = there.device  # with its number, as weights there will say
    with torch.cuda.device_of(there):
        if recipe.rounding == "compensated":
            has_rounding_kernel(device)
        if recipe.clip:
            has_clip_kernel(device, recipe.group_size)
