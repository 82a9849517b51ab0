"""`qvl inspect` tells what a checkpoint is, and finds what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.support import tiny
from toolkit.checkpoint.inspection import Inspection, inspect_checkpoint
from toolkit.checkpoint.inspection_view import render
from toolkit.checkpoint.left_out import Linear
from toolkit.cli import app
from toolkit.errors import CheckpointError
from toolkit.sources.directory import resolve

Tensors = dict[str, torch.Tensor]


def spoil(path: Path, change: Callable[[Tensors], object], **options: str) -> Path:
    """Write a checkpoint whose tensors ``change`` has changed."""
    tiny.write(path, **options)
    found = tiny.tensors(version=options.get("version"))
    change(found)
    tiny.write_tensors(path, {name: tensor.contiguous() for name, tensor in found.items()})
    return path


def errors(path: Path, deep: bool = False) -> list[str]:
    return [p.message for p in inspect_checkpoint(path, deep).problems if p.level == "error"]


def warnings(path: Path, deep: bool = False) -> list[str]:
    return [p.message for p in inspect_checkpoint(path, deep).problems if p.level == "warning"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("version", [None, "gemm", "gemv"])
def test_a_whole_checkpoint_has_no_problems(tmp_path: Path, nested: bool, version: str | None) -> None:
    path = tiny.write(tmp_path / "m", nested=nested, version=version, shards=2)
    found = inspect_checkpoint(path, deep=True)
    assert found.problems == []
    assert not found.broken
    assert found.format == ("fp16" if version is None else f"AWQ {version.upper()}")
    assert found.names == ("transformers 5" if nested else "hub")
    assert found.files == 2
    # Packing changes bytes, not parameters: zeros and scales are no parameters.
    assert found.parameters == sum(t.numel() for t in tiny.tensors().values())
    assert found.nbytes == sum(t.numel() * t.element_size() for t in tiny.tensors(version=version).values())


def test_the_embedded_model_is_whole() -> None:
    found = inspect_checkpoint(resolve("demo"), deep=True)
    assert [p for p in found.problems if p.level == "error"] == []
    assert found.format == "fp16"


def test_parts_are_measured(tmp_path: Path) -> None:
    parts = {p.name: p for p in inspect_checkpoint(tiny.write(tmp_path / "m")).parts}
    assert set(parts) == {"vision", "embeddings", "layers", "norm"}
    assert parts["embeddings"].parameters == tiny.VOCAB * tiny.HIDDEN
    assert parts["norm"].nbytes == 2 * tiny.HIDDEN
    linears = sum(k * n for k, n in tiny.SHAPES.values())
    biases = sum(tiny.SHAPES[f"self_attn.{name}_proj"][1] for name in "qkv")
    assert parts["layers"].parameters == tiny.LAYERS * (linears + biases + 2 * tiny.HIDDEN)


def test_quantization_is_described(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", version="gemm", group_size=128)
    quantization = inspect_checkpoint(path).quantization
    assert quantization is not None
    assert quantization["bits_per_weight"] == round(4 + (4 + 16) / 128, 3)  # a zero and a scale for 128 weights
    assert quantization["quantized"] == dict.fromkeys(tiny.SHAPES, tiny.LAYERS)
    assert quantization["left"] == ["vision", "embeddings", "norm", "lm_head"]
    assert quantization["modules_to_not_convert"] == ["visual", "model.visual"]


def test_what_made_it_is_told(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", version="gemm")
    made = {"source": {"model": "demo"}, "conversions": [{"from": "gemv", "to": "gemm"}]}
    tiny.write_json(path / "qvl.json", {**made, "layers": []})
    assert inspect_checkpoint(path).made == made
    assert "by qvl from demo; repacked gemv to gemm" in show(inspect_checkpoint(path))
    (path / "qvl.json").write_text("{")
    assert inspect_checkpoint(path).made is None
    assert any("qvl.json is not valid JSON" in message for message in errors(path))


class TestTensors:
    def test_missing_ones_are_named_by_layer(self, tmp_path: Path) -> None:
        def change(found: Tensors) -> None:
            del found["model.layers.1.mlp.up_proj.weight"], found["model.layers.1.self_attn.q_proj.bias"]
            del found["visual.merger.ln_q.bias"]

        found = errors(spoil(tmp_path / "m", change))
        assert found == [
            "layer 1 lacks model.layers.1.self_attn.q_proj.bias and 1 more",
            "the vision part lacks visual.merger.ln_q.bias",
        ]

    def test_a_missing_layer(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        tiny.edit_json(path / "config.json", num_hidden_layers=3)
        assert errors(path) == ["layer 2 lacks model.layers.2.input_layernorm.weight and 11 more"]

    def test_missing_zeros(self, tmp_path: Path) -> None:
        path = spoil(tmp_path / "m", lambda t: t.pop("model.layers.0.mlp.down_proj.qzeros"), version="gemm")
        assert errors(path) == ["layer 0 lacks model.layers.0.mlp.down_proj.qzeros"]

    def test_a_shape_the_config_does_not_call_for(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        tiny.edit_json(path / "config.json", vocab_size=65)
        assert errors(path) == ["model.embed_tokens.weight is [64, 128], and the config calls for [65, 128]"]

    def test_a_layer_too_many(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        tiny.edit_json(path / "config.json", num_hidden_layers=1)
        assert errors(path) == [
            "tensors that no Qwen2-VL of this config has (vLLM stops at them, and drops biases): "
            "model.layers.1.input_layernorm.weight and 11 more"
        ]

    def test_a_tied_lm_head_that_is_there(self, tmp_path: Path) -> None:
        path = spoil(tmp_path / "m", lambda t: t.update({"lm_head.weight": torch.ones(64, 128).half()}))
        assert errors(path) == []
        assert "engines ignore lm_head.weight" in warnings(path)[0]

    def test_an_untied_lm_head_that_is_not_there(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        tiny.edit_json(path / "config.json", tie_word_embeddings=False)
        assert errors(path) == ["the lm_head part lacks lm_head.weight"]

    def test_an_untied_lm_head_that_is_there(self, tmp_path: Path) -> None:
        path = spoil(tmp_path / "m", lambda t: t.update({"lm_head.weight": torch.ones(64, 128).half()}))
        tiny.edit_json(path / "config.json", tie_word_embeddings=False)
        assert inspect_checkpoint(path).problems == []

    def test_words_that_do_not_fit_the_config(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m", version="gemm")
        tiny.edit_json(path / "config.json", intermediate_size=512)
        assert (
            "model.layers.0.mlp.up_proj packs 256 x 128 weights, and the config calls for 512 x 128" in errors(path)[1]
        )

    def test_gemv_that_calls_itself_gemm(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m", version="gemv")
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["version"] = "gemm"
        tiny.write_json(path / "config.json", config)
        assert len(errors(path)) == 7 * tiny.LAYERS

    def test_weights_in_a_dtype_no_engine_takes(self, tmp_path: Path) -> None:
        name = "model.norm.weight"
        path = spoil(tmp_path / "m", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
        assert errors(path) == [f"{name} is stored as F8_E4M3, not in a 16 or 32 bit float"]


class TestQuantizationConfig:
    def change(self, path: Path, left: frozenset[Linear] = frozenset(), **changes: object) -> list[str]:
        tiny.write(path, version="gemm", left=left)
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"].update(changes)
        tiny.write_json(path / "config.json", config)
        return errors(path)

    def test_without_zero_points(self, tmp_path: Path) -> None:
        assert "zero_point: false" in self.change(tmp_path / "m", zero_point=False)[0]

    def test_packed_modules_that_it_says_are_not(self, tmp_path: Path) -> None:
        found = self.change(tmp_path / "m", modules_to_not_convert=["visual", "down_proj"])
        assert found == ["packed, but listed in modules_to_not_convert: model.layers.0.mlp.down_proj and 1 more"]

    def test_a_vision_tower_it_says_is_packed(self, tmp_path: Path) -> None:
        found = self.change(tmp_path / "m", modules_to_not_convert=["lm_head"])
        assert found == ["the vision tower is in 16 bits, and modules_to_not_convert does not list visual"]

    def test_no_list_is_no_problem(self, tmp_path: Path) -> None:
        assert self.change(tmp_path / "m", modules_to_not_convert=None) == []

    def test_lm_head(self, tmp_path: Path) -> None:
        found = self.change(tmp_path / "m", lm_head=True)
        assert found == ["lm_head is not packed, and quantization_config says lm_head: true"]

    def test_what_is_left_must_be_listed(self, tmp_path: Path) -> None:
        left = frozenset({(1, "self_attn.o_proj")})
        for patterns in (
            ["visual", "layers.1.self_attn.o_proj"],
            ["visual", "model.layers.1.self_attn.o_proj"],
            ["model.visual.", "model.language_model.layers.1.self_attn.o_proj"],
            None,  # vLLM then goes by the tensors
        ):
            assert self.change(tmp_path / "m", left, modules_to_not_convert=patterns) == [], patterns
        for patterns in (["visual"], ["visual", "layers.11.self_attn.o_proj"], ["visual", "layers.1.self_attn.q_proj"]):
            found = self.change(tmp_path / "m", left, modules_to_not_convert=patterns)
            name = "model.layers.1.self_attn.o_proj"
            assert f"in 16 bits, but not listed in modules_to_not_convert: {name}" in found, patterns

    @pytest.mark.parametrize("visual", ["visual.blocks", "model.visual", "visual.blocks.0"])
    def test_a_vision_tower_it_lists_in_part(self, tmp_path: Path, visual: str) -> None:
        found = self.change(tmp_path / "m", modules_to_not_convert=[visual])
        assert found == ["the vision tower is in 16 bits, and modules_to_not_convert does not list visual"]

    def test_a_fused_matrix_listed_in_part(self, tmp_path: Path) -> None:
        found = self.change(tmp_path / "m", modules_to_not_convert=["visual", "layers.1.self_attn.q_proj"])
        assert len(found) == 1
        assert "has self_attn.q_proj of language_model.model.layers.1 and not self_attn.k_proj" in found[0]

    @pytest.mark.parametrize("patterns", [["visual", "layers.1.mlp.up_proj"], None])
    def test_a_fused_matrix_packed_in_part(self, tmp_path: Path, patterns: list[str] | None) -> None:
        left = frozenset({(1, "mlp.up_proj")})
        assert self.change(tmp_path / "m", left, modules_to_not_convert=patterns) == [
            "model.layers.1.mlp.gate_proj is packed and model.layers.1.mlp.up_proj is not, "
            "and engines run them as one matrix"
        ]


class TestMixed:
    LEFT = frozenset({(i, "mlp.down_proj") for i in range(tiny.LAYERS)} | {(1, "self_attn.o_proj")})

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("version", ["gemm", "gemv"])
    def test_is_described(self, tmp_path: Path, nested: bool, version: str) -> None:
        path = tiny.write(tmp_path / "m", nested=nested, version=version, left=self.LEFT)
        found = inspect_checkpoint(path, deep=True)
        assert found.problems == []
        assert found.quantization is not None
        assert found.quantization["left_linears"] == {"self_attn.o_proj": [1], "mlp.down_proj": [0, 1]}
        assert found.quantization["quantized"]["self_attn.o_proj"] == 1
        assert "mlp.down_proj" not in found.quantization["quantized"]
        assert found.parameters == sum(t.numel() for t in tiny.tensors().values())
        assert found.nbytes == sum(
            t.numel() * t.element_size() for t in tiny.tensors(version=version, left=self.LEFT).values()
        )

    def test_the_table(self, tmp_path: Path) -> None:
        text = show(inspect_checkpoint(tiny.write(tmp_path / "m", version="gemm", left=self.LEFT)))
        assert "q, k, v, gate, up of all 2 layers; 1 x self_attn.o_proj" in text
        assert "lm_head; self_attn.o_proj of layer 1; mlp.down_proj of every layer" in text

    def test_bits_are_of_what_is_packed(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m", version="gemm", group_size=128, left=self.LEFT)
        quantization = inspect_checkpoint(path).quantization
        assert quantization is not None and quantization["bits_per_weight"] == round(4 + (4 + 16) / 128, 3)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tokenizer.json", "no tokenizer"),
            ("tokenizer_config.json", "no tokenizer_config.json"),
            ("preprocessor_config.json", "no image processor"),
        ],
    )
    def test_missing(self, tmp_path: Path, name: str, message: str) -> None:
        path = tiny.write(tmp_path / "m")
        (path / name).unlink()
        assert message in errors(path)[0]

    def test_other_names_for_the_same(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        (path / "tokenizer.json").unlink()
        (path / "vocab.json").write_text("{}")
        (path / "merges.txt").write_text("")
        (path / "preprocessor_config.json").unlink()
        tiny.write_json(path / "processor_config.json", {"image_processor": {}, "video_processor": {}})
        assert inspect_checkpoint(path).problems == []

    def test_no_chat_template(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        tiny.write_json(path / "tokenizer_config.json", {})
        assert "no chat template" in errors(path)[0]
        (path / "chat_template.jinja").write_text("{{ messages }}")
        assert errors(path) == []

    def test_no_generation_config(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        (path / "generation_config.json").unlink()
        assert errors(path) == []
        assert "no generation_config.json" in warnings(path)[0]

    def test_an_lfs_pointer(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        (path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert errors(path) == ["tokenizer.json is a Git-LFS pointer, not the file: run `git lfs pull`"]

    def test_a_byte_order_mark(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        (path / "config.json").write_bytes(b"\xef\xbb\xbf" + (path / "config.json").read_bytes())
        assert errors(path) == [
            "config.json begins with a byte order mark, at which transformers and vLLM stop: save it without"
        ]

    def test_malformed_json(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        (path / "preprocessor_config.json").write_text("{")
        assert "preprocessor_config.json is not valid JSON" in errors(path)[0]


class TestDeep:
    def set(self, name: str, value: float, count: int = 1) -> Callable[[Tensors], None]:
        def change(found: Tensors) -> None:
            found[name].view(-1)[:count] = value

        return change

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("version", ["gemm", "gemv"])
    def test_scales_that_are_no_numbers(self, tmp_path: Path, version: str, value: float) -> None:
        name = "model.layers.1.mlp.up_proj.scales"
        path = spoil(tmp_path / "m", self.set(name, value, 2), version=version)
        assert errors(path) == []  # headers alone don't show it
        assert f"{name}: 2 of" in errors(path, deep=True)[0]
        assert "are NaN or infinite" in errors(path, deep=True)[0]

    @pytest.mark.parametrize("version", ["gemm", "gemv"])
    def test_zero_and_negative_scales(self, tmp_path: Path, version: str) -> None:
        name = "model.layers.1.mlp.up_proj.scales"
        path = spoil(tmp_path / "m", self.set(name, 0.0, 2), version=version)
        # 256 outputs in two groups; the padding of GEMV's rows does not count.
        assert warnings(path, deep=True) == [f"{name}: 2 of 512 scales are 0, which loses their weights"]
        path = spoil(tmp_path / "n", self.set(name, -0.5), version=version)
        assert warnings(path, deep=True) == [f"{name}: 1 of 512 scales are negative"]

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        path = spoil(tmp_path / "m", self.set("visual.merger.mlp.0.weight", float("nan")))
        assert errors(path, deep=True) == ["visual.merger.mlp.0.weight: 1 of 16,384 values are NaN or infinite"]


def show(inspection: Inspection) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(inspection))
    return capture.get()


def test_the_table(tmp_path: Path) -> None:
    text = show(inspect_checkpoint(tiny.write(tmp_path / "[m]", version="gemv")))
    assert "[m]" in text  # not taken for markup
    assert "AWQ GEMV, 4 bits, groups of 64, zero points" in text
    assert "q, k, v, o, gate, up, down of all 2 layers" in text
    assert "after repacking" in text
    assert "can't be split over 4 GPUs: o_proj's 128 inputs don't divide by 64 x 4" in text
    assert "no problems found" in text


def test_many_problems_are_cut(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", version="gemm")
    tiny.edit_json(path / "config.json", hidden_size=256)
    text = show(inspect_checkpoint(path))
    assert text.count("error:") == 20
    assert "more (--json has them all)" in text


def test_the_verb(tmp_path: Path) -> None:
    runner = CliRunner()
    path = tiny.write(tmp_path / "m", version="gemm")
    result = runner.invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0
    result = runner.invoke(app, ["inspect", str(path), "--json", "--deep"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["format"] == "AWQ GEMM"
    assert found["total"]["nbytes"] == sum(part["nbytes"] for part in found["parts"])
    (path / "tokenizer.json").unlink()
    result = runner.invoke(app, ["inspect", str(path)])
    assert result.exit_code == 2
    assert "no tokenizer" in result.stdout
    result = runner.invoke(app, ["inspect", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, CheckpointError)


def test_the_convert_verb(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", version="gemm")
    result = CliRunner().invoke(app, ["convert", str(path), "--out", str(tmp_path / "out"), "--to", "gemv"])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").format == "AWQ GEMV"
