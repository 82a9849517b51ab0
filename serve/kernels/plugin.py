"""vLLM's entry point ``vllm.general_plugins``: makes our kernels known, in every process of vLLM that loads plugins.

Never raises: whatever is unlike vLLM 0.32 ends in a line of the log, and vLLM goes on with its own kernels.
"""

from __future__ import annotations

import logging
import os

from serve.settings.environment import KERNELS

__all__ = ["register"]

_log = logging.getLogger("vllm.qvl")


def register() -> None:
    """Register the kernels for this machine."""
    try:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _register_unpacked()
        elif current_platform.is_cuda() and os.environ.get(KERNELS) == "on":
            _register_qvl()
    except Exception as error:
        _log.warning("qvl's kernels are left out (%s: %s)", type(error).__name__, error)


def _register_qvl() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from serve.kernels.linear import QvlLinearKernel

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CUDA]
    if QvlLinearKernel not in kernels:
        linear.register_linear_kernel(QvlLinearKernel, PlatformEnum.CUDA, "mp")
        # vLLM appends, and takes the first that can
        kernels.insert(0, kernels.pop())
        # what it declines is then Humming's, not the first of vLLM's list
        linear._LINEAR_BACKEND_KERNEL_MAP["humming"].add(QvlLinearKernel)


def _register_unpacked() -> None:
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum, current_platform

    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    from serve.kernels.unpacked import UnpackedLinearKernel

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if UnpackedLinearKernel not in kernels:
        linear.register_linear_kernel(UnpackedLinearKernel, PlatformEnum.CPU, "mp")
        # vLLM appends, and takes the first that says it can: its own says so without the operator
        kernels.insert(0, kernels.pop())
        _log.warning(
            "vLLM has no kernel for 4-bit weights on this CPU: they are unpacked to 16 bits when they are loaded"
        )
