from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve.settings.arguments import vllm_arguments
from serve.settings.config import ServerConfig
from serve.settings.lora import Lora, check_lora, lora_arguments
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.paths import demo_checkpoint

PREFIX = "base_model.model.model.language_model.layers"


@pytest.fixture
def demo() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


def adapter(directory: Path, config: dict[str, Any] | None = None, shapes: dict[str, Any] | None = None) -> Path:
    """An adapter of rank 4 for one module of the embedded model, or for whatever `shapes` says."""
    directory.mkdir()
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (directory / "adapter_config.json").write_text(json.dumps(base | (config or {})))
    hidden = int(Checkpoint.open(demo_checkpoint()).text_config["hidden_size"])
    shapes = shapes or {
        f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": (4, hidden),
        f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": (hidden, 4),
    }
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "adapter_model.safetensors")
    return directory


def test_a_good_one(tmp_path: Path, demo: Checkpoint) -> None:
    path = adapter(tmp_path / "a", {"rank_pattern": {"k_proj": 12}})
    lora = Lora.parse(f"charts={path}")
    assert (lora.name, lora.path, lora.rank) == ("charts", path.resolve(), 12)
    check_lora(lora, demo)
    arguments = vllm_arguments(ServerConfig(backend="cpu", loras=(lora, Lora("b", path, 4))), demo, "demo")
    at = arguments.index("--enable-lora")
    assert arguments[at + 1 : at + 8] == [
        *("--max-lora-rank", "16", "--max-loras", "2", "--lora-modules"),
        *(f"charts={path.resolve()}", f"b={path}"),
    ]


@pytest.mark.parametrize("rank", range(1, 513, 37))
def test_ranks_are_rounded_up_to_what_vllm_has(rank: int) -> None:
    arguments = lora_arguments([Lora("a", Path("/a"), rank)])
    chosen = int(arguments[arguments.index("--max-lora-rank") + 1])
    assert rank <= chosen and chosen in (8, 16, 32, 64, 128, 256, 320, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "give a name and a directory"),
        ("=x", "give a name"),
        ("a b=x", "give a name"),
        ("a=/nowhere", "no adapter"),
    ],
)
def test_what_is_no_adapter(text: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        Lora.parse(text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 1024}, "rank 1024.*up to 512"),
        ({"r": 0}, "no positive number"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "biases of its own"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "begun by pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules .lm_head"),
    ],
)
def test_what_vllm_can_not_serve(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        Lora.parse(f"a={adapter(tmp_path / 'a', config)}")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{PREFIX}.0.self_attn.q_proj.lora_A.weight", (4, 1536), "made for another model.*q_proj maps"),
        (f"{PREFIX}.0.mlp.down_proj.lora_B.weight", (1536, 4), "made for another model"),
        (f"{PREFIX}.27.self_attn.q_proj.lora_A.weight", (4, 256), "made for another model.*layers whose"),
        ("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight", (4, 64), "language model's linear layers"),
        ("base_model.model.lm_head.lora_A.weight", (4, 256), "language model's linear layers"),
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "no factor of a LoRA"),
    ],
)
def test_an_adapter_of_another_model(
    tmp_path: Path, demo: Checkpoint, name: str, shape: tuple[int, int], message: str
) -> None:
    lora = Lora.parse(f"a={adapter(tmp_path / 'a', shapes={name: shape})}")
    with pytest.raises(ServerError, match=message):
        check_lora(lora, demo)


@pytest.mark.parametrize("prefix", [PREFIX, "base_model.model.model.layers"])
def test_names_of_any_version(tmp_path: Path, demo: Checkpoint, prefix: str) -> None:
    shapes = {
        f"{prefix}.0.self_attn.q_proj.lora_{side}.weight": shape
        for side, shape in zip("AB", [(4, 256), (256, 4)], strict=True)
    }
    check_lora(Lora.parse(f"a={adapter(tmp_path / 'a', shapes=shapes)}"), demo)


def test_half_of_one(tmp_path: Path, demo: Checkpoint) -> None:
    lora = Lora.parse(f"a={adapter(tmp_path / 'a', shapes={f'{PREFIX}.0.self_attn.q_proj.lora_A.weight': (4, 256)})}")
    with pytest.raises(ServerError, match="holds lora_A alone"):
        check_lora(lora, demo)
    whole = Lora.parse(f"b={adapter(tmp_path / 'b', {'layers_to_transform': [0, 1]})}")
    with pytest.raises(ServerError, match=r"targets model\.language_model\.layers\.1\.self_attn\.q_proj, and has no"):
        check_lora(whole, demo)


def test_what_it_brings_of_its_own(tmp_path: Path, demo: Checkpoint) -> None:
    path = adapter(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
        (path / name).write_text(json.dumps(json.loads((demo.path / name).read_text()), indent=3))
    check_lora(Lora.parse(f"a={path}"), demo)  # the same as its base's
    (path / "chat_template.jinja").write_text("{{ messages }} image")
    with pytest.raises(
        ServerError, match=r"its own chat_template\.jinja \(another chat template\).*quantize --adapter"
    ):
        check_lora(Lora.parse(f"a={path}"), demo)
    (path / "chat_template.jinja").unlink()
    (path / "non_lora_state_dict.bin").touch()
    with pytest.raises(ServerError, match="weights beside the adapter, non_lora_state_dict"):
        Lora.parse(f"a={path}")


def test_a_pickle(tmp_path: Path, demo: Checkpoint) -> None:
    path = adapter(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ServerError, match="save it as safetensors"):
        check_lora(Lora.parse(f"a={path}"), demo)


def test_two_of_one_name() -> None:
    with pytest.raises(ServerError, match="same name"):
        ServerConfig(loras=(Lora("a", Path("/a"), 4), Lora("a", Path("/b"), 4)))
