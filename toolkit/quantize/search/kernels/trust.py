"""Whether this machine's Triton kernels can be trusted: each is held against plain torch before it is first used.

Cards and Triton versions are many, and a kernel that rounds wrongly would only show as a worse model.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable

import torch

from toolkit.console import warn

__all__ = ["trusted"]

_found: dict[tuple[str, torch.device], bool] = {}
#: Whoever asks while a kernel is compiled waits for that.
_compiling = threading.Lock()


def trusted(what: str, device: torch.device, agrees: Callable[[], bool]) -> bool:
    """Return whether a kernel may be used; what is found out about it holds for this process.

    Args:
        what: the kernel, in words.
        device: where it is to run; on a CPU there are none.
        agrees: runs it on a small problem, and says whether the result is as good as plain torch's. May raise: then the
            kernel does not run here.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    with _compiling:
        if (what, device) not in _found:
            try:
                trouble = None if agrees() else "its results are wrong"
            except Exception as error:  # whatever a compiler or a driver may raise
                trouble = f"{type(error).__name__}: {error}"
            if trouble:
                warn(f"the GPU kernel for {what} is not used on {device}, plain torch is, which is slower ({trouble})")
            _found[what, device] = trouble is None
        return _found[what, device]
