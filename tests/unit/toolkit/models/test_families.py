"""Which family a config is of; and a family that differs from Qwen2-VL where later ones do needs facts only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from toolkit.models.families import FAMILIES, family_of
from toolkit.models.family import Projection, Unit
from toolkit.models.qwen2_vl import QWEN2_VL


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "qwen2_vl"}, True),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, True),
        ({"architectures": "Qwen2VLForConditionalGeneration"}, True),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLModel"]}, False),
        ({"model_type": "qwen2_5_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, False),
        ({}, False),
    ],
)
def test_a_config_is_of_a_family(config: dict[str, Any], found: bool) -> None:
    assert family_of(config) is (QWEN2_VL if found else None)


def test_families_are_told_apart() -> None:
    assert len({family.architecture for family in FAMILIES}) == len(FAMILIES)
    assert len({family.model_type for family in FAMILIES}) == len(FAMILIES)


def test_a_family_with_head_size_and_head_norms_of_its_own() -> None:
    """Qwen3's attention: heads of a size that is set, norms on q and k, no biases."""
    qkv = Unit(
        "self_attn.qkv_proj",
        (
            Projection("self_attn.q_proj", "hidden", "query"),
            Projection("self_attn.k_proj", "hidden", "value"),
            Projection("self_attn.v_proj", "hidden", "value"),
        ),
        before="input_layernorm",
    )
    norms = {**QWEN2_VL.norms, "self_attn.q_norm": "head", "self_attn.k_norm": "head"}
    family = replace(QWEN2_VL, units=(qkv, *QWEN2_VL.units[1:]), norms=norms)
    text = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    tensors = family.layer_tensors({**text, "head_dim": 32})
    assert tensors["self_attn.q_proj.weight"] == (128, 96) and tensors["self_attn.v_proj.weight"] == (64, 96)
    assert tensors["self_attn.o_proj.weight"] == (96, 128) and tensors["self_attn.q_norm.weight"] == (32,)
    assert not any(name.endswith(".bias") for name in tensors)
    assert family.linear_shapes(text)["self_attn.o_proj"] == (96, 96)
