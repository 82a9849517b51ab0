"""The product itself: which of the kernels for a layer's shape takes a batch, and how they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from serve.kernels.driver import Function
from serve.kernels.nvrtc import compile_cubin
from serve.kernels.plans import ROWS, Plan, plan_for
from toolkit.errors import ServerError

__all__ = [
    "CAPABILITY",
    "GROUP_SIZES",
    "SOURCE",
    "Product",
    "Shape",
    "compile_for",
    "multiprocessors",
    "options",
    "plans_of",
]

GROUP_SIZES = (32, 64, 128)
SOURCE = Path(__file__).with_name("w4a16.cu")
#: Of Hopper cards, which the kernels are made for.
CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Shape:
    """What a kernel is made for.

    columns: N, outputs. inputs: K. group_size: inputs that share a scale. half: float16, not bfloat16.
    """

    columns: int
    inputs: int
    group_size: int
    half: bool

    def reason(self) -> str | None:
        """Say why there can be no kernel for the shape; None: there can."""
        if self.group_size not in GROUP_SIZES:
            return f"groups of {self.group_size}, not {', '.join(map(str, GROUP_SIZES))}"
        if self.columns % 64 or self.inputs % 128:
            return f"{self.columns} outputs and {self.inputs} inputs, not multiples of 64 and 128"
        return None


class Product:
    """The kernels of a shape on the current device, one for each of `ROWS`.

    Args:
        shape: of the weights. plans: for numbers of rows, in rising order.
    """

    def __init__(self, shape: Shape, plans: Sequence[tuple[int, Plan]], sms: int) -> None:
        self.shape = shape
        self._kernels: list[tuple[int, Function, int]] = []
        for rows, plan in plans:
            cubin = compile_cubin(SOURCE.read_text(encoding="utf-8"), options(shape, plan, rows, sms))
            function = Function(
                cubin,
                "w4a16",
                shared=plan.shared(shape.columns, shape.inputs, rows, sms),
                block=32 * plan.warps,
                cluster=plan.split,
            )
            if not function.spills:
                self._kernels.append((rows, function, plan.clusters(shape.columns, sms) * plan.split))

    @classmethod
    def of(cls, shape: Shape) -> Product:
        """Return the kernels of a shape on the current device: what `compile_for` has not made yet is made one by one.

        Raises ServerError as that does.
        """
        sms = multiprocessors()
        return cls(shape, plans_of(shape, sms), sms)

    @property
    def max_rows(self) -> int:
        """Rows up to which there is a kernel; 0: there is none."""
        return self._kernels[-1][0] if self._kernels else 0

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Write x [M, K] times the weights, plus the bias [N], into out [M, N]; M is at most `max_rows`.

        ``weight``, ``scales``, ``zeros`` as `serve.kernels.tiles` says; their columns may be padded. All contiguous.
        """
        rows = x.shape[0]
        function, grid = next((function, grid) for most, function, grid in self._kernels if rows <= most)
        operands = [x, weight, scales, zeros, bias, out]
        function(grid, [*operands, rows, self.shape.columns, self.shape.inputs, scales.shape[-1]])


def options(shape: Shape, plan: Plan, rows: int, sms: int) -> list[str]:
    """Return NVRTC's options for the kernel of a shape, a plan and at most so many rows."""
    return ["-arch=sm_90", "--std=c++17", *plan.options(shape.columns, rows, shape.group_size, shape.half, sms)]


def multiprocessors() -> int:
    """Return how many the current device has. Raises ServerError where it is none that the kernels are made for."""
    if torch.cuda.get_device_capability() != CAPABILITY:
        raise ServerError(f"{torch.cuda.get_device_name()} is not a Hopper card (compute capability 9.0)")
    return int(torch.cuda.get_device_properties().multi_processor_count)


def plans_of(shape: Shape, sms: int) -> list[tuple[int, Plan]]:
    """Return a plan for each of `ROWS` that there is one for, on a device with so many multiprocessors."""
    if shape.reason() is not None:
        return []
    found = [(rows, plan_for(shape.columns, shape.inputs, shape.group_size, rows, sms)) for rows in ROWS]
    return [(rows, plan) for rows, plan in found if plan is not None]


def compile_for(shape: Shape, sms: int) -> None:
    """Compile the kernels of a shape into the cache, side by side; needs no device.

    Raises ServerError where there is no compiler, or it fails.
    """
    source = SOURCE.read_text(encoding="utf-8")
    with ThreadPoolExecutor() as pool:  # NVRTC lets go of the interpreter's lock
        jobs = [options(shape, plan, rows, sms) for rows, plan in plans_of(shape, sms)]
        list(pool.map(lambda job: compile_cubin(source, job), jobs))
