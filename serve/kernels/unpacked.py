"""4-bit weights on CPUs for which vLLM has no 4-bit kernel: unpacked to 16 bits when they are loaded.

vLLM 0.32's CPU build has its kernel for 4-bit weights (`cpu_gemm_wna16`) for AVX-512 alone, and chooses it without: the
server then dies at its first product. This one takes the memory of a 16-bit model and answers as the 4-bit one.

Imported in vLLM's processes alone, by the plugin. Written against vLLM 0.32.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.scalar_type import scalar_types

from serve.kernels.words import unpack

__all__ = ["UnpackedLinearKernel"]


class UnpackedLinearKernel(MPLinearKernel):
    """Products with 4-bit weights as products with the 16-bit weights that they stand for."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: any CPU."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Say whether the layer holds 4-bit weights with zero points, or why this is not for it."""
        if c.weight_type != scalar_types.uint4 or not c.zero_points:
            return False, "only 4-bit weights with zero points are unpacked"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put the weights [N, K] that the layer's words stand for in their place."""
        words, scales, zeros = self._get_weight_params(layer)
        assert zeros is not None
        if getattr(words, "input_dim", 0) == 1:  # compressed-tensors: [N, K / 8], and scales [N, groups]
            words.data, scales.data = words.data.t(), scales.data.t()
        weight = unpack(words.data, scales.data, zeros.data)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            delattr(layer, str(name))
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [..., K] times the weights, plus the bias [N]."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return torch.nn.functional.linear(x, weight, bias)
