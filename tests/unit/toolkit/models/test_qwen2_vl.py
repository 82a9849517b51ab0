"""What is said of Qwen2-VL is what transformers and vLLM make of it."""

from __future__ import annotations

import pytest

from tests.support import tiny
from toolkit.compat import patch_torchvision
from toolkit.models.qwen2_vl import QWEN2_VL


def nested(text: dict[str, object]) -> dict[str, object]:
    return {**tiny.config(nested=True), "text_config": text}


@pytest.mark.slow
def test_tensors_are_those_of_transformers() -> None:
    patch_torchvision()
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(nested(tiny.TEXT)))
    inner = model.model
    layer = {name: tuple(value.shape) for name, value in inner.language_model.layers[0].state_dict().items()}
    tower = {name: tuple(value.shape) for name, value in inner.visual.state_dict().items()}
    assert QWEN2_VL.layer_tensors(tiny.TEXT) == layer
    assert QWEN2_VL.vision_tensors(QWEN2_VL.vision(tiny.VISION, tiny.TEXT)) == tower
    assert QWEN2_VL.architecture == type(model).__name__ and QWEN2_VL.model_type == model.config.model_type
    names = QWEN2_VL.transformers
    found = set(model.state_dict())
    assert f"{names.language}embed_tokens.weight" in found and f"{names.layers}0.input_layernorm.weight" in found
    assert f"{names.visual}patch_embed.proj.weight" in found and f"{names.head}.weight" in found
    assert type(inner.language_model.layers[0]) is QWEN2_VL.decoder_layer_class()


@pytest.mark.slow
def test_defaults_of_the_vision_tower_are_those_of_transformers() -> None:
    patch_torchvision()
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    theirs = Qwen2VLVisionConfig()
    ours = QWEN2_VL.vision({}, {"hidden_size": theirs.hidden_size})
    assert ours == QWEN2_VL.vision(theirs.to_dict(), {"hidden_size": 1})
    assert (ours.depth, ours.width, ours.heads, ours.patch) == (
        theirs.depth,
        theirs.embed_dim,
        theirs.num_heads,
        theirs.patch_size,
    )
    assert QWEN2_VL.token_pixels(ours) == 28 * 28


@pytest.mark.slow
def test_names_are_those_of_vllm() -> None:
    patch_torchvision()
    models = pytest.importorskip("vllm.model_executor.models.qwen2_vl")
    model = models.Qwen2VLForConditionalGeneration
    rename = model.hf_to_vllm_mapper.apply_list
    for names in (QWEN2_VL.hub, QWEN2_VL.transformers):
        entries = [f"{names.layers}0.mlp.up_proj", f"{names.visual}merger.mlp.0", f"{names.head}.weight"]
        assert [QWEN2_VL.in_vllm(entry) for entry in entries] == rename(entries)
        vllm = QWEN2_VL.vllm
        assert rename(entries) == [f"{vllm.layers}0.mlp.up_proj", f"{vllm.visual}merger.mlp.0", f"{vllm.head}.weight"]
    fused = {unit.name.split(".")[1]: [name.split(".")[1] for name in unit.linears] for unit in QWEN2_VL.units}
    for name, parts in model.packed_modules_mapping.items():
        if name in fused:
            assert fused[name] == list(parts)


def test_units_are_all_linears_and_what_precedes_them_is_in_the_layer() -> None:
    assert tuple(name for unit in QWEN2_VL.units for name in unit.linears) == QWEN2_VL.linears
    assert set(QWEN2_VL.before) == set(QWEN2_VL.fused)
    assert set(QWEN2_VL.before.values()) <= {*QWEN2_VL.norms, *QWEN2_VL.linears}


def test_shapes_of_the_linears() -> None:
    assert QWEN2_VL.linear_shapes(tiny.TEXT) == tiny.SHAPES
