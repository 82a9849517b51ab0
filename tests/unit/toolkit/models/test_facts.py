"""What is said of a family is what transformers and vLLM make of it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.support import tiny
from toolkit.compat import patch_torchvision
from toolkit.models.families import FAMILIES
from toolkit.models.family import Family
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.sources.random_model import TINY

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


def config_of(family: Family) -> dict[str, Any]:
    """The tiny model's config.json."""
    return family.config(TINY[family.model_type])


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, **config.get("text_config", {})}


def theirs(family: Family, config: dict[str, Any]) -> Any:
    """Return transformers' model of a config, without weights."""
    patch_torchvision()
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))


@pytest.mark.slow
@each_family
def test_tensors_are_those_of_transformers(family: Family) -> None:
    config = config_of(family)
    model = theirs(family, config)
    inner, text = model.model, text_of(config)
    layer = {name: tuple(value.shape) for name, value in inner.language_model.layers[0].state_dict().items()}
    tower = {name: tuple(value.shape) for name, value in inner.visual.state_dict().items()}
    assert family.layer_tensors(text) == layer
    vision = family.vision(config["vision_config"], text)
    assert family.vision_tensors(vision) == tower
    assert family.architecture == type(model).__name__ and family.model_type == model.config.model_type
    names = family.transformers
    found = set(model.state_dict())
    assert f"{names.language}embed_tokens.weight" in found and f"{names.layers}0.input_layernorm.weight" in found
    assert f"{names.visual}patch_embed.proj.weight" in found and f"{names.head}.weight" in found
    assert type(inner.language_model.layers[0]) is family.decoder_layer_class()


@pytest.mark.slow
@each_family
def test_what_is_said_of_the_tower_is_true_of_its_modules(family: Family) -> None:
    """Linears are linears in this order, norms are norms, and what goes before a unit is in the block."""
    config = config_of(family)
    visual, tower = theirs(family, config).model.visual, family.tower
    from torch import nn

    block = visual.blocks[0]
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(linears) == sorted(tower.linears)
    assert {name for name, _ in block.named_children() if "norm" in name} == set(tower.norms)
    assert all(unit.before in {"", *tower.norms, *tower.linears} for unit in tower.units)
    vision = family.vision(config["vision_config"], text_of(config))
    modules = {name for name, module in visual.named_modules() if isinstance(module, nn.Linear)}
    assert modules == set(tower.modules(vision))
    assert all(visual.get_submodule(name).bias is not None for name in modules)


@pytest.mark.slow
@each_family
def test_defaults_of_the_vision_tower_are_those_of_transformers(family: Family) -> None:
    patch_torchvision()
    from transformers import AutoConfig

    config = type(AutoConfig.for_model(family.model_type).vision_config)()
    ours = family.vision({}, {"hidden_size": getattr(config, family.vision_out)})
    assert ours == family.vision(config.to_dict(), {"hidden_size": 1})
    assert (ours.depth, ours.heads, ours.patch) == (config.depth, config.num_heads, config.patch_size)


@pytest.mark.slow
@each_family
def test_names_are_those_of_vllm(family: Family) -> None:
    patch_torchvision()
    models = pytest.importorskip(f"vllm.model_executor.models.{family.model_type}")
    model = getattr(models, family.architecture)
    rename = model.hf_to_vllm_mapper.apply_list
    for names in (family.hub, family.transformers):
        entries = [f"{names.layers}0.mlp.up_proj", f"{names.visual}merger.mlp.0", f"{names.head}.weight"]
        assert [family.in_vllm(entry) for entry in entries] == rename(entries)
        vllm = family.vllm
        assert rename(entries) == [f"{vllm.layers}0.mlp.up_proj", f"{vllm.visual}merger.mlp.0", f"{vllm.head}.weight"]
    fused = {unit.name.split(".")[1]: [name.split(".")[1] for name in unit.linears] for unit in family.units}
    for name, parts in model.packed_modules_mapping.items():
        if name in fused:
            assert fused[name] == list(parts)
    from vllm.model_executor.models.interfaces import supports_eagle3

    assert family.eagle == supports_eagle3(model)


@pytest.mark.slow
@each_family
def test_processors_are_those_of_transformers(family: Family) -> None:
    patch_torchvision()
    auto = importlib.import_module("transformers.models.auto.image_processing_auto")
    known = auto.IMAGE_PROCESSOR_MAPPING_NAMES[family.model_type]
    assert set(known.values()) <= set(family.image_processors)
    vision = family.vision(family.vision_settings, {"hidden_size": 1})
    settings = family.processor_files["preprocessor_config.json"]
    assert (settings["patch_size"], settings["merge_size"]) == (vision.patch, vision.merge)
    size = settings.get("size") or {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}
    assert (size["shortest_edge"], size["longest_edge"]) == (family.min_pixels, family.max_pixels)
    assert family.token_pixels(vision) == vision.side**2 and family.min_pixels % vision.side**2 == 0


@each_family
def test_autoawq_runs_what_it_has_a_class_for(family: Family) -> None:
    """It is read, not imported: its imports take seconds."""
    import importlib.util

    spec = importlib.util.find_spec("awq")
    assert spec is not None and spec.submodule_search_locations
    from pathlib import Path

    listed = (Path(spec.submodule_search_locations[0]) / "models" / "base.py").read_text()
    assert family.autoawq == (f'"{family.model_type}"' in listed)


@each_family
def test_units_are_all_linears_and_what_precedes_them_is_in_the_layer(family: Family) -> None:
    assert tuple(name for unit in family.units for name in unit.linears) == family.linears
    assert set(family.before) == set(family.fused)
    assert set(family.before.values()) <= {*family.norms, *family.linears}


def test_shapes_of_the_linears() -> None:
    assert QWEN2_VL.linear_shapes(tiny.TEXT) == tiny.SHAPES
    assert QWEN2_VL.token_pixels(QWEN2_VL.vision({}, tiny.TEXT)) == 28 * 28


#: Billions of parameters, as the models' cards on the hub say them.
PUBLISHED = {
    "2b": 2.21,
    "7b": 8.29,
    "72b": 73.4,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.5,
    "qwen2.5-vl-72b": 73.4,
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-4b": 4.44,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-32b": 33.4,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_as_many_parameters_as_published(name: str) -> None:
    from toolkit.checkpoint.published import without_files
    from toolkit.models.families import size_named

    family, size = size_named(name)
    found = without_files(name, family, family.config(size))
    assert sum(tensor.numel for tensor in found.tensors.values()) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.003)
