"""Zeros beside the MLP's weights: what the model computes stays, bit for bit, and more GPUs can share it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support import rounded, tiny
from tests.unit.toolkit.checkpoint.test_engines import awq, find
from tests.unit.toolkit.checkpoint.test_engines import checkpoint as shape
from tests.unit.toolkit.formats.test_convert import all_tensors, weights
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.engines import obstacle, padding
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.cli import app
from toolkit.errors import CheckpointError, FormatError
from toolkit.formats.convert import convert
from toolkit.models.qwen2_vl import QWEN2_VL

#: All heads of this model divide by 4; its MLP is three groups of 64 wide.
WIDTH = 192


@pytest.fixture(autouse=True)
def odd_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "INNER", WIDTH)
    monkeypatch.setitem(tiny.TEXT, "intermediate_size", WIDTH)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        monkeypatch.setitem(tiny.SHAPES, name, (tiny.HIDDEN, WIDTH))
    monkeypatch.setitem(tiny.SHAPES, "mlp.down_proj", (WIDTH, tiny.HIDDEN))


def matrix(path: Path, name: str) -> torch.Tensor:
    """The weights [N, K] of a linear, packed or not."""
    found = weights(path) if Checkpoint.open(path).quantization else {}
    return found[name] if name in found else Checkpoint.open(path).get(f"{name}.weight")


def mlp(path: Path, layer: int, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) * up x) in float64, with the biases there are."""
    checkpoint = Checkpoint.open(path)
    prefix = f"{checkpoint.layer_prefix(layer)}mlp."

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = f"{prefix}{name}.bias"
        y = x @ matrix(path, f"{prefix}{name}").double().t()
        return y + checkpoint.get(bias).double() if bias in checkpoint.tensors else y

    hidden = torch.nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x)
    return linear("down_proj", hidden)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("version", "to"),
    [(name, None) for name in LAYOUTS] + [("gemm", "gemv"), ("gemv", "gemm"), ("gemm", "compressed-tensors")],
)
def test_packed(tmp_path: Path, version: str, to: str | None, nested: bool) -> None:
    source = tiny.write(tmp_path / "src", version=version, nested=nested, shards=2)
    padded = convert(source, tmp_path / "out", to, pad_tp=2)
    checkpoint = Checkpoint.open(padded)
    assert checkpoint.text_config["intermediate_size"] == 256 and obstacle(checkpoint, 2) is None
    assert checkpoint.quantization is not None and checkpoint.quantization.format == (to or version)
    assert inspect_checkpoint(padded, deep=True).problems == []
    before, after = weights(source), weights(padded)
    for name, weight in before.items():
        rows, columns = weight.shape
        assert torch.equal(after[name][:rows, :columns], weight)
        assert not after[name][rows:].any() and not after[name][:, columns:].any()
    x = torch.randn(5, tiny.HIDDEN, dtype=torch.float64)
    for layer in range(tiny.LAYERS):
        assert torch.equal(mlp(source, layer, x), mlp(padded, layer, x))
    packed = set(checkpoint.quantized_modules())
    old, new = all_tensors(source), all_tensors(padded)
    rest = {name for name in old if name.rpartition(".")[0] not in packed}
    assert rest == {name for name in new if name.rpartition(".")[0] not in packed}  # a packed module's parts differ
    assert all(torch.equal(old[name], new[name]) for name in rest)


def test_what_is_real_keeps_its_bits_in_the_file(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", version="gemm")
    old, new = all_tensors(source), all_tensors(convert(source, tmp_path / "out", pad_tp=2))
    for name, tensor in old.items():
        assert torch.equal(new[name][tuple(slice(n) for n in tensor.shape)], tensor), name
    assert torch.equal(new["model.layers.0.self_attn.q_proj.qweight"], old["model.layers.0.self_attn.q_proj.qweight"])


@pytest.mark.parametrize("nested", [False, True])
def test_16_bits_are_padded_for_the_groups_to_come(tmp_path: Path, nested: bool) -> None:
    source = tiny.write(tmp_path / "src", nested=nested)
    padded = convert(source, tmp_path / "out", pad_tp=4)
    assert Checkpoint.open(padded).text_config["intermediate_size"] == 512
    assert inspect_checkpoint(padded).problems == []
    x = torch.randn(5, tiny.HIDDEN, dtype=torch.float64)
    assert torch.equal(mlp(source, 1, x), mlp(padded, 1, x))


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_layers_in_16_bits_and_biases(tmp_path: Path, version: str) -> None:
    left = frozenset({(0, name) for name in QWEN2_VL.linears[4:]} | {(1, "self_attn.o_proj")})
    source = tiny.write(tmp_path / "src", version=version, left=left)
    found = tiny.tensors(version=version, left=left)
    for layer in range(tiny.LAYERS):
        for name, width in (("gate_proj", WIDTH), ("up_proj", WIDTH), ("down_proj", tiny.HIDDEN)):
            found[f"model.layers.{layer}.mlp.{name}.bias"] = torch.randn(width).half()
    tiny.write_tensors(source, found)
    padded = convert(source, tmp_path / "out", pad_tp=2)
    checkpoint = Checkpoint.open(padded)
    assert checkpoint.left_linears() == left
    assert checkpoint.tensors["model.layers.0.mlp.gate_proj.weight"].shape == (256, tiny.HIDDEN)
    assert checkpoint.tensors["model.layers.1.mlp.up_proj.bias"].shape == (256,)
    x = torch.randn(5, tiny.HIDDEN, dtype=torch.float64)
    for layer in range(tiny.LAYERS):
        assert torch.equal(mlp(source, layer, x), mlp(padded, layer, x))


def test_the_72b() -> None:
    assert [padding(shape("72B", awq()), gpus) for gpus in (1, 2, 4, 8)] == [29568, 29696, 29696, 29696]
    assert padding(shape("72B padded", awq()), 8) == 29696
    assert padding(shape("2B", awq()), 4) == 9216
    assert padding(shape("7B", awq()), 8) is None  # 28 heads
    assert padding(shape("72B", awq(group_size=-1)), 2) is None
    advice = "8 GPUs can with `qvl convert --pad-tp 8`: zeros widen the MLP from 29568 to 29696"
    assert find("vLLM on GPUs", shape("72B", awq())).advice == advice
    for fine in (shape("72B padded", awq()), shape("7B", awq()), shape("72B")):
        assert find("vLLM on GPUs", fine).advice is None


def test_inspect_tells_of_it(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", version="gemm")
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(source)], env={"COLUMNS": "200"}).stdout
    assert "2 GPUs can with `qvl convert --pad-tp 2`: zeros widen the MLP from 192 to 256" in shown
    result = runner.invoke(app, ["convert", str(source), "--out", str(tmp_path / "out"), "--pad-tp", "2"])
    assert result.exit_code == 0, result.output
    shown = runner.invoke(app, ["inspect", str(tmp_path / "out")], env={"COLUMNS": "200"}).stdout
    assert "its MLP padded from 192 to 256" in shown and "repacked" not in shown and "convert --pad-tp" not in shown


