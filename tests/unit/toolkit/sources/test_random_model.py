"""Random weights in a real shape, and the tokenizer made from ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.errors import FormatError
from toolkit.models import families
from toolkit.models.family import Family, Size
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.paths import demo_checkpoint
from toolkit.sources import random_model

LICENSE = ROOT / "LICENSE"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    random_model.write_tokenizer(directory)
    return directory


@pytest.mark.slow
def test_the_tokenizer_is_qwens(tokenizer: Path) -> None:
    import tiktoken
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    model = json.loads((tokenizer / "tokenizer.json").read_text())
    assert made.token_to_id("<|endoftext|>") == 151643 and made.token_to_id("<|image_pad|>") == 151655
    # the same ranks through tiktoken, another implementation of byte-pair encoding
    alphabet = {c: b for b, c in enumerate(random_model._byte_alphabet())}
    ranks = {bytes(alphabet[c] for c in token): rank for token, rank in model["model"]["vocab"].items()}
    pattern = model["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    other = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in (
        "Hello, world! It's 2026.",
        "naïve café 你好世界 🙂",
        "  def f(x):\n\n    return x**2",
        LICENSE.read_text(),
    ):
        assert made.encode(text).ids == other.encode(text)
        assert made.decode(made.encode(text).ids) == text


@pytest.mark.slow
def test_a_shape_has_the_hubs_names_and_quantizable_layers(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the real shapes are gigabytes: the same code on a small one
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {**small, "num_key_value_heads": 1, "vocab_size": 64, "tie_word_embeddings": False}
    size = (QWEN2_VL, Size(text, {"depth": 1}))
    monkeypatch.setattr(families, "SIZES", {**families.SIZES, "small": size})
    out = random_model.write_random_model("small", tmp_path / "m", layers=1, tokenizer=tokenizer)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.num_layers == 1 and "lm_head.weight" in checkpoint.tensors
    assert checkpoint.layers_prefix == "model.layers." and checkpoint.visual_prefix == "visual."
    weight = checkpoint.get("model.layers.0.mlp.up_proj.weight").float()
    assert weight.shape == (256, 128) and abs(float(weight.std()) - 0.02) < 0.002
    assert bool((checkpoint.get("model.layers.0.input_layernorm.weight") == 1).all())


def test_an_unknown_shape(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown shape '3b': choose 2b, 7b, 72b"):
        random_model.write_random_model("3b", tmp_path / "m")


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.model_type)
def test_a_tiny_model_of_each_family_is_whole(family: Family, tmp_path: Path) -> None:
    name = f"{family.title.lower()}-tiny"
    out = random_model.write_random_model(name, tmp_path / "m")
    found = inspect_checkpoint(out)
    assert (found.problems, found.architecture) == ([], family.architecture)
    other = random_model.write_random_model(name, tmp_path / "n", layers=3, seed=1)
    assert Checkpoint.open(other).num_layers == 3
    with pytest.raises(FormatError, match="unknown shape"):
        random_model.write_random_model("qwen2-tiny", tmp_path / "o")


def test_a_tiny_models_token_ids_are_its_tokenizers() -> None:
    added = json.loads((demo_checkpoint() / "tokenizer.json").read_text())["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in added}
    for family in families.FAMILIES:
        text = random_model.TINY[family.model_type].text
        assert {key: ids[token] for key, (token, _) in family.vision_tokens.items()}.items() <= text.items()
        assert text["eos_token_id"] == ids["<|im_end|>"]
