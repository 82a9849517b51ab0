"""AWQ checkpoints, GEMM and GEMV, of any Qwen2-VL. ``quantize`` is the one entry."""

from __future__ import annotations

from typing import Any

__all__ = ["quantize"]


def quantize(*args: Any, **kwargs: Any) -> Any:
    """Quantize a checkpoint; see :func:`toolkit.quantize.run.quantize`, which this imports when called."""
    from toolkit.quantize.run import quantize as run

    return run(*args, **kwargs)
