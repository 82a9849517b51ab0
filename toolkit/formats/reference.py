"""A checkpoint as transformers runs it, in whatever format its weights are: 4-bit ones as the weights they stand for.

transformers reads AWQ through packages that are gone and compressed-tensors through another's; this needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from toolkit.compat import patch_torchvision
from toolkit.formats.linears import read_tensor

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["load_reference"]


def load_reference(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Return transformers' model of a checkpoint, in evaluation, with all weights in ``dtype``.

    Weights are dequantized in ``dtype``. It takes the memory of the 16 or 32 bit model.

    Returns the family's class, such as `transformers.Qwen2VLForConditionalGeneration`.
    Raises CheckpointError for tensors that can't be read.
    """
    patch_torchvision()
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    for holder in (config, config.text_config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    weights = {}
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        if not checkpoint.is_packed(module):
            weights[name] = read_tensor(checkpoint, name, dtype)
        elif checkpoint.quantization is not None and part == checkpoint.quantization.layout.qweight:
            weights[f"{module}.weight"] = read_tensor(checkpoint, f"{module}.weight", dtype)
        elif part == "bias":
            weights[name] = read_tensor(checkpoint, name, dtype)
    made = getattr(transformers, checkpoint.family.architecture)
    return made.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).to(device).eval()
