"""Qwen2-VL: 2B, 7B and 72B, https://arxiv.org/abs/2409.12191.

Facts from transformers' ``modeling_qwen2_vl.py`` and ``configuration_qwen2_vl.py``, vLLM's ``qwen2_vl.py``, and the
published checkpoints. Heads have the hidden size over their number, q, k and v have biases, and nothing else has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from toolkit.models.family import Family, Names, Projection, Size, Tower, Unit, Vision, setting

__all__ = [
    "CLIP",
    "DECODER_NORMS",
    "DECODER_UNITS",
    "IMAGE_PROCESSORS",
    "QWEN2_VL",
    "SETTINGS",
    "VISION_TOKENS",
    "VLLM_RENAMES",
    "qwen2_sizes",
]


def _read_vision(config: Mapping[str, Any], hidden: int) -> Vision:
    """Read a vision config; the defaults are those of transformers' ``Qwen2VLVisionConfig``.

    ``hidden_size`` is the width that goes to the language model, and ``embed_dim`` the tower's own.
    """

    width = setting(config, 1280, "embed_dim")
    return Vision(
        depth=setting(config, 32, "depth"),
        width=width,
        inner=width * setting(config, 4, "mlp_ratio"),
        heads=setting(config, 16, "num_heads"),
        patch=setting(config, 14, "patch_size"),
        merge=setting(config, 2, "spatial_merge_size"),
        frames=setting(config, 2, "temporal_patch_size"),
        channels=setting(config, 3, "in_channels", "in_chans"),
        out=setting(config, hidden, "hidden_size"),
    )


#: vllm/model_executor/models/qwen2_vl.py and qwen2_5_vl.py: hf_to_vllm_mapper
VLLM_RENAMES = MappingProxyType(
    {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    }
)
#: Tokens of Qwen2's vocabulary that stand for images and videos.
VISION_TOKENS = MappingProxyType(
    {
        "image_token_id": ("<|image_pad|>", 151655),
        "video_token_id": ("<|video_pad|>", 151656),
        "vision_start_token_id": ("<|vision_start|>", 151652),
    }
)
IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
#: Mean and spread of pixels, by OpenAI's CLIP.
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
#: A decoder layer of Qwen2's.
DECODER_UNITS = (
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
)
DECODER_NORMS = MappingProxyType({"input_layernorm": "hidden", "post_attention_layernorm": "hidden"})

#: Layer norms, linears with biases, GELU between them. v's rows are the last third of qkv's.
_TOWER = Tower(
    units=(
        Unit("attn.qkv", (Projection("attn.qkv", "width", "qkv", bias=True),), before="norm1"),
        Unit(
            "attn.proj", (Projection("attn.proj", "width", "width", bias=True),), before="attn.qkv", row_parallel=True
        ),
        Unit("mlp.fc1", (Projection("mlp.fc1", "width", "inner", bias=True),), before="norm2"),
        Unit("mlp.fc2", (Projection("mlp.fc2", "inner", "width", bias=True),), before="", row_parallel=True),
    ),
    norms=MappingProxyType({"norm1": "width", "norm2": "width"}),
    merger=(Projection("mlp.0", "merged", "merged", bias=True), Projection("mlp.2", "merged", "out", bias=True)),
    merger_norm=("ln_q", "width"),
    norm_bias=True,
)

#: What Qwen2's config.json files have in common.
SETTINGS = MappingProxyType(
    {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
)


def qwen2_sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return the sizes of a language model; vocabulary and head of all but the smallest."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }


QWEN2_VL = Family(
    title="Qwen2-VL",
    architecture="Qwen2VLForConditionalGeneration",
    model_type="qwen2_vl",
    units=DECODER_UNITS,
    norms=DECODER_NORMS,
    hub=Names("model.", "visual."),
    transformers=Names("model.language_model.", "model.visual."),
    vllm=Names("language_model.model.", "visual.", "language_model.lm_head"),
    vllm_renames=VLLM_RENAMES,
    read_vision=_read_vision,
    tower=_TOWER,
    image_processors=IMAGE_PROCESSORS,
    vision_tokens=VISION_TOKENS,
    min_pixels=4 * 28 * 28,
    max_pixels=16384 * 28 * 28,
    max_positions=32768,
    decoder_layer="transformers.models.qwen2_vl.modeling_qwen2_vl:Qwen2VLDecoderLayer",
    sizes=MappingProxyType(
        {
            "2b": Size(qwen2_sizes(1536, 8960, 28, 12, 2) | {"vocab_size": 151936, "tie_word_embeddings": True}),
            "7b": Size(qwen2_sizes(3584, 18944, 28, 28, 4)),
            "72b": Size(qwen2_sizes(8192, 29568, 80, 64, 8)),
        }
    ),
    settings=MappingProxyType(
        {
            **SETTINGS,
            "max_position_embeddings": 32768,
            "sliding_window": 32768,
            "use_sliding_window": False,
        }
    ),
    vision_settings=MappingProxyType(
        {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        }
    ),
    nested=False,
    vision_out="hidden_size",
    processor_files=MappingProxyType(
        {
            "preprocessor_config.json": {
                "min_pixels": 4 * 28 * 28,
                "max_pixels": 16384 * 28 * 28,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                **CLIP,
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor",
            }
        }
    ),
    eagle=False,
    autoawq=True,
)
