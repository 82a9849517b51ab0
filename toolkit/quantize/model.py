"""Qwen2-VL as AutoAWQ sees it, on transformers 5: where the layers are, how one is loaded, what is scaled together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.quantize._awq import Qwen2VLAWQForCausalLM

if TYPE_CHECKING:
    from toolkit.checkpoint import Checkpoint

__all__ = ["Qwen2VLAWQ", "StreamedLayers", "load_shell"]


class Qwen2VLAWQ(Qwen2VLAWQForCausalLM):  # type: ignore[misc]
    """AutoAWQ's adapter, with the places where transformers 5 keeps the language model."""

    @staticmethod
    def get_model_layers(model: Any) -> Any:
        """Return the decoder layers."""
        return model.model.language_model.layers

    @staticmethod
    def move_embed(model: Any, device: str) -> None:
        """Move all that comes before the first layer: embeddings, vision tower, rotary tables."""
        inner = model.model
        inner.visual = inner.visual.to(device)
        inner.language_model.embed_tokens = inner.language_model.embed_tokens.to(device)
        inner.language_model.rotary_emb = inner.language_model.rotary_emb.to(device)


class StreamedLayers:
    """The decoder layers of a checkpoint, each read from its safetensors when asked for and kept by nobody here."""

    def __init__(self, checkpoint: Checkpoint, config: Any, device: torch.device) -> None:
        """Args: the source, its transformers text config, and where layers go (as float32)."""
        self._checkpoint = checkpoint
        self._config = config
        self._device = device

    def __len__(self) -> int:
        return int(self._config.num_hidden_layers)

    def load(self, index: int) -> nn.Module:
        """Return decoder layer ``index`` in float32 on the device, in eval mode."""
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

        with torch.device("meta"):
            layer = Qwen2VLDecoderLayer(self._config, index)
        prefix = self._checkpoint.layer_prefix(index)
        state = {
            name: self._checkpoint.get(prefix + name).to(self._device, torch.float32) for name in layer.state_dict()
        }
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)
        module: nn.Module = layer.eval()
        return module


def load_shell(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, Any]:
    """Load all that comes before the second decoder layer, in float32, on the device.

    Returns:
        the model (``Qwen2VLForConditionalGeneration`` with one decoder layer) and the full text config.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(checkpoint.path)
    config._attn_implementation = "sdpa"
    full = copy.deepcopy(config.text_config)
    full._attn_implementation = "sdpa"
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = list(full.layer_types)[:1]
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every other layer's tensors as unexpected
    logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint.path, config=config, dtype=torch.float32, device_map={"": str(device)}
        )
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    model.requires_grad_(False)
    return model.eval(), full
