"""What is refused of a Qwen2-VL is refused of every family: the same list, with the family's own facts in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.problems import find_problems, refuse_broken
from toolkit.errors import CheckpointError, QvlError
from toolkit.models.families import FAMILIES
from toolkit.models.family import Family
from toolkit.quantize import quantize
from toolkit.sources.adapter import check_adapter
from toolkit.sources.random_model import TINY, write_random_model

Change = Callable[[Path, Family], object]
PRE = "preprocessor_config.json"


def weights(change: Callable[[dict[str, torch.Tensor], Family], object]) -> Change:
    """Write the tensors anew, changed."""

    def write(path: Path, family: Family) -> None:
        found = load_file(path / "model.safetensors")
        change(found, family)
        save_file(found, path / "model.safetensors", {"format": "pt"})

    return write


def text(**changes: Any) -> Change:
    """Change the language model's settings, wherever the family's config has them."""

    def write(path: Path, family: Family) -> None:
        if not family.nested:
            return tiny.edit_json(path / "config.json", **changes)
        nested = json.loads((path / "config.json").read_text())["text_config"]
        return tiny.edit_json(path / "config.json", text_config={**nested, **changes})

    return write


def side(name: str, **changes: Any) -> Change:
    return lambda path, _: tiny.edit_json(path / name, **changes)


def another_config(path: Path, family: Family) -> None:
    """The config.json of the next family, sizes and all."""
    other = FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]
    tiny.write_json(path / "config.json", other.config(TINY[other.model_type]))


def norm(family: Family) -> str:
    return f"{family.hub.visual}merger.{family.tower.merger_norm[0]}.weight"


BROKEN: dict[str, tuple[Change, str]] = {
    "the config of another family": (another_config, "and the weights are a {title}'s"),
    "a kind that is not supported": (
        lambda path, _: tiny.edit_json(path / "config.json", model_type="qwen3_vl_moe", architectures=["X"]),
        "each expert would need scales",
    ),
    "rows unlike the config": (text(vocab_size=1088), "[1024, 256], and the config calls for [1088, 256]"),
    "a layer too many": (text(num_hidden_layers=3), "no {title} of this config has"),
    "positions in one dimension": (text(rope_scaling=None), "no mrope_section"),
    "another activation": (text(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "a norm missing": (weights(lambda found, family: found.pop(norm(family))), "lacks {norm}"),
    "an empty tensor": (weights(lambda found, family: found.update({norm(family): torch.ones(0)})), "DeepSpeed"),
    "an adapter not merged": (
        weights(
            lambda found, family: found.update(
                {f"{family.hub.layers}0.self_attn.q_proj.base_layer.weight": torch.ones(2, 2)}
            )
        ),
        "an adapter that is not merged",
    ),
    "a processor of another family": (side(PRE, image_processor_type="CLIPImageProcessor"), "{title} has a Qwen2VLIm"),
    "patches of another size": (side(PRE, patch_size=15), "patch_size 15, and the vision tower has {patch}"),
    "a size in pixels alone": (
        side(PRE, size={"min_pixels": 3136}, min_pixels=None, max_pixels=None),
        "({least} and {most} as published)",
    ),
    "tokens beyond the embeddings": (
        lambda path, _: tiny.write_json(path / "tokenizer.json", {"model": {"vocab": {"a": 1, "b": 5000}}}),
        "'b' (5000)",
    ),
    "another image token": (
        lambda path, _: tiny.edit_json(path / "config.json", image_token_id=5),
        "config.json takes 5 for <|image_pad|>",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.model_type)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def whole(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(f"{family.title.lower()}-tiny", tmp_path_factory.mktemp("whole") / "m")


@pytest.mark.parametrize("name", BROKEN)
def test_every_family_is_refused_alike(name: str, family: Family, whole: Path, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    path = Path(shutil.copytree(whole, tmp_path / "m"))
    assert find_problems(Checkpoint.open(path)) == []
    change(path, family)
    patch = family.vision(family.vision_settings, {"hidden_size": 1}).patch
    facts = {"title": family.title, "norm": norm(family), "patch": patch}
    expected = message.format(**facts, least=family.min_pixels, most=family.max_pixels)
    with pytest.raises(CheckpointError) as refused:
        refuse_broken(Checkpoint.open(path))
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_nan_is_refused_by_name(family: Family, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "m"))
    weights(lambda found, family: found[norm(family)].fill_(float("nan")))(path, family)
    with pytest.raises(QvlError, match=norm(family).replace(".", r"\.")):
        quantize(str(path), tmp_path / "out", samples=2)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_family_is_refused(family: Family, whole: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn.query"]}
    tiny.write_json(adapter / "adapter_config.json", config)
    module = "base_model.model.model.vision.blocks.0.attn.query"
    parts = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="was made for another model"):
        check_adapter(adapter, Checkpoint.open(whole))
