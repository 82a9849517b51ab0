"""A layer that was written is read back as the weights that its file holds, in whatever format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.formats.packing import dequantize, named, unpack_as
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.replay import written_layer


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_layer_is_what_its_file_holds(tmp_path: Path, form: str) -> None:
    source = Checkpoint.open(tiny.write(tmp_path / "m"))
    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(128, 256), "down_proj": nn.Linear(256, 128)})})
    prefix = source.layer_prefix(1)
    packed = tiny.random_packed(form, 128, 256, 64, torch.Generator().manual_seed(0))
    kept = {f"{prefix}mlp.up_proj.bias": torch.ones(256), f"{prefix}mlp.down_proj.bias": torch.ones(128)}
    kept[f"{prefix}mlp.down_proj.weight"] = torch.full((128, 256), 0.5)
    save_file({**kept, **named(form, f"{prefix}mlp.up_proj", packed)}, tmp_path / "layer.safetensors")
    recipe = Recipe(format=form, group_size=64)
    found = written_layer(layer, source, recipe, 1, tmp_path / "layer.safetensors").state_dict()
    assert torch.equal(found["mlp.up_proj.weight"], dequantize(unpack_as(form, packed, 64), torch.float32))
    assert torch.equal(found["mlp.up_proj.bias"], torch.ones(256))
    assert torch.equal(found["mlp.down_proj.weight"], kept[f"{prefix}mlp.down_proj.weight"])
