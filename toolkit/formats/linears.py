"""Linear layers of a checkpoint, quantized in whatever format or not at all, as the weights that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.errors import FormatError
from toolkit.formats.packing import PackedLinear, QuantizedLinear, dequantize, unpack_as

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["read_packed", "read_quantized", "read_tensor"]


def read_packed(checkpoint: Checkpoint, module: str) -> PackedLinear:
    """Read a packed module's tensors.

    Raises CheckpointError for one that is missing, FormatError where the shape that compressed-tensors says apart is
    not that of the words: then a row ends in padding, which AWQ's formats do not have.
    """
    info = checkpoint.quantization
    assert info is not None  # there is no packed module otherwise
    packed = PackedLinear(*(checkpoint.get(f"{module}.{part}") for part in info.layout.packed))
    if info.layout.shape is not None:
        said = checkpoint.get(f"{module}.{info.layout.shape}").tolist()
        found = [packed.qweight.shape[0], packed.qweight.shape[1] * 8]
        if said != found:
            raise FormatError(f"{checkpoint.path}: {module} packs {found[0]} x {found[1]} weights and says {said}.")
    return packed


def read_quantized(checkpoint: Checkpoint, module: str) -> QuantizedLinear:
    """Read a packed module, unpacked. Raises like `read_packed`."""
    info = checkpoint.quantization
    assert info is not None
    return unpack_as(info.format, read_packed(checkpoint, module), info.group_size)


def read_tensor(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Read a tensor by its name in 16 bits: "...q_proj.weight" is [N, K] also where the checkpoint packs it.

    Weights are dequantized in ``dtype`` on ``device``. Raises like `read_packed`.
    """
    module = name.removesuffix(".weight")
    if module == name or not checkpoint.is_packed(module):
        return checkpoint.get(name).to(device, dtype)
    layer = read_quantized(checkpoint, module)
    moved = QuantizedLinear(*(tensor.to(device) for tensor in (layer.values, layer.zeros, layer.scales)))
    return dequantize(moved, dtype)
