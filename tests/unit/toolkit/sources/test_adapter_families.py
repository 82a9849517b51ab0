"""An adapter of any family, merged, answers as peft does: vision tower, head and all; names are the base's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import chats, reference
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.problems import find_problems
from toolkit.compat import patch_torchvision
from toolkit.models.families import FAMILIES
from toolkit.models.family import Family
from toolkit.sources.adapter import merge
from toolkit.sources.random_model import write_random_model

#: By what trainers target: linears of the decoder, of every block's attention, and the output head.
TARGETS = ["q_proj", "v_proj", "down_proj", "attn.qkv", "lm_head"]


def in_float32(family: Family, directory: Path) -> Checkpoint:
    """A tiny random model whose weights are float32: what is merged is then rounded nowhere."""
    narrow = Checkpoint.open(write_random_model(f"{family.title.lower()}-tiny", directory / "narrow", layers=3))
    with CheckpointWriter(directory / "wide") as writer:
        for name in narrow.tensors:
            writer.add(name, narrow.get(name).float())
        writer.copy_side_files(narrow.path)
        writer.set_config(narrow.config)
    return Checkpoint.open(directory / "wide")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:], ids=lambda family: family.model_type)
def test_merged_weights_answer_as_the_adapter_does(family: Family, tmp_path: Path) -> None:
    patch_torchvision()
    from peft import LoraConfig, get_peft_model

    base = in_float32(family, tmp_path)
    sample = chats.inputs(base.path, tmp_path / "chats")[2]

    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in sample.inputs.items()
    }

    def answer(model: Any) -> torch.Tensor:
        """In double precision: a tiny model attends so sharply that float32 leaves 0.002 open."""
        with torch.no_grad():
            found: torch.Tensor = model.double()(**inputs).logits
        return found

    torch.manual_seed(0)
    before = answer(reference.load(base.path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
        model = get_peft_model(reference.load(base.path), config).eval()
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = answer(model)
    merged = Checkpoint.open(merge(base, tmp_path / "adapter", tmp_path / "merged"))
    assert list(merged.tensors) == list(base.tensors) and find_problems(merged) == []
    found = answer(reference.load(merged.path))
    assert float((found - before).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # what is merged is written in float32
