"""GEMM and GEMV hold the same values, and converting back gives the same bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.checkpoint.problems import find_problems
from toolkit.errors import CheckpointError, FormatError, ResourceError
from toolkit.formats.convert import convert
from toolkit.formats.linears import read_quantized
from toolkit.formats.packing import dequantize
from toolkit.models.qwen2_vl import QWEN2_VL


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.get(name) for name in checkpoint.tensors}


def assert_equal(found: Path, expected: Path) -> None:
    a, b = all_tensors(found), all_tensors(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name
    configs = [json.loads((p / "config.json").read_text()) for p in (found, expected)]
    assert configs[0] == configs[1]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The matrices a quantized checkpoint stands for."""
    checkpoint = Checkpoint.open(path)
    info = checkpoint.quantization
    assert info is not None
    found = {}
    for module in checkpoint.quantized_modules():
        found[module] = dequantize(read_quantized(checkpoint, module))
    return found


PAIRS = list(itertools.permutations(LAYOUTS, 2))


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("version", "other"), PAIRS)
@pytest.mark.parametrize(("nested", "shards"), [(False, 1), (True, 3)])
def test_round_trip(tmp_path: Path, version: str, other: str, group_size: int, nested: bool, shards: int) -> None:
    source = tiny.write(tmp_path / "src", version=version, group_size=group_size, nested=nested, shards=shards)
    there = convert(source, tmp_path / "there", other)
    back = convert(there, tmp_path / "back", version)
    info = Checkpoint.open(there).quantization
    assert info is not None
    assert (info.format, info.group_size) == (other, group_size)
    assert_equal(back, source)
    before, after = weights(source), weights(there)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("version", "other"), PAIRS)
def test_linears_in_16_bits_stay(tmp_path: Path, version: str, other: str) -> None:
    left = frozenset({(0, name) for name in QWEN2_VL.linears} | {(1, "self_attn.o_proj")})
    source = tiny.write(tmp_path / "src", version=version, left=left, shards=2)
    there = convert(source, tmp_path / "there", other)
    before, after = Checkpoint.open(source), Checkpoint.open(there)
    assert after.left_linears() == left
    for index, name in left:
        weight = f"{after.layer_prefix(index)}{name}.weight"
        assert torch.equal(before.get(weight), after.get(weight))
    assert find_problems(after) == find_problems(before)
    assert_equal(convert(there, tmp_path / "back", version), source)


def test_everything_else_is_carried_over(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", version="gemm")
    tiny.write_json(source / "qvl.json", {"recipe": {"format": "gemm"}})
    (source / "README.md").write_text("# A card\n")
    there = convert(source, tmp_path / "there", "gemv")
    assert all((there / name).read_bytes() == (source / name).read_bytes() for name in tiny.SIDE_FILES)
    packed = set(Checkpoint.open(source).quantized_modules())
    before, after = all_tensors(source), all_tensors(there)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if n.rpartition(".")[0] not in packed)
    manifest = json.loads((there / "qvl.json").read_text())
    assert manifest["recipe"] == {"format": "gemm"}
    assert [(c["from"], c["to"]) for c in manifest["conversions"]] == [("gemm", "gemv")]
    assert (there / "README.md").read_text().startswith("# A card\n\nRepacked from GEMM to GEMV")
    back = convert(there, tmp_path / "back", "gemm")
    manifest = json.loads((back / "qvl.json").read_text())
    assert [(c["from"], c["to"]) for c in manifest["conversions"]] == [("gemm", "gemv"), ("gemv", "gemm")]


