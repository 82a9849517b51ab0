"""Zeros beside the MLP's weights, so that more GPUs can share them: nothing that the model computes changes.

A row-parallel layer is split along its inputs, and no group may straddle GPUs, so group_size x GPUs must divide the
intermediate size. New outputs of gate_proj and up_proj are all zero, hence silu(0) x 0 = 0 goes into the new inputs of
down_proj, whose weights are zero as well. A packed zero is value 0, zero point 0 and scale 1: exact in every kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.engines import obstacle, padding
from toolkit.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.formats.packing import QuantizedLinear

__all__ = ["WIDENED", "check_padding", "pad_quantized", "pad_tensor", "padded_shape", "set_intermediate_size"]

#: Which side of an MLP's linear the intermediate size is: 0, its outputs, or 1, its inputs.
WIDENED = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def check_padding(checkpoint: Checkpoint, size: int) -> int:
    """Return the intermediate size that lets ``size`` GPUs share the weights, more than the checkpoint's own.

    Raises FormatError where nothing needs padding, padding does not help, or the MLP has tensors that are unknown.
    """
    if size < 2:
        raise FormatError(f"--pad-tp {size}: give the number of GPUs that are to share the weights, 2, 4 or 8.")
    info = checkpoint.quantization
    if info is not None and info.group_size == -1:
        raise FormatError(
            f"{checkpoint.path} has one scale for all inputs of a row, which GPUs can't share however wide the row is. "
            "Quantize it again with --group-size 128."
        )
    inner, padded = int(checkpoint.text_config["intermediate_size"]), padding(checkpoint, size)
    if padded is None:
        wide = f"{checkpoint.path} can't be split over {size} GPUs, however wide its MLP is"
        raise FormatError(f"{wide}: {_what_stays(checkpoint, size)}. {_what_works(checkpoint)}")
    if padded == inner:
        raise FormatError(f"{checkpoint.path}: {size} GPUs can share the weights as they are, there is nothing to pad.")
    for name in checkpoint.tensors:
        part = _part(checkpoint, name)
        if part is not None and part[0] not in WIDENED:
            raise FormatError(
                f"{checkpoint.path}: {name} is no part of a {checkpoint.family.title}'s MLP: how to pad it is unknown."
            )
    return padded


def _what_stays(checkpoint: Checkpoint, size: int) -> str:
    """Return the obstacle that padding does not remove."""
    from dataclasses import replace

    unit = 128 * size * (checkpoint.quantization.group_size if checkpoint.quantization else 1)
    wide = replace(checkpoint, text_config={**checkpoint.text_config, "intermediate_size": unit})
    return obstacle(wide, size) or "no reason found"


def _what_works(checkpoint: Checkpoint) -> str:
    works = [size for size in (2, 4, 8) if padding(checkpoint, size) is not None]
    return f"--pad-tp {works[-1]} works." if works else "Pipeline parallel (`qvl serve --pp`) splits layers instead."


def _part(checkpoint: Checkpoint, name: str) -> tuple[str, str] | None:
    """Split a tensor's name into its MLP linear and the rest ("gate_proj", "qweight"); None outside the MLPs."""
    if not name.startswith(checkpoint.layers_prefix):
        return None
    _, _, rest = name.removeprefix(checkpoint.layers_prefix).partition(".")
    if not rest.startswith("mlp."):
        return None
    linear, _, kind = rest.removeprefix("mlp.").partition(".")
    return linear, kind


def padded_shape(checkpoint: Checkpoint, name: str, inner: int) -> tuple[int, ...]:
    """Return the shape of a tensor that is not packed when the intermediate size becomes ``inner``."""
    shape, part = checkpoint.tensors[name].shape, _part(checkpoint, name)
    if part is None or (part[1] == "bias" and WIDENED[part[0]] == 1):
        return shape
    side = WIDENED[part[0]]
    return (*shape[:side], inner, *shape[side + 1 :])


def pad_tensor(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``tensor`` in the upper left corner of zeros of ``shape``; itself where the shapes are equal."""
    if tuple(tensor.shape) == shape:
        return tensor
    wide = tensor.new_zeros(shape)
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


def pad_quantized(layer: QuantizedLinear, outputs: int, inputs: int) -> QuantizedLinear:
    """Return a layer [N, K] with zero weights up to [outputs, inputs], whole groups of them; all else is unchanged."""
    from toolkit.formats.packing import QuantizedLinear

    group = layer.values.shape[1] // layer.scales.shape[1]
    groups = inputs // group
    scales = layer.scales.new_ones((outputs, groups))
    scales[: layer.scales.shape[0], : layer.scales.shape[1]] = layer.scales
    return QuantizedLinear(
        pad_tensor(layer.values, (outputs, inputs)), pad_tensor(layer.zeros, (outputs, groups)), scales
    )


def set_intermediate_size(config: dict[str, Any], inner: int) -> None:
    """Write the new size where the config, flat or nested, says it."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and "intermediate_size" in holder:
            holder["intermediate_size"] = inner
