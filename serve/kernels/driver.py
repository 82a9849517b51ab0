"""Machine code on a GPU, launched by the CUDA driver on torch's stream: clusters and programmatic dependent launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from toolkit.errors import ServerError

__all__ = ["Function"]

_MAX_DYNAMIC_SHARED, _CARVEOUT, _LOCAL_BYTES = 8, 9, 3  # CU_FUNC_ATTRIBUTE_*
_CLUSTER, _OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid", "grid_y", "grid_z", "block", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


class Function:
    """A kernel on the current device.

    Args:
        cubin: machine code. name: the kernel's. shared: bytes of shared memory that it is launched with.
        block: threads of a CTA. cluster: CTAs of a cluster.

    Raises ServerError where the device does not take it.
    """

    def __init__(self, cubin: bytes, name: str, *, shared: int, block: int, cluster: int) -> None:
        torch.cuda.current_stream()  # the context is there from here on
        torch.zeros(1, device="cuda")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._keep = cubin
        _call("cuModuleLoadData", ctypes.byref(self._module), cubin)
        _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        _call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, shared)
        _call("cuFuncSetAttribute", self._function, _CARVEOUT, 100)
        self._attributes = (_Attribute * 2)()
        number = 0
        if cluster > 1:
            self._attributes[number].id = _CLUSTER
            self._attributes[number].value[:3] = (cluster, 1, 1)
            number += 1
        self._attributes[number].id = _OVERLAP
        self._attributes[number].value[0] = 1
        self._config = _Config(1, 1, 1, block, 1, 1, shared, None, self._attributes, number + 1)

    @property
    def spills(self) -> bool:
        """Whether its registers did not suffice."""
        found = ctypes.c_int()
        _call("cuFuncGetAttribute", ctypes.byref(found), _LOCAL_BYTES, self._function)
        return found.value > 0

    def __call__(self, grid: int, arguments: Sequence[int | torch.Tensor | None]) -> None:
        """Launch ``grid`` CTAs on the current stream: tensors and None are pointers, ints are 32-bit."""
        values: list[Any] = [
            ctypes.c_int(each) if isinstance(each, int) else ctypes.c_void_p(0 if each is None else each.data_ptr())
            for each in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._config.grid = grid
        self._config.stream = torch.cuda.current_stream().cuda_stream
        _call("cuLaunchKernelEx", ctypes.byref(self._config), self._function, pointers, None)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ServerError(f"there is no CUDA driver: {error}") from error


def _call(function: str, *arguments: Any) -> None:
    driver = _driver()
    if result := getattr(driver, function)(*arguments):
        text = ctypes.c_char_p()
        driver.cuGetErrorString(result, ctypes.byref(text))
        raise ServerError(f"{function}: {(text.value or b'unknown').decode()} ({result})")
