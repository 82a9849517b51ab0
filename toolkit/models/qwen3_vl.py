"""Qwen3-VL, dense: 2B, 4B, 8B and 32B, https://arxiv.org/abs/2511.21631.

Facts from transformers' ``modeling_qwen3_vl.py`` and ``configuration_qwen3_vl.py``, vLLM's ``qwen3_vl.py``, and the
published checkpoints. Heads have a size of their own, q and k are normed head by head, no linear of a decoder layer has
a bias, and the three kinds of position alternate within a head. What some blocks of the vision tower see is merged too,
and added to the images' tokens behind the first decoder layers (DeepStack). Videos have their seconds in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from toolkit.models.family import Family, Names, Projection, Size, Tower, Unit, Vision, setting
from toolkit.models.qwen2_vl import DECODER_NORMS, DECODER_UNITS, IMAGE_PROCESSORS, VISION_TOKENS

__all__ = ["QWEN3_VL"]

_SIDE = 32  # pixels of a token's
_PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _read_vision(config: Mapping[str, Any], hidden: int) -> Vision:
    """Read a vision config; the defaults are those of transformers' ``Qwen3VLVisionConfig``."""
    return Vision(
        depth=setting(config, 27, "depth"),
        width=setting(config, 1152, "hidden_size"),
        inner=setting(config, 4304, "intermediate_size"),
        heads=setting(config, 16, "num_heads"),
        patch=setting(config, 16, "patch_size"),
        merge=setting(config, 2, "spatial_merge_size"),
        frames=setting(config, 2, "temporal_patch_size"),
        channels=setting(config, 3, "in_channels"),
        out=setting(config, 3584, "out_hidden_size"),
        positions=setting(config, 2304, "num_position_embeddings"),
        deepstack=tuple(config.get("deepstack_visual_indexes", (8, 16, 24))),
    )


def _sizes(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


#: The vision towers of the two smaller and the two larger sizes.
_SMALL = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_LARGE = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}

QWEN3_VL = Family(
    title="Qwen3-VL",
    architecture="Qwen3VLForConditionalGeneration",
    model_type="qwen3_vl",
    units=(
        Unit(
            "self_attn.qkv_proj",
            (
                Projection("self_attn.q_proj", "hidden", "query"),
                Projection("self_attn.k_proj", "hidden", "value"),
                Projection("self_attn.v_proj", "hidden", "value"),
            ),
            before="input_layernorm",
        ),
        *DECODER_UNITS[1:],
    ),
    norms=MappingProxyType({**DECODER_NORMS, "self_attn.q_norm": "head", "self_attn.k_norm": "head"}),
    head=128,
    hub=Names("model.language_model.", "model.visual."),
    transformers=Names("model.language_model.", "model.visual."),
    vllm=Names("language_model.model.", "visual.", "language_model.lm_head"),
    vllm_renames=MappingProxyType(
        {
            "model.visual.": "visual.",
            "lm_head.": "language_model.lm_head.",
            "model.language_model.": "language_model.model.",
        }
    ),
    read_vision=_read_vision,
    #: Layer norms, linears with biases, GELU between them. v's rows are the last third of qkv's.
    tower=Tower(
        units=(
            Unit("attn.qkv", (Projection("attn.qkv", "width", "qkv", bias=True),), before="norm1"),
            Unit(
                "attn.proj",
                (Projection("attn.proj", "width", "width", bias=True),),
                before="attn.qkv",
                row_parallel=True,
            ),
            Unit("mlp.linear_fc1", (Projection("mlp.linear_fc1", "width", "inner", bias=True),), before="norm2"),
            Unit(
                "mlp.linear_fc2",
                (Projection("mlp.linear_fc2", "inner", "width", bias=True),),
                before="",
                row_parallel=True,
            ),
        ),
        norms=MappingProxyType({"norm1": "width", "norm2": "width"}),
        merger=(
            Projection("linear_fc1", "merged", "merged", bias=True),
            Projection("linear_fc2", "merged", "out", bias=True),
        ),
        merger_norm=("norm", "width"),
        norm_bias=True,
        patch_bias=True,
        deepstack="deepstack_merger_list.",
    ),
    image_processors=IMAGE_PROCESSORS,
    vision_tokens=VISION_TOKENS,
    min_pixels=64 * _SIDE**2,
    max_pixels=16384 * _SIDE**2,
    max_positions=128000,
    decoder_layer="transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLTextDecoderLayer",
    sizes=MappingProxyType(
        {
            "2b": Size(_sizes(2048, 6144, 28, 16, tied=True), _SMALL),
            "4b": Size(_sizes(2560, 9728, 36, 32, tied=True), _SMALL),
            "8b": Size(_sizes(4096, 12288, 36, 32, tied=False), _LARGE),
            "32b": Size(_sizes(5120, 25600, 64, 64, tied=False), _LARGE),
        }
    ),
    settings=MappingProxyType(
        {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        }
    ),
    vision_settings=MappingProxyType(
        {
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
    ),
    nested=True,
    vision_out="out_hidden_size",
    processor_files=MappingProxyType(
        {
            "preprocessor_config.json": {
                "size": {"shortest_edge": 64 * _SIDE**2, "longest_edge": 16384 * _SIDE**2},
                "patch_size": 16,
                "temporal_patch_size": 2,
                "merge_size": 2,
                **_PIXELS,
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "processor_class": "Qwen3VLProcessor",
            },
            "video_preprocessor_config.json": {
                "size": {"shortest_edge": 4 * _SIDE**2, "longest_edge": 24576 * _SIDE**2},
                "patch_size": 16,
                "temporal_patch_size": 2,
                "merge_size": 2,
                **_PIXELS,
                "video_processor_type": "Qwen3VLVideoProcessor",
                "processor_class": "Qwen3VLProcessor",
            },
        }
    ),
    eagle=True,
    autoawq=False,
)
