"""Models of any family as transformers runs them in float32, packed weights read back to what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.compat import patch_torchvision
from toolkit.formats.packing import PackedLinear, dequantize, unpack_gemm
from toolkit.sources.adapter import transformers_name

#: Changes the scales [groups, N] of a packed linear, by its name.
Damage = Callable[[str, torch.Tensor], torch.Tensor]


def load(path: Path, damage: Damage | None = None) -> Any:
    """Return a checkpoint's model, 16-bit or AWQ in GEMM layout, in float32; ``damage`` spoils its scales."""
    patch_torchvision()
    from transformers import AutoConfig, AutoModelForImageTextToText

    checkpoint = Checkpoint.open(path)
    config: Any = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {}
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            qweight, qzeros, scales = (checkpoint.get(f"{module}.{each}") for each in ("qweight", "qzeros", "scales"))
            scales = damage(module, scales) if damage is not None else scales
            weight = dequantize(unpack_gemm(PackedLinear(qweight, qzeros, scales)), torch.float32)
            state[transformers_name(checkpoint, f"{module}.weight")] = weight
        elif part not in ("qzeros", "scales"):
            state[transformers_name(checkpoint, name)] = checkpoint.get(name).float()
    if checkpoint.tied_lm_head:
        state["lm_head.weight"] = state[f"{checkpoint.family.transformers.language}embed_tokens.weight"]
    model: Any = AutoModelForImageTextToText.from_config(config).float()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def divergence(true: Any, model: Any, samples: list[Any]) -> float:
    """Return the mean Kullback-Leibler divergence in nats of a model from the true one, over all tokens of samples."""
    total, tokens = 0.0, 0
    for sample in samples:
        p, q = (each(**sample.inputs).logits[0].log_softmax(-1) for each in (true, model))
        total += float((p.exp() * (p - q)).sum())
        tokens += sample.tokens
    return total / tokens