def test_somebody_elses_model_card_stays_behind(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", version="gemm")
    (source / "README.md").write_text("# Qwen2-VL-7B-Instruct-AWQ\n")
    there = convert(source, tmp_path / "there", "gemv")
    assert not (there / "README.md").exists()
    assert json.loads((there / "qvl.json").read_text())["conversions"]


@pytest.mark.parametrize("other", ["gemv", "compressed-tensors"])
def test_a_quantized_lm_head_is_converted_too(tmp_path: Path, other: str) -> None:
    source = tiny.write(tmp_path / "src", version="gemm")
    found = tiny.tensors(version="gemm")
    head = tiny.random_packed("gemm", tiny.HIDDEN, tiny.VOCAB, 64, torch.Generator().manual_seed(1))
    for part in ("qweight", "qzeros", "scales"):
        found[f"lm_head.{part}"] = getattr(head, part)
    tiny.write_tensors(source, found)
    tiny.edit_json(source / "config.json", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    tiny.edit_json(source / "config.json", quantization_config={**config["quantization_config"], "lm_head": True})
    there = convert(source, tmp_path / "there", other)
    words = Checkpoint.open(there).tensors[f"lm_head.{LAYOUTS[other].qweight}"]
    assert words.shape == (tiny.VOCAB, tiny.HIDDEN // 8)
    assert find_problems(Checkpoint.open(there)) == find_problems(Checkpoint.open(source))
    info = Checkpoint.open(there).quantization
    assert info is not None and info.lm_head
    assert_equal(convert(there, tmp_path / "back", "gemm"), source)


class TestRefused:
    def expect(self, tmp_path: Path, src: Path, to: str, message: str, kind: type[Exception] = FormatError) -> None:
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(kind, match=message):
            convert(src, tmp_path / "out", to)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    def test_16_bit_source(self, tmp_path: Path) -> None:
        self.expect(tmp_path, tiny.write(tmp_path / "src"), "gemv", "16-bit weights.*qvl quantize")

    def test_the_layout_it_has(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemv")
        self.expect(tmp_path, source, "gemv", "is in the gemv format already")

    @pytest.mark.parametrize("to", ["marlin", "GEMM", ""])
    def test_unknown_layout(self, tmp_path: Path, to: str) -> None:
        source = tiny.write(tmp_path / "src", version="gemv")
        self.expect(tmp_path, source, to, f"unknown format '{to}': choose gemm, gemv or compressed-tensors")

    def test_missing_source(self, tmp_path: Path) -> None:
        self.expect(tmp_path, tmp_path / "src", "gemv", "no such directory", CheckpointError)

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("scales", (2, 64), r"model\.layers\.0\.self_attn\.q_proj: scales has shape \[2, 64\].*needs \[2, 128\]"),
            ("qzeros", (3, 16), r"q_proj: qzeros has shape \[3, 16\]"),
            ("qweight", (96, 16), "q_proj: its 96 inputs don't divide into groups of 64"),
        ],
    )
    def test_corrupt_shapes(self, tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        found = tiny.tensors(version="gemm")
        key = f"model.layers.0.self_attn.q_proj.{name}"
        found[key] = torch.zeros(shape, dtype=found[key].dtype)
        tiny.write_tensors(source, found)
        self.expect(tmp_path, source, "gemv", message)

    def test_the_layout_is_not_what_the_config_says(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemv")
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"]["version"] = "gemm"
        tiny.write_json(source / "config.json", config)
        self.expect(tmp_path, source, "gemv", "needs")

    def test_missing_zeros(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        found = tiny.tensors(version="gemm")
        del found["model.layers.1.mlp.up_proj.qzeros"]
        tiny.write_tensors(source, found)
        self.expect(tmp_path, source, "gemv", r"layers\.1\.mlp\.up_proj has qweight but no qzeros")

    def test_words_of_another_type(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        found = tiny.tensors(version="gemm")
        name = "model.layers.1.mlp.up_proj.qweight"
        found[name] = found[name].to(torch.int64)
        tiny.write_tensors(source, found)
        self.expect(tmp_path, source, "gemv", r"packed in I64/I32, not int32")

    def test_group_size_without_gemv(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm", group_size=16)
        self.expect(tmp_path, source, "gemv", "the GEMV layout has no group size 16")

    def test_existing_out(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        tiny.write(tmp_path / "out", seed=1)
        self.expect(tmp_path, source, "gemv", "exists already", CheckpointError)
        assert Checkpoint.open(tmp_path / "out").quantization is None
        convert(source, tmp_path / "out", "gemv", force=True)
        assert Checkpoint.open(tmp_path / "out").quantization is not None

    def test_onto_itself(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        with pytest.raises(CheckpointError, match="the source"):
            convert(source, source, "gemv", force=True)
        Checkpoint.open(source)

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tiny.write(tmp_path / "src", version="gemm")
        free = type("usage", (), {"free": 1000})()
        monkeypatch.setattr("shutil.disk_usage", lambda path: free)
        self.expect(tmp_path, source, "gemv", "needs .* bytes and .* has 1,000 free", ResourceError)
