"""Qwen2.5-VL: 3B, 7B, 32B and 72B, https://arxiv.org/abs/2502.13923.

Facts from transformers' ``modeling_qwen2_5_vl.py`` and ``configuration_qwen2_5_vl.py``, vLLM's ``qwen2_5_vl.py``, and
the published checkpoints. Its decoder layers, tensor names and images are Qwen2-VL's. Its vision tower has RMS norms, a
gated MLP and attention within windows but for four blocks; videos have their seconds in their positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from toolkit.models.family import Family, Names, Projection, Size, Tower, Unit, Vision, setting
from toolkit.models.qwen2_vl import (
    CLIP,
    DECODER_NORMS,
    DECODER_UNITS,
    IMAGE_PROCESSORS,
    SETTINGS,
    VISION_TOKENS,
    VLLM_RENAMES,
    qwen2_sizes,
)

__all__ = ["QWEN2_5_VL"]


def _read_vision(config: Mapping[str, Any], hidden: int) -> Vision:
    """Read a vision config; the defaults are those of transformers' ``Qwen2_5_VLVisionConfig``."""

    return Vision(
        depth=setting(config, 32, "depth"),
        width=setting(config, 3584, "hidden_size"),
        inner=setting(config, 3420, "intermediate_size"),
        heads=setting(config, 16, "num_heads"),
        patch=setting(config, 14, "patch_size"),
        merge=setting(config, 2, "spatial_merge_size"),
        frames=setting(config, 2, "temporal_patch_size"),
        channels=setting(config, 3, "in_channels", "in_chans"),
        out=setting(config, 3584, "out_hidden_size"),
    )


#: RMS norms, linears with biases, a gated MLP. v's rows are the last third of qkv's.
_TOWER = Tower(
    units=(
        Unit("attn.qkv", (Projection("attn.qkv", "width", "qkv", bias=True),), before="norm1"),
        Unit(
            "attn.proj", (Projection("attn.proj", "width", "width", bias=True),), before="attn.qkv", row_parallel=True
        ),
        Unit(
            "mlp.gate_up_proj",
            (
                Projection("mlp.gate_proj", "width", "inner", bias=True),
                Projection("mlp.up_proj", "width", "inner", bias=True),
            ),
            before="norm2",
        ),
        Unit(
            "mlp.down_proj",
            (Projection("mlp.down_proj", "inner", "width", bias=True),),
            before="mlp.up_proj",
            row_parallel=True,
        ),
    ),
    norms=MappingProxyType({"norm1": "width", "norm2": "width"}),
    merger=(Projection("mlp.0", "merged", "merged", bias=True), Projection("mlp.2", "merged", "out", bias=True)),
    merger_norm=("ln_q", "width"),
    norm_bias=False,
)

QWEN2_5_VL = Family(
    title="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    model_type="qwen2_5_vl",
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
    decoder_layer="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLDecoderLayer",
    sizes=MappingProxyType(
        {
            "3b": Size(
                qwen2_sizes(2048, 11008, 36, 16, 2) | {"vocab_size": 151936, "tie_word_embeddings": True},
                {"intermediate_size": 3420},
            ),
            "7b": Size(qwen2_sizes(3584, 18944, 28, 28, 4), {"intermediate_size": 3420}),
            "32b": Size(qwen2_sizes(5120, 27648, 64, 40, 8), {"intermediate_size": 3456}),
            "72b": Size(qwen2_sizes(8192, 29568, 80, 64, 8), {"intermediate_size": 3456}),
        }
    ),
    settings=MappingProxyType(
        {
            **SETTINGS,
            "max_position_embeddings": 128000,
            "sliding_window": 32768,
            "use_sliding_window": False,
        }
    ),
    vision_settings=MappingProxyType(
        {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "num_heads": 16,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        }
    ),
    nested=False,
    vision_out="out_hidden_size",
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
                "processor_class": "Qwen2_5_VLProcessor",
            }
        }
    ),
    eagle=True,
    autoawq=True,
)
