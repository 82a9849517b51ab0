"""One list of what is wrong with a checkpoint: quantize, serve and inspect say the same of each, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from serve.process import launch, lifecycle
from tests.support import tiny
from toolkit import console
from toolkit.cli import app

#: Built once: each call of the Typer builds all verbs anew.
COMMAND: Any = typer.main.get_command(app)
Change = Callable[[Path], object]
UP = "model.layers.1.mlp.up_proj.weight"


def weights(change: Callable[[dict[str, torch.Tensor]], object], version: str | None = None) -> Change:
    """Write the tensors anew, changed."""

    def write(path: Path) -> None:
        found = tiny.tensors(version=version)
        change(found)
        tiny.write_tensors(path, {name: tensor.contiguous() for name, tensor in found.items()})

    return write


def settings(**changes: Any) -> Change:
    return lambda path: tiny.edit_json(path / "config.json", **changes)


def side(name: str, **changes: Any) -> Change:
    return lambda path: tiny.edit_json(path / name, **changes)


def gone(*names: str) -> Change:
    return lambda path: [(path / name).unlink() for name in names]


def text(name: str, content: str) -> Change:
    return lambda path: (path / name).write_text(content)


def renamed(old: str, new: str) -> Change:
    def rename(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found[name.replace(old, new)] = found.pop(name)

    return weights(rename)


def beside(**files: Any) -> Change:
    """Replace preprocessor_config.json by what transformers 5 writes."""

    def write(path: Path) -> None:
        (path / "preprocessor_config.json").unlink()
        tiny.write_json(path / "processor_config.json", files)

    return write


def added(**tokens: int) -> Change:
    entries = [{"id": number, "content": f"<|{token}|>"} for token, number in tokens.items()]
    return side("tokenizer.json", added_tokens=entries)


PRE = "preprocessor_config.json"
BROKEN: dict[str, tuple[Change, str]] = {
    # the directory and its files
    "no config": (gone("config.json"), "no config.json"),
    "no weights": (gone("model.safetensors"), "no weights"),
    "damaged config": (text("config.json", "{"), "not valid JSON"),
    "damaged weights": (text("model.safetensors", "x"), "truncated"),
    "a pointer": (text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), "Git-LFS pointer"),
    "damaged side file": (text("generation_config.json", "{"), "generation_config.json is not valid JSON"),
    "a byte order mark": (text("generation_config.json", "\ufeff{}"), "byte order mark"),
    # the config
    "another architecture": (settings(architectures=["LlavaForCausalLM"], model_type="llava"), "is not a Qwen2-VL"),
    "no vision": (settings(vision_config=None), "no vision_config"),
    "no size": (settings(hidden_size=None), "hidden_size is None"),
    "flat and nested at odds": (settings(text_config={**tiny.TEXT, "vocab_size": 65}), "vocab_size 64, and 65"),
    "heads that don't divide": (settings(num_attention_heads=3), "don't divide"),
    "key-value heads that don't divide": (settings(num_key_value_heads=3), "don't divide"),
    "vision heads that don't divide": (settings(vision_config={**tiny.VISION, "num_heads": 3}), "its 3 heads"),
    "another activation": (settings(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "positions in one dimension": (settings(rope_scaling=None), "no mrope_section"),
    "sections of another head": (
        settings(rope_scaling={"mrope_section": [16, 24, 24]}),
        "three numbers that sum to 16",
    ),
    "another method": (settings(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq weights"),
    # the weights
    "no head, not tied": (settings(tie_word_embeddings=None), "no lm_head.weight"),
    "no head, said to be untied": (settings(tie_word_embeddings=False), "lacks lm_head.weight"),
    "rows unlike the config": (settings(vocab_size=65), "[64, 128], and the config calls for [65, 128]"),
    "a layer missing": (settings(num_hidden_layers=3), "layer 2 lacks"),
    "a layer too many": (settings(num_hidden_layers=1), "no Qwen2-VL of this config has"),
    "a tensor missing": (weights(lambda found: found.pop(UP)), f"layer 1 lacks {UP}"),
    "a bias missing": (weights(lambda found: found.pop("visual.merger.ln_q.bias")), "lacks visual.merger.ln_q.bias"),
    "a tensor of nobody": (weights(lambda found: found.update({"score.weight": torch.ones(2)})), "score.weight"),
    "a bias of nobody": (
        weights(lambda found: found.update({UP.replace("weight", "bias"): torch.ones(256)})),
        "no Qwen2-VL of this config has",
    ),
    "an empty tensor": (weights(lambda found: found.update({UP: torch.ones(0)})), "is empty, as DeepSpeed"),
    "another shape": (weights(lambda found: found.update({UP: torch.ones(8, 8).half()})), "is [8, 8]"),
    "another dtype": (weights(lambda found: found.update({UP: found[UP].double()})), "stored as F64"),
    "an adapter not merged": (renamed("q_proj.weight", "q_proj.base_layer.weight"), "not merged"),
    "names that nothing loads": (renamed("model.layers.", "language_model.layers."), "names its layers"),
    "vision under another name": (renamed("visual.", "vision_tower."), "lacks visual.patch_embed"),
    # tokenizer, processor, template
    "no tokenizer": (gone("tokenizer.json"), "no tokenizer"),
    "no tokenizer config": (gone("tokenizer_config.json"), "no tokenizer_config.json"),
    "tokens beyond the embeddings": (added(image_pad=60, new=64), "beyond the model's 64 embeddings"),
    "words beyond the embeddings": (side("tokenizer.json", model={"vocab": {"a": 1, "b": 99}}), "'b' (99)"),
    "another image token": (added(image_pad=60, video_pad=61, vision_start=62), "takes 151655 for <|image_pad|>"),
    "no image token": (added(im_end=3), "the tokenizer does not have it"),
    "no template": (side("tokenizer_config.json", chat_template=None), "no chat template"),
    "no preprocessor": (gone(PRE), "no image processor"),
    "no image processor in it": (beside(processor_class="Qwen2VLProcessor"), "no image processor"),
    "no video processor": (beside(image_processor={}), "no video_processor"),
    "a processor of another family": (side(PRE, image_processor_type="CLIPImageProcessor"), "is of a CLIPImageProc"),
    "patches of another size": (side(PRE, patch_size=16), "patch_size 16, and the vision tower has 14"),
    "merged otherwise": (side(PRE, merge_size=1), "merge_size 1, and the vision tower has 2"),
    "nested patches": (beside(image_processor={"patch_size": 16}, video_processor={}), "has patch_size 16"),
    "a size in pixels alone": (side(PRE, size={"min_pixels": 3136, "max_pixels": 10**6}), "without shortest_edge"),
    "a size with one edge": (side(PRE, size={"shortest_edge": 3136}), "without longest_edge"),
    "a size of sides": (side(PRE, size={"height": 224, "width": 224}), "without shortest_edge"),
    "bounds crossed": (side(PRE, min_pixels=10**6, max_pixels=3136), "no size is within that"),
    "bounds of text": (side(PRE, min_pixels="3136"), "bounds images by '3136'"),
}
FINE: dict[str, Change] = {
    "as it is": lambda path: None,
    "bounds of pixels": side(PRE, min_pixels=3136, max_pixels=10**6),
    "bounds twice": side(PRE, min_pixels=3136, max_pixels=10**6, size={"min_pixels": 3136, "max_pixels": 10**6}),
    "edges": side(PRE, size={"shortest_edge": 3136, "longest_edge": 10**6}),
    "the fast processor": side(PRE, image_processor_type="Qwen2VLImageProcessorFast"),
    "tokens where the config says": lambda path: (
        settings(image_token_id=60, video_token_id=61, vision_start_token_id=62)(path),
        added(image_pad=60, video_pad=61, vision_start=62)(path),
    ),
    "a template of its own": lambda path: (
        side("tokenizer_config.json", chat_template=None)(path),
        text("chat_template.jinja", "{{ messages }}")(path),
    ),
    "a buffer of old": weights(
        lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    ),
}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line as a shell would; return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        console.run(COMMAND, arguments)
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lifecycle, "require_vllm", lambda device: None)

    def reached(*_: object) -> None:
        raise AssertionError("a server was to be started")

    monkeypatch.setattr(launch, "spawn", reached)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("name", BROKEN)
def test_all_three_verbs_refuse(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BROKEN[name]
    path = tiny.write(tmp_path / "m")
    change(path)
    for arguments in (["quantize", "--model", str(path), "--out", str(tmp_path / "out")], ["serve", str(path)]):
        code, out, told = run(arguments, capsys)
        assert (code, out) == (2, ""), told
        assert told.startswith("error: ") and told.count("\n") == 1 and message in told
        assert str(path) in told
    assert not (tmp_path / "out").exists()
    code, out, told = run(["inspect", str(path)], capsys)
    assert code == 2 and message in out + told
    assert "no problems" not in out


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("name", FINE)
def test_what_is_whole_is_taken_by_all(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "m")
    FINE[name](path)
    code, out, _ = run(["inspect", str(path)], capsys)
    assert code == 0 and "no problems found" in out
    with pytest.raises(AssertionError, match="a server was to be started"):
        console.run(COMMAND, ["serve", str(path)])


def test_several_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path / "m")
    gone(PRE, "tokenizer_config.json")(path)
    _, _, told = run(["quantize", "--model", str(path), "--out", str(tmp_path / "out")], capsys)
    assert f"(and 2 more: `qvl inspect {path}`)" in told
    found = json.loads(run(["inspect", str(path), "--json"], capsys)[1])
    assert sum(problem["level"] == "error" for problem in found["problems"]) == 3
