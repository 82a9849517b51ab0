"""Which family a config is of, and weights; and a family of other heads needs facts only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from toolkit.checkpoint.published import without_files
from toolkit.errors import FormatError
from toolkit.models.families import FAMILIES, SIZES, TITLES, family_of, family_of_weights, size_named, why_not
from toolkit.models.family import Family, Projection, Unit
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.sources.random_model import TINY

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


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


@each_family
def test_a_familys_own_config_and_weights_are_of_it(family: Family) -> None:
    for size in (*family.sizes.values(), TINY[family.model_type]):
        config = family.config(size)
        assert family_of(config) is family
        assert family_of_weights(without_files("x", family, config).tensors) is family
    assert family_of_weights(["model.layers.0.mlp.up_proj.weight"]) is None


def test_families_are_told_apart() -> None:
    for known in ("architecture", "model_type", "title"):
        assert len({getattr(family, known) for family in FAMILIES}) == len(FAMILIES)
    assert all(family.title in TITLES for family in FAMILIES)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, "qwen2_5_vl"),
        (
            {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"},
            "each expert would",
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "it has no vision tower"),
        (
            {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
            "a Qwen2-VL and a Qwen2.5-VL at once",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_what_is_known(config: dict[str, Any], said: str) -> None:
    assert family_of(config) is None
    told = why_not(config)
    assert told.startswith(f"is not a {TITLES}: its config.json says {config['architectures'][0]}")
    assert said in told and "\n" not in told


def test_sizes_are_named() -> None:
    assert size_named("7b") == size_named("qwen2-vl-7b")
    assert size_named("qwen2.5-vl-7b")[0].model_type == "qwen2_5_vl"
    assert set(SIZES) >= {"2b", "72b", "qwen2.5-vl-3b", "qwen2.5-vl-32b"}
    with pytest.raises(FormatError, match=r"unknown shape '3b': choose 2b, 7b, 72b.*qwen2.5-vl-3b"):
        size_named("3b")


def test_a_config_can_be_changed_without_changing_the_family() -> None:
    config = QWEN2_VL.config(QWEN2_VL.sizes["2b"])
    config["rope_scaling"]["type"] = "default"
    assert QWEN2_VL.config(QWEN2_VL.sizes["2b"])["rope_scaling"]["type"] == "mrope"


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
