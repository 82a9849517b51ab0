"""What a whole Qwen2-VL consists of: the tensors its config calls for, and which part of the model each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.checkpoint.checkpoint import LINEARS, Checkpoint

__all__ = ["PARTS", "Expected", "expected_tensors", "part_of"]

PARTS = ("vision", "embeddings", "layers", "norm", "lm_head", "other")
_BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Expected:
    """A tensor the config calls for, by its full name in this checkpoint, in 16 bits."""

    name: str
    shape: tuple[int, ...]
    #: Whether it is the weight of one of `LINEARS`, which may be packed instead.
    linear: bool = False


def part_of(checkpoint: Checkpoint, name: str) -> str:
    """Return which of `PARTS` the tensor ``name`` belongs to."""
    if name.startswith(checkpoint.visual_prefix):
        return "vision"
    if name.startswith(f"{checkpoint.language_prefix}embed_tokens."):
        return "embeddings"
    if name.startswith("lm_head."):
        return "lm_head"
    if name.startswith(checkpoint.layers_prefix):
        return "layers"
    return "norm" if name.startswith(f"{checkpoint.language_prefix}norm.") else "other"


def expected_tensors(checkpoint: Checkpoint) -> list[Expected]:
    """Return every tensor the config calls for, with its 16-bit shape, as transformers' Qwen2-VL defines them.

    Defaults of the vision config are those of transformers' ``Qwen2VLVisionConfig``.
    """
    return [*_language(checkpoint), *_vision(checkpoint)]


def _language(checkpoint: Checkpoint) -> list[Expected]:
    text, language = checkpoint.text_config, checkpoint.language_prefix
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    found = [Expected(f"{language}embed_tokens.weight", (vocab, hidden)), Expected(f"{language}norm.weight", (hidden,))]
    if not checkpoint.tied_lm_head:
        found.append(Expected("lm_head.weight", (vocab, hidden), linear=True))
    shapes = checkpoint.linear_shapes()
    for index in range(checkpoint.num_layers):
        layer = checkpoint.layer_prefix(index)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append(Expected(f"{layer}{norm}.weight", (hidden,)))
        for linear in LINEARS:
            inputs, outputs = shapes[linear]
            found.append(Expected(f"{layer}{linear}.weight", (outputs, inputs), linear=True))
            if linear in _BIASED:
                found.append(Expected(f"{layer}{linear}.bias", (outputs,)))
    return found


def _vision(checkpoint: Checkpoint) -> list[Expected]:
    vision = checkpoint.vision_config

    def setting(default: int, *names: str) -> int:
        return next((vision[name] for name in names if isinstance(vision.get(name), int)), default)

    width, depth = setting(1280, "embed_dim"), setting(32, "depth")
    inner, merged = width * setting(4, "mlp_ratio"), width * setting(2, "spatial_merge_size") ** 2
    patch, out = setting(14, "patch_size"), setting(int(checkpoint.text_config["hidden_size"]), "hidden_size")
    channels, frames = setting(3, "in_channels", "in_chans"), setting(2, "temporal_patch_size")
    block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    block |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    modules: dict[str, tuple[int, ...]] = {}
    for index in range(depth):
        modules |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
        modules |= {f"blocks.{index}.{norm}": (width,) for norm in ("norm1", "norm2")}
    modules |= {"merger.ln_q": (width,), "merger.mlp.0": (merged, merged), "merger.mlp.2": (out, merged)}
    prefix = checkpoint.visual_prefix
    found = [Expected(f"{prefix}patch_embed.proj.weight", (width, channels, frames, patch, patch))]
    for name, shape in modules.items():
        found += [Expected(f"{prefix}{name}.weight", shape), Expected(f"{prefix}{name}.bias", shape[:1])]
    return found
