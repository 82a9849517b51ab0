"""AWQ checkpoints of later families as they are found: names of the hub and of transformers, config flat and nested."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support import rounded, tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.models.families import FAMILIES
from toolkit.models.family import Family
from toolkit.models.qwen2_5_vl import QWEN2_5_VL
from toolkit.sources.random_model import write_random_model


@pytest.fixture(scope="module", params=FAMILIES[1:], ids=lambda family: family.model_type)
def awq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, title = tmp_path_factory.mktemp("awq"), request.param.title.lower()
    source = write_random_model(f"{title}-tiny", directory / "source")
    return rounded.write(directory / title, frozenset(), source=source)


def laid_out(awq: Path, out: Path, *, nested: bool, names: str, left: list[str]) -> Path:
    """Write an AWQ checkpoint with other tensor names and another shape of config.json, in three shards."""
    path = Path(shutil.copytree(awq, out))
    checkpoint = Checkpoint.open(awq)
    family = checkpoint.family
    config: dict[str, Any] = json.loads((awq / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = left
    if nested and "text_config" not in config:
        outer = ("architectures", "model_type", "vision_config", "quantization_config", "tie_word_embeddings")
        kept = {key: value for key, value in config.items() if key in outer or key.endswith("_token_id")}
        config = kept | {"text_config": {key: value for key, value in config.items() if key not in kept}}
    tiny.write_json(path / "config.json", config)
    inside, wanted = Checkpoint.open(awq), getattr(family, names)
    found = {}
    for name, tensor in load_file(awq / "model.safetensors").items():
        for old, new in ((inside.visual_prefix, wanted.visual), (inside.language_prefix, wanted.language)):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        found[name] = tensor
    (path / "model.safetensors").unlink()
    tiny.write_tensors(path, found, shards=3)
    return path


@pytest.mark.parametrize("left", [["visual"], ["visual", "lm_head"], ["visual", "model.visual"]], ids="-".join)
@pytest.mark.parametrize("names", ["hub", "transformers"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_published_layouts_are_read(nested: bool, names: str, left: list[str], awq: Path, tmp_path: Path) -> None:
    path = laid_out(awq, tmp_path / "m", nested=nested, names=names, left=left)
    found, origin = inspect_checkpoint(path), inspect_checkpoint(awq)
    assert found.problems == []
    assert (found.architecture, found.parameters) == (origin.architecture, origin.parameters)
    checkpoint = Checkpoint.open(path)
    assert len(checkpoint.quantized_modules()) == 7 * checkpoint.num_layers and not checkpoint.left_linears()
    assert checkpoint.family.title.lower() in awq.name


def test_the_published_sizes_are_split_over_gpus_as_engines_do() -> None:
    """Groups of 128 divide the 32B's MLP over 8 GPUs, not the 72B's over two."""
    from serve.plan.capacity import shape
    from toolkit.checkpoint.engines import tensor_parallel

    family: Family = QWEN2_5_VL
    assert set(family.sizes) == {"3b", "7b", "32b", "72b"}
    able = {
        name: [size for size, obstacle in tensor_parallel(shape(f"qwen2.5-vl-{name}", True)).items() if not obstacle]
        for name in family.sizes
    }
    assert able == {"3b": [1, 2], "7b": [1, 2, 4], "32b": [1, 2, 4, 8], "72b": [1]}
