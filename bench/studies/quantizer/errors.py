"""What quantization does to each decoder layer alone: the error of its output on tokens that calibration never saw."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.formats.linears import read_tensor
from toolkit.formats.packing import dequantize
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.grid import round_to_grid

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration

    from toolkit.calibration.inputs import PreparedSample

__all__ = ["Call", "awq_layer", "decoder_layers", "layer_errors", "load_model", "relative_error", "rounded_layer"]

#: What a layer was given (input [1, T, D] and keyword arguments) and what it made of it ([1, T, D]).
Call = tuple[torch.Tensor, dict[str, Any], torch.Tensor]


def load_model(path: Path, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """Return an unquantized checkpoint in float32, as transformers runs it."""
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, device_map={"": str(device)})
    return model.requires_grad_(False).eval()


def decoder_layers(model: Qwen2VLForConditionalGeneration) -> nn.ModuleList:
    """Return the decoder layers of a Qwen2-VL of transformers 5."""
    layers: nn.ModuleList = model.model.language_model.layers
    return layers


def awq_layer(layer: nn.Module, checkpoint: Checkpoint, index: int) -> nn.Module:
    """Return a copy of a decoder layer with all its tensors from a checkpoint, weights dequantized to float32."""
    prefix = checkpoint.layer_prefix(index)
    new = copy.deepcopy(layer)
    for name, parameter in new.named_parameters():
        parameter.data = read_tensor(checkpoint, prefix + name, device=parameter.device)
    return new


def rounded_layer(layer: nn.Module, group_size: int) -> nn.Module:
    """Return a copy of a decoder layer with its linears rounded to nearest: 4 bits, no search."""
    new = copy.deepcopy(layer)
    for name in QWEN2_VL.linears:
        weight = new.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.data = dequantize(round_to_grid(weight.data, group_size), torch.float32)
    return new


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@torch.no_grad()
def relative_error(layer: nn.Module, calls: Sequence[Call]) -> float:
    """Return sum |y_q - y|^2 / sum |y - x|^2 over all tokens of ``calls``.

    y_q is what ``layer`` makes of x, the true input, and y what the true layer made of it: the error is measured
    against what the layer adds to its input.
    """
    wrong = whole = 0.0
    for x, kwargs, y in calls:
        wrong += float((_first(layer(x, **kwargs)) - y).double().pow(2).sum())
        whole += float((y - x).double().pow(2).sum())
    return wrong / whole


@torch.no_grad()
def layer_calls(model: Qwen2VLForConditionalGeneration, chats: Sequence[PreparedSample]) -> list[list[Call]]:
    """Run chats, one at a time, and return what every decoder layer was given and made of it."""
    layers = decoder_layers(model)
    calls: list[list[Call]] = [[] for _ in layers]

    def hook(index: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kwargs = dict(kwargs)
            x = args[0] if args else kwargs.pop("hidden_states")
            calls[index].append((x, kwargs, _first(output)))

        return record

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for chat in chats:
            model.model(**{name: value.to(model.device) for name, value in chat.inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def layer_errors(
    model: Qwen2VLForConditionalGeneration, candidates: Mapping[str, Checkpoint | int], chats: Sequence[PreparedSample]
) -> dict[str, list[float]]:
    """Return :func:`relative_error` of every decoder layer, by candidate.

    Args:
        model: the unquantized model, from :func:`load_model`.
        candidates: AWQ checkpoints of it; an integer stands for rounding to nearest with that group size.
        chats: model inputs that calibration did not see.
    """
    errors: dict[str, list[float]] = {name: [] for name in candidates}
    for index, (layer, calls) in enumerate(zip(decoder_layers(model), layer_calls(model, chats), strict=True)):
        for name, candidate in candidates.items():
            new = rounded_layer(layer, candidate) if isinstance(candidate, int) else awq_layer(layer, candidate, index)
            errors[name].append(relative_error(new, calls))
    return errors
