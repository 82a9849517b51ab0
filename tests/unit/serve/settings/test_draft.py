"""What may guess tokens ahead, and why the rest may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve.plan.capacity import shape
from serve.process.memory import need
from serve.settings.arguments import vllm_arguments
from serve.settings.config import ServerConfig
from serve.settings.draft import draft_arguments, draft_bytes
from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.models.families import FAMILIES, size_named
from toolkit.models.family import Family
from toolkit.sources.random_model import write_random_model

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


def model(family: Family, directory: Path) -> Checkpoint:
    return Checkpoint.open(write_random_model(f"{family.title.lower()}-tiny", directory))


def head(path: Path, **config: Any) -> Path:
    """An EAGLE-3 head for the tiny models, as SpecForge and SGLang save them."""
    path.mkdir(parents=True)
    known = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 256, "vocab_size": 1024}
    tiny.write_json(path / "config.json", {**known, "draft_vocab_size": 512, "num_hidden_layers": 1, **config})
    weights = {"fc.weight": torch.ones(256, 768), "d2t": torch.zeros(512, dtype=torch.int64)}
    save_file(weights, path / "model.safetensors")
    return path


def speculation(arguments: list[str]) -> dict[str, Any]:
    assert arguments.count("--speculative-config") == 1
    found: dict[str, Any] = json.loads(arguments[arguments.index("--speculative-config") + 1])
    return found


@each_family
def test_an_eagle_head_is_taken_where_vllm_has_it(family: Family, tmp_path: Path) -> None:
    checkpoint, draft = model(family, tmp_path / "m"), head(tmp_path / "head")
    config = ServerConfig(backend="cpu", draft=str(draft), draft_tokens=4)
    if not family.eagle:
        with pytest.raises(ServerError, match=r"EAGLE for Qwen2\.5-VL and Qwen3-VL, and not for a Qwen2-VL.*ngram"):
            vllm_arguments(config, checkpoint, "m")
        return
    expected = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 4}
    assert speculation(vllm_arguments(config, checkpoint, "m")) == expected
    plain = need(checkpoint, ServerConfig(backend="cpu"))
    assert need(checkpoint, config).weights - plain.weights == draft_bytes(str(draft)) > 256 * 768 * 4


@each_family
def test_ngrams_run_on_the_gpu_where_there_is_one(family: Family) -> None:
    checkpoint = shape(next(iter(f"{family.title.lower()}-{name}" for name in family.sizes)), True)
    for on_gpu, method in ((True, "ngram_gpu"), (False, "ngram")):
        found = speculation(draft_arguments("ngram", 3, checkpoint, on_gpu=on_gpu))
        assert (found["method"], found["num_speculative_tokens"]) == (method, 3)
    assert draft_bytes("ngram") == draft_bytes(None) == 0


def test_a_2b_is_no_draft_of_a_7b(tmp_path: Path) -> None:
    family, size = size_named("2b")
    tiny.write_json(tmp_path / "config.json", family.config(size))
    said = r"a whole Qwen2-VL can't be a draft: it has 151,936 tokens in its vocabulary and the model 152,064, and vLLM"
    with pytest.raises(ServerError, match=said):
        draft_arguments(str(tmp_path), 3, shape("7b", True), on_gpu=True)
    # nor of one with the same vocabulary
    family, size = size_named("qwen3-vl-2b")
    tiny.write_json(tmp_path / "config.json", family.config(size))
    with pytest.raises(ServerError, match="can't be a draft: vLLM takes no draft whose positions have three"):
        draft_arguments(str(tmp_path), 3, shape("qwen3-vl-8b", True), on_gpu=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is LlamaForCausalLM, and no EAGLE-3 head"),
        ({"architectures": None}, "of no architecture"),
        ({"hidden_size": 512}, "a head of hidden_size 512.*has 256: it was trained for another model"),
        ({"vocab_size": 1025}, "a head of vocab_size 1025.*has 1024"),
    ],
)
def test_a_head_of_something_else_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    checkpoint = model(FAMILIES[1], tmp_path / "m")
    with pytest.raises(ServerError, match=said):
        draft_arguments(str(head(tmp_path / "head", **config)), 3, checkpoint, on_gpu=True)


def test_a_head_of_more_hidden_states_is_taken(tmp_path: Path) -> None:
    checkpoint = model(FAMILIES[1], tmp_path / "m")
    for name, config, wide in (
        ("four", {"num_aux_hidden_states": 4}, (256, 1024)),
        ("listed", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, (256, 512)),
        ("beside", {"eagle_aux_hidden_state_layer_ids": [1, 2]}, (256, 512)),
        ("narrower", {"hidden_size": 128, "target_hidden_size": 256}, (128, 768)),
    ):
        draft = head(tmp_path / name, **config)
        save_file({"fc.weight": torch.ones(wide)}, draft / "model.safetensors")
        assert draft_arguments(str(draft), 3, checkpoint, on_gpu=True)


def test_a_head_without_its_weights_is_refused(tmp_path: Path) -> None:
    checkpoint, draft = model(FAMILIES[1], tmp_path / "m"), head(tmp_path / "head")

    def refused(said: str) -> None:
        with pytest.raises(ServerError, match=said):
            draft_arguments(str(draft), 3, checkpoint, on_gpu=True)

    save_file({"fc.weight": torch.ones(256, 512)}, draft / "model.safetensors")
    refused(r"fc\.weight \[256, 512\], and an EAGLE-3 head for this model \[256, 768\]")
    save_file({"norm.weight": torch.ones(256)}, draft / "model.safetensors")
    refused(r"no fc\.weight")
    (draft / "model.safetensors").write_bytes(b"x")
    refused("truncated")
    (draft / "model.safetensors").unlink()
    refused("no weights there")
    (draft / "config.json").unlink()
    refused("no config.json there")


def test_two_words_on_guessing_are_one_too_many() -> None:
    with pytest.raises(ServerError, match="--draft says it already"):
        ServerConfig(draft="ngram", extra=("--speculative-config", "{}"))
    # a profile's n-grams give way
    settings = ServerConfig(backend="gpu", draft="ngram").settings.replaced(ngram=5)
    found = vllm_arguments(ServerConfig(backend="gpu", draft="ngram", settings=settings), shape("2b", True), "m")
    assert speculation(found)["method"] == "ngram_gpu"
