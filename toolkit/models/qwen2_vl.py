"""Qwen2-VL: 2B, 7B and 72B, https://arxiv.org/abs/2409.12191.

Facts from transformers' ``modeling_qwen2_vl.py`` and ``configuration_qwen2_vl.py``, vLLM's ``qwen2_vl.py``, and the
published checkpoints. Heads have the hidden size over their number, q, k and v have biases, and nothing else has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from toolkit.models.family import Family, Names, Projection, Shapes, Unit, Vision

__all__ = ["QWEN2_VL"]


def _read_vision(config: Mapping[str, Any], hidden: int) -> Vision:
    """Read a vision config; the defaults are those of transformers' ``Qwen2VLVisionConfig``.

    ``hidden_size`` is the width that goes to the language model, and ``embed_dim`` the tower's own.
    """

    def setting(default: int, *names: str) -> int:
        return next((config[name] for name in names if isinstance(config.get(name), int)), default)

    width = setting(1280, "embed_dim")
    return Vision(
        depth=setting(32, "depth"),
        width=width,
        inner=width * setting(4, "mlp_ratio"),
        heads=setting(16, "num_heads"),
        patch=setting(14, "patch_size"),
        merge=setting(2, "spatial_merge_size"),
        frames=setting(2, "temporal_patch_size"),
        channels=setting(3, "in_channels", "in_chans"),
        out=setting(hidden, "hidden_size"),
    )


def _vision_tensors(vision: Vision) -> Shapes:
    """Layer norms and linears with biases, and a patch embedding without."""
    width, merged = vision.width, vision.width * vision.merge**2
    block: Shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    block |= {"mlp.fc1": (vision.inner, width), "mlp.fc2": (width, vision.inner)}
    block |= {"norm1": (width,), "norm2": (width,)}
    modules = {f"blocks.{index}.{name}": shape for index in range(vision.depth) for name, shape in block.items()}
    modules |= {"merger.ln_q": (width,), "merger.mlp.0": (merged, merged), "merger.mlp.2": (vision.out, merged)}
    found: Shapes = {"patch_embed.proj.weight": (width, vision.channels, vision.frames, vision.patch, vision.patch)}
    for name, shape in modules.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


QWEN2_VL = Family(
    title="Qwen2-VL",
    architecture="Qwen2VLForConditionalGeneration",
    model_type="qwen2_vl",
    units=(
        Unit(
            "self_attn.qkv_proj",
            (
                Projection("self_attn.q_proj", "hidden", "query", bias=True),
                Projection("self_attn.k_proj", "hidden", "value", bias=True),
                Projection("self_attn.v_proj", "hidden", "value", bias=True),
            ),
            before="input_layernorm",
        ),
        Unit(
            "self_attn.o_proj",
            (Projection("self_attn.o_proj", "query", "hidden"),),
            before="self_attn.v_proj",
            row_parallel=True,
        ),
        Unit(
            "mlp.gate_up_proj",
            (Projection("mlp.gate_proj", "hidden", "inner"), Projection("mlp.up_proj", "hidden", "inner")),
            before="post_attention_layernorm",
        ),
        Unit(
            "mlp.down_proj",
            (Projection("mlp.down_proj", "inner", "hidden"),),
            before="mlp.up_proj",
            row_parallel=True,
        ),
    ),
    norms=MappingProxyType({"input_layernorm": "hidden", "post_attention_layernorm": "hidden"}),
    hub=Names("model.", "visual."),
    transformers=Names("model.language_model.", "model.visual."),
    vllm=Names("language_model.model.", "visual.", "language_model.lm_head"),
    # vllm/model_executor/models/qwen2_vl.py: Qwen2VLForConditionalGeneration.hf_to_vllm_mapper
    vllm_renames=MappingProxyType(
        {
            "model.language_model.": "language_model.model.",
            "model.visual.": "visual.",
            "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model.",
        }
    ),
    read_vision=_read_vision,
    vision_tensors=_vision_tensors,
    image_processors=("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"),
    vision_tokens=MappingProxyType(
        {
            "image_token_id": ("<|image_pad|>", 151655),
            "video_token_id": ("<|video_pad|>", 151656),
            "vision_start_token_id": ("<|vision_start|>", 151652),
        }
    ),
    max_pixels=16384 * 28 * 28,
    max_positions=32768,
    decoder_layer="transformers.models.qwen2_vl.modeling_qwen2_vl:Qwen2VLDecoderLayer",
)
