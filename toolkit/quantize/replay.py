"""A finished decoder layer as it was written, read back to run: what a thorough search goes on from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.formats.packing import PackedLinear, dequantize, unpack_as

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe

__all__ = ["written_layer"]


@torch.no_grad()
def written_layer(layer: nn.Module, checkpoint: Checkpoint, recipe: Recipe, index: int, file: Path) -> nn.Module:
    """Return a copy of the source's layer with the weights that a file holds, to the bit those it was written from.

    Args:
        layer: the source's, on the device where the copy is wanted.
        checkpoint: the source.
        recipe: that the file was made by.
        index: the layer's.
        file: as :func:`toolkit.quantize.parts.write_layer` wrote it.
    """
    from safetensors import safe_open

    prefix, found, layout = checkpoint.layer_prefix(index), copy.deepcopy(layer), LAYOUTS[recipe.format]
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        for name, value in found.state_dict().items():
            module = prefix + name.removesuffix(".weight")
            if f"{module}.{layout.qweight}" not in names:
                value.copy_(tensors.get_tensor(prefix + name))
                continue
            parts = (tensors.get_tensor(f"{module}.{part}").to(value.device) for part in layout.packed)
            unpacked = unpack_as(recipe.format, PackedLinear(*parts), recipe.group_size)
            value.copy_(dequantize(unpacked, torch.float32))
    return found