def test_the_manifest_and_the_card_say_it(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", version="gemm")
    tiny.write_json(source / "qvl.json", {"recipe": {"format": "gemm"}})
    (source / "README.md").write_text("# A card\n")
    padded = convert(source, tmp_path / "out", "gemv", pad_tp=2)
    (entry,) = json.loads((padded / "qvl.json").read_text())["conversions"]
    assert (entry["from"], entry["to"], entry["intermediate_size"]) == ("gemm", "gemv", [192, 256])
    assert (
        (padded / "README.md")
        .read_text()
        .endswith(
            "Repacked from GEMM to GEMV, its MLP padded with zeros from 192 to 256 by `qvl convert`; "
            "the values are the same.\n"
        )
    )


class TestRefused:
    def expect(self, source: Path, message: str, gpus: int = 2, to: str | None = None) -> None:
        with pytest.raises(FormatError, match=message):
            convert(source, source.parent / "out", to, pad_tp=gpus)
        assert not (source.parent / "out").exists()

    def test_nothing_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"give --to gemm, gemv or compressed-tensors, --pad-tp"):
            convert(tmp_path, tmp_path / "out")

    def test_it_fits_already(self, tmp_path: Path) -> None:
        padded = convert(tiny.write(tmp_path / "src", version="gemm"), tmp_path / "wide", pad_tp=2)
        self.expect(padded, "2 GPUs can share the weights as they are")

    @pytest.mark.parametrize("gpus", [1, 0, -2])
    def test_no_number_of_gpus(self, tmp_path: Path, gpus: int) -> None:
        self.expect(tiny.write(tmp_path / "src"), "give the number of GPUs", gpus)

    def test_heads_that_do_not_divide(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        self.expect(source, r"4 attention heads don't divide by 8\. --pad-tp 2 works", 8)

    def test_one_group_a_row(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm", group_size=-1)
        self.expect(source, "one scale for all inputs.*--group-size 128")

    def test_a_tensor_nobody_knows(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        tiny.write_tensors(source, tiny.tensors(version="gemm") | {"model.layers.0.mlp.act.scales": torch.ones(192)})
        self.expect(source, "mlp.act.scales is no part")

    def test_a_width_that_is_not_the_configs(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        tiny.edit_json(source / "config.json", intermediate_size=320)
        self.expect(source, "don't have the intermediate size 320")

    def test_onto_itself(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        with pytest.raises(CheckpointError, match="the source"):
            convert(source, source, force=True, pad_tp=2)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_transformers_computes_the_same_logits(tmp_path: Path, version: str) -> None:
    """The embedded model cut to an MLP of three groups, packed, padded and read back by transformers in float64."""
    from toolkit.formats.packing import PackedLinear, dequantize, unpack_gemm, unpack_gemv

    narrow = rounded.narrowed(tmp_path / "narrow", 384, version=version)
    padded = convert(narrow, tmp_path / "padded", pad_tp=2)

    def logits(path: Path) -> torch.Tensor:
        from toolkit.compat import patch_torchvision

        patch_torchvision()
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        checkpoint = Checkpoint.open(path)
        settings = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(settings)).double().eval()
        state = {}
        for name in checkpoint.tensors:
            module, _, part = name.rpartition(".")
            if part == "qweight":
                packed = PackedLinear(*(checkpoint.get(f"{module}.{p}") for p in ("qweight", "qzeros", "scales")))
                layer = unpack_gemm(packed) if version == "gemm" else unpack_gemv(packed, 128)
                state[f"{module}.weight"] = dequantize(layer, torch.float64)
            elif part not in ("qzeros", "scales"):
                state[name] = checkpoint.get(name).double()
        renamed = {
            name.replace("visual.", "model.visual.", 1)
            if name.startswith("visual.")
            else name.replace("model.", "model.language_model.", 1): tensor
            for name, tensor in state.items()
        }
        missing = model.load_state_dict(renamed, strict=False)
        assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
        model.tie_weights()
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=torch.arange(40).reshape(2, 20) + 7, use_cache=False).logits
        return found

    before, after = logits(narrow), logits(padded)
    assert before.std() > 0.1
    # float64 sums longer rows in another order; the terms are the same and the new ones are zero
    assert torch.allclose(before, after, rtol=0, atol=1e-12)
