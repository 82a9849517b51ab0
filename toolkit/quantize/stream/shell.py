"""What comes before the decoder layers: vision tower, embeddings, positions. Samples become hidden states there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.compat import patch_torchvision
from toolkit.quantize.stream.states import States

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Patches", "bare_model", "embed", "load_shell"]


class _Rows(nn.Module):
    """An embedding whose table stays in the file: only the rows that are asked for are read."""

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self._table = table
        self._device = device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [..., D] float32 on the device."""
        return self._table[ids.cpu()].to(self._device, torch.float32)


class Patches(nn.Module):
    """The patch embedding as the matrix product that it is: its convolution's kernel covers a patch exactly.

    PyTorch's float32 convolutions in three dimensions are slow, on GPUs by far.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Args: the convolution's weight [D, channels, frames, height, width], and its bias [D]."""
        super().__init__()
        self._weight = weight.flatten(1)
        self._bias = bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[T, channels x frames x height x width] -> [T, D]."""
        return nn.functional.linear(patches.to(self._weight.dtype), self._weight, self._bias)


class _Reached(Exception):
    """The first decoder layer was reached; carries what it was called with."""

    def __init__(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.hidden = hidden
        self.rope = rope


class _Stop(nn.Module):
    """Stands where the first decoder layer would."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Raise :class:`_Reached`."""
        raise _Reached(hidden_states, kwargs["position_embeddings"])


def bare_model(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Return the model without weights and with one decoder layer, and the full text config."""
    patch_torchvision()
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(checkpoint.path)
    text_config = AutoConfig.from_pretrained(checkpoint.path).text_config
    config._attn_implementation = "sdpa"
    config.text_config.num_hidden_layers = 1
    if hasattr(text_config, "layer_types"):
        config.text_config.layer_types = list(text_config.layer_types)[:1]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config)
    return model.eval(), text_config


def load_shell(
    checkpoint: Checkpoint, device: torch.device, tower: Mapping[str, torch.Tensor] | None = None
) -> tuple[Any, Any]:
    """Load what comes before the decoder layers: the vision tower, float32, on the device; embeddings stay in the file.

    Args:
        checkpoint: the source.
        device: where the tower goes.
        tower: tensors of the tower that take the place of the source's, by their names behind `Names.visual`.

    Returns:
        the model (``Qwen2VLForConditionalGeneration`` without layers and head) and the full text config.
    """
    model, text_config = bare_model(checkpoint)
    inner = model.model
    other = tower or {}

    def weight(name: str) -> torch.Tensor:
        found = other[name] if name in other else checkpoint.get(checkpoint.visual_prefix + name)
        return found.to(device, torch.float32)

    inner.visual.load_state_dict({name: weight(name) for name in inner.visual.state_dict()}, assign=True)
    inner.visual.to(device)
    inner.visual.patch_embed = Patches(inner.visual.patch_embed.proj.weight, inner.visual.patch_embed.proj.bias)
    inner.language_model.rotary_emb.to(device)
    inner.language_model.layers = nn.ModuleList([_Stop()])
    inner.language_model.embed_tokens = _Rows(
        checkpoint.get(f"{checkpoint.language_prefix}embed_tokens.weight"), device
    )
    model.requires_grad_(False)
    return model.eval(), text_config


@torch.no_grad()
def embed(
    model: Any,
    samples: Sequence[PreparedSample],
    device: torch.device,
    store: torch.device,
    on_sample: Callable[[int], None] | None = None,
) -> list[States]:
    """Run every sample, alone, up to the first decoder layer.

    Args:
        model: from :func:`load_shell`.
        samples: model inputs.
        device: where the model is.
        store: where hidden states are to wait.
        on_sample: called with the number of samples done.
    """
    found: list[States] = []
    levels = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    given: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, settings: given.update(settings), with_kwargs=True
    )
    for sample in samples:
        inputs = {name: value.to(device) for name, value in sample.inputs.items()}
        ids = inputs["input_ids"][0]
        vision = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
        try:
            model.model(**inputs, use_cache=False)
        except _Reached as reached:
            none = [reached.hidden.new_zeros(0, reached.hidden.shape[-1])] * levels
            added = tuple(level.to(store) for level in given.get("deepstack_visual_embeds") or none)
            found.append(States(reached.hidden.to(store), reached.rope, [len(ids)], vision, added))
        else:
            raise RuntimeError("the model never reached its decoder layers")
        if on_sample is not None:
            on_sample(len(found))
    hook.remove()
    return found
