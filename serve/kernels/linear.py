"""Our kernel as vLLM asks for linear kernels: few rows are ours, more are Humming's, on one copy of the weights.

Imported in vLLM's processes alone, by the plugin. Written against vLLM 0.32 and humming-kernels 0.1.17.

torch.compile keeps what it compiled together with what its guards looked at, so a kernel holds nothing that leads to a
layer or to its weights: vLLM's ahead-of-time compilation can't keep those (KeyError: 'qweight'). And the operator's
arguments are the same for all layers of a shape, so that one compiled graph serves them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.humming import HummingLinearKernel
from vllm.scalar_type import scalar_types

from serve.kernels.product import CAPABILITY, Product, Shape, compile_for, multiprocessors
from toolkit.errors import ServerError

__all__ = ["QvlLinearKernel"]

#: As vLLM's own modules log.
_log = logging.getLogger("vllm.qvl")
#: How far the two kernels' answers may be apart, relative: both round to 16 bits once.
_TOLERANCE = 0.01
_CHECKED_ROWS = 3
_BIAS = "qvl_bias"

_library = torch.library.Library("qvl", "FRAGMENT")
_library.define(
    "w4a16(Tensor x, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias, Tensor? lanes_bias, Tensor locks, "
    "str key, int columns) -> Tensor"
)


@dataclass(frozen=True)
class _Kernels:
    """Both kernels of a shape: ours, and Humming's (the numbers of its kernels, by rows)."""

    product: Product
    humming: torch.Tensor
    launch: Callable[..., torch.Tensor]

    def many(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
        locks: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Have Humming write x [M, K] times the weights, plus the bias in the lanes' order, into out [M, N]."""
        weight, scales, zeros = weights
        self.launch(
            configs=self.humming,
            inputs=x,
            weight=weight,
            weight_scale=scales,
            zero_point=zeros,
            bias=bias,
            outputs=out,
            locks=locks,
        )


#: By the operator's argument ``key``: an operator takes no objects.
_kernels: dict[str, _Kernels | None] = {}
#: Shapes that are being compiled, since their first layer was made; the weights are read meanwhile.
_compiling: dict[Shape, Future[None]] = {}
_pool = ThreadPoolExecutor(4, thread_name_prefix="qvl-nvrtc")


class QvlLinearKernel(HummingLinearKernel):
    """Products of 4-bit weights with up to 16 rows by w4a16.cu, with more by Humming."""

    def __init__(self, c: MPLinearLayerConfig, *names: Any, **named: Any) -> None:
        super().__init__(c, *names, **named)
        shape = _shape(c)
        self._key = f"{shape.columns}x{shape.inputs}/{shape.group_size}/{'half' if shape.half else 'bfloat16'}"
        self._columns = shape.columns
        if shape not in _compiling:
            _compiling[shape] = _pool.submit(compile_for, shape, multiprocessors())

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 90: Hopper."""
        return 90

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Say whether the layer is one for this kernel, or why not."""
        able, why = super().can_implement(c)
        if not able:
            return able, why
        if torch.cuda.get_device_capability() != CAPABILITY:
            return False, "qvl's kernel is made for Hopper"
        if c.weight_type != scalar_types.uint4 or not c.zero_points:
            return False, "qvl's kernel takes 4-bit weights with zero points"
        if c.act_type not in (torch.bfloat16, torch.float16):
            return False, f"qvl's kernel takes 16-bit activations, not {c.act_type}"
        why = _shape(c).reason()
        return why is None, why

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Let Humming lay out the weights, and hold our kernel against its answer once a shape."""
        bias = getattr(layer, "bias", None)
        own = None if bias is None else bias.detach().clone()
        super().process_weights_after_loading(layer)
        layer.register_buffer(_BIAS, own, persistent=False)  # Humming has brought its own into another order
        if self._key not in _kernels:
            _kernels[self._key] = self._checked(layer)
        if _kernels[self._key] is None:
            self._key = ""

    def _checked(self, layer: torch.nn.Module) -> _Kernels | None:
        shape = _shape(self.config)
        try:
            from humming.kernel.humming import HummingKernel  # starts a compiler when it is imported
            from humming.ops.launcher import launch_kernel

            _compiling[shape].result()
            product = Product.of(shape)
            if not product.max_rows:
                raise ServerError("no plan fits")
            weight, scales, zeros = _tensors(layer)
            layer_config = self.layer_config.to_str()
            configs = HummingKernel.prepare_kernels(layer_config, self.compute_config, None, weight.device)
            found = _Kernels(product, configs, launch_kernel)
            x = torch.randn(_CHECKED_ROWS, shape.inputs, device=weight.device).to(self.config.act_type)
            ours, theirs = (
                torch.full((_CHECKED_ROWS, shape.columns), torch.nan, device=x.device, dtype=x.dtype) for _ in range(2)
            )
            product(x, weight, scales, zeros, getattr(layer, _BIAS), ours)
            found.many(x, (weight, scales, zeros), getattr(layer, "bias", None), self.locks, theirs)
            apart = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
            if not apart < _TOLERANCE:
                raise ServerError(f"its answer is {apart:.3g} away from Humming's")
        except Exception as error:
            _log.warning("no kernel of qvl for %s (%s: %s): Humming goes on", self._key, type(error).__name__, error)
            return None
        _log.info("qvl's kernel takes %s, up to %d rows", self._key, product.max_rows)
        return found

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [..., K] times the weights, plus the bias [N]."""
        if not self._key:
            result: torch.Tensor = super().apply_weights(layer, x, bias)
            return result
        own, lanes = (None, getattr(layer, "zero_bias", None)) if bias is None else (getattr(layer, _BIAS), bias)
        flat = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = torch.ops.qvl.w4a16(
            flat,
            layer.weight,
            layer.weight_scale,
            layer.zero_point,
            own,
            lanes,
            self.locks,
            self._key,
            self._columns,
        )
        return out.view(*x.shape[:-1], self._columns)


def _shape(c: MPLinearLayerConfig) -> Shape:
    inputs, columns = c.partition_weight_shape
    return Shape(columns, inputs, c.group_size, c.act_type == torch.float16)


def _tensors(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights, scales and zero points as Humming keeps them."""
    weight, scales, zeros = layer.weight, layer.weight_scale, layer.zero_point
    assert isinstance(weight, torch.Tensor) and isinstance(scales, torch.Tensor) and isinstance(zeros, torch.Tensor)
    return weight, scales, zeros


def _w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    lanes_bias: torch.Tensor | None,
    locks: torch.Tensor,
    key: str,
    columns: int,
) -> torch.Tensor:
    kernels = _kernels[key]
    assert kernels is not None
    x = x.contiguous()
    out = torch.empty((x.shape[0], columns), device=x.device, dtype=x.dtype)
    if 0 < x.shape[0] <= kernels.product.max_rows:
        kernels.product(x, weight, scales, zeros, bias, out)
    elif x.shape[0]:
        kernels.many(x, (weight, scales, zeros), lanes_bias, locks, out)
    return out


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    lanes_bias: torch.Tensor | None,
    locks: torch.Tensor,
    key: str,
    columns: int,
) -> torch.Tensor:
    return torch.empty((x.shape[0], columns), device=x.device, dtype=x.dtype)


_library.impl("w4a16", _w4a16, "CUDA")
torch.library.register_fake("qvl::w4a16", _fake, lib=_library)
