"""The quantized decoder layers, all on the device at once: codes, what is in 16 bits, and what of that learns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.formats.packing import PackedLinear, unpack_as
from toolkit.quantize.distillation.linear import Learned, LearningLinear
from toolkit.quantize.search.strategy import linear
from toolkit.quantize.stream.states import Batch, States

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe

__all__ = ["Student", "learning_layer"]


class _LearningNorm(nn.Module):
    """Takes the place of a norm, and gives its weight to it."""

    def __init__(self, norm: nn.Module, weight: Tensor) -> None:
        """Args: transformers' own module, and its weight as the file holds it."""
        super().__init__()
        self.norm = norm
        del norm.weight
        self.weight = Learned(weight)

    def forward(self, hidden: Tensor) -> Any:
        """[..., D] -> [..., D]."""
        object.__setattr__(self.norm, "weight", self.weight())
        return self.norm(hidden)


@torch.no_grad()
def learning_layer(
    layer: nn.Module, checkpoint: Checkpoint, recipe: Recipe, index: int, file: Path, dtype: torch.dtype
) -> nn.Module:
    """Return a layer whose packed linears and norms can learn, as a file holds it.

    Args:
        layer: the source's, on the device; its modules are taken over.
        checkpoint: the source.
        recipe: that the file was made by. index: the layer's. file: as :func:`toolkit.quantize.parts.write_layer`
            wrote it.
        dtype: of products.
    """
    from safetensors import safe_open

    prefix, layout = checkpoint.layer_prefix(index), LAYOUTS[recipe.format]
    layer.requires_grad_(False)
    device = next(iter(layer.parameters())).device
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())

        def get(name: str) -> Tensor:
            found: Tensor = tensors.get_tensor(prefix + name).to(device)
            return found

        for name in checkpoint.family.linears:
            parent, _, own = name.rpartition(".")
            bias = get(f"{name}.bias") if f"{prefix}{name}.bias" in names else None
            if f"{prefix}{name}.{layout.qweight}" not in names:
                kept = linear(layer, name)
                kept.weight.data = get(f"{name}.weight").to(dtype)
                if bias is not None:
                    kept.bias.data = bias.to(dtype)
                continue
            packed = PackedLinear(*(get(f"{name}.{part}") for part in layout.packed))
            learning = LearningLinear(unpack_as(recipe.format, packed, recipe.group_size), bias, dtype)
            setattr(layer.get_submodule(parent), own, learning)
        for name in checkpoint.family.norms:
            parent, _, own = name.rpartition(".")
            learning_norm = _LearningNorm(layer.get_submodule(name), get(f"{name}.weight"))
            setattr(layer.get_submodule(parent), own, learning_norm)
    return layer


class Student:
    """The decoder layers in a row, and gradients through them: a layer's insides are computed again in the way back."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, *, narrow: bool) -> None:
        """Args: from :func:`learning_layer`; where they are; whether they run in bfloat16, as they will be served."""
        self.layers = layers
        self.device = device
        self.narrow = narrow

    def learned(self) -> list[dict[str, Learned]]:
        """Return what learns in each layer, by its name inside it; a linear's scales are ``.scales``."""
        return [
            {name: module for name, module in layer.named_modules() if isinstance(module, Learned)}
            for layer in self.layers
        ]

    @torch.no_grad()
    def forward(self, states: States, keep: list[Tensor] | None = None) -> Tensor:
        """Return what the last layer makes of joined samples, [T, D] float32.

        Args:
            states: before the first layer; they stay as they are.
            keep: takes what each layer is given, for :meth:`backward`.
        """
        states, whole = _moving(states, self.device)
        for layer in self.layers:
            if keep is not None:
                keep.append(states.hidden)
            with self._in_dtype():
                states.hidden = layer(**states.inputs(whole, self.device)).float()
            states.add()
        return states.hidden[0]

    def backward(self, states: States, kept: list[Tensor], gradient: Tensor) -> None:
        """Add to all gradients what the gradient by the last layer's output, [T, D], makes of them.

        Args:
            states: that were passed forward. kept: what each layer was given; empty afterwards.
        """
        states, whole = _moving(states, self.device)
        gradient = gradient.unsqueeze(0)
        for layer in reversed(self.layers):
            states.hidden = kept.pop().requires_grad_()
            with torch.enable_grad(), self._in_dtype():
                output = layer(**states.inputs(whole, self.device))
            torch.autograd.backward(output, gradient.to(output.dtype))
            assert states.hidden.grad is not None
            gradient = states.hidden.grad

    def _in_dtype(self) -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.narrow)


def _moving(states: States, device: torch.device) -> tuple[States, Batch]:
    """Return samples that can move on, and all of them as a micro-batch."""
    moving = copy.copy(states)
    moving.hidden = states.hidden.to(device)
    return moving, Batch(0, 0, sum(states.lengths), states.lengths)
