"""What fits a card: the terms that were measured, and how the sum moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.plan.capacity import capacity, need, shape, weight_bytes
from serve.plan.load import Load
from tests.support import tiny
from tests.support.paths import RESULTS
from toolkit import console
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.engines import tensor_parallel
from toolkit.cli import app
from toolkit.errors import FormatError, ResourceError
from toolkit.models.families import SIZES

GIB = 1 << 30
H100 = ("7b-awq-qvl-against-bf16", "7b-awq-qvl-against-awq", "2b-awq-qvl-against-bf16")


# What vLLM 0.25.1 reported on an H100: docs/results/h100.
@pytest.mark.parametrize(
    ("name", "quantized", "reported"),
    [("2b", False, 4.26), ("2b", True, 2.39), ("7b", False, 15.6), ("7b", True, 6.65)],
)
def test_weights_are_what_vllm_reported(name: str, quantized: bool, reported: float) -> None:
    assert need(shape(name, quantized), 80 * GIB, Load()).weights / GIB == pytest.approx(reported, rel=0.03)


def test_parameters_of_the_shapes() -> None:
    # the hub's safetensors count 2,208,985,600, 8,291,375,616 and 73,405,560,320 parameters
    counts = {"2b": 2_208_985_600, "7b": 8_291_375_616, "72b": 73_405_560_320}
    for name, count in counts.items():
        assert sum(t.numel for t in shape(name, False).tensors.values()) == count


def test_a_shape_is_a_checkpoint_like_any_other() -> None:
    assert tensor_parallel(shape("72b", True))[2] is not None
    assert tensor_parallel(shape("7b", True))[4] is None
    with pytest.raises(FormatError, match="unknown shape '5b'"):
        shape("5b", False)


def test_weights_of_files(tmp_path: Path) -> None:
    plain = Checkpoint.open(tiny.write(tmp_path / "a"))
    assert weight_bytes(plain) == plain.nbytes
    packed = Checkpoint.open(tiny.write(tmp_path / "b", version="gemm"))
    assert weight_bytes(packed) == packed.nbytes


def test_what_fits_which_card() -> None:
    def fits(name: str, quantized: bool, card: int, **load: int) -> bool:
        return capacity(shape(name, quantized), card * GIB, Load(**load), name).fits

    assert not fits("7b", False, 16) and fits("7b", True, 16) and fits("7b", False, 24)
    assert not fits("72b", True, 40) and fits("72b", True, 80) and not fits("72b", False, 80)
    assert fits("72b", False, 80, tp=4)


def test_the_sum() -> None:
    found = capacity(shape("7b", True), 24 * GIB, Load(share=0.8), "7b")
    assert found.need.total + found.kv_bytes == int(24 * GIB * 0.8)
    assert found.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert found.concurrency == found.kv_tokens // found.context


@pytest.mark.parametrize("name", list(SIZES))
def test_more_is_never_less(name: str) -> None:
    model = shape(name, True)
    for small, large in zip((44, 48, 60), (48, 60, 80), strict=True):
        assert capacity(model, small * GIB, Load(max_num_seqs=64, max_num_batched_tokens=2048), name).kv_tokens <= (
            capacity(model, large * GIB, Load(max_num_seqs=64, max_num_batched_tokens=2048), name).kv_tokens
        )
    base = need(model, 80 * GIB, Load()).activations
    assert need(model, 80 * GIB, Load(max_num_seqs=4096)).activations > base
    assert need(model, 80 * GIB, Load(max_num_batched_tokens=65536)).activations > base
    modest = Load(image_pixels=1280 * 784, max_num_seqs=16, max_num_batched_tokens=2048)
    assert need(model, 80 * GIB, modest).activations < base / 3


def test_tensor_parallel_shares_weights_and_cache() -> None:
    one, four = (capacity(shape("7b", True), 24 * GIB, Load(tp=tp), "7b") for tp in (1, 4))
    assert four.need.weights < one.need.weights / 3
    assert four.kv_bytes_per_token == one.kv_bytes_per_token // 4


def test_no_card() -> None:
    with pytest.raises(ResourceError, match="give its memory in GiB"):
        capacity(shape("2b", False), 1000, Load(), "2b")


class TestVerb:
    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console.out, "width", 160)

    def run(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["plan", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    def test_the_table(self) -> None:
        code, shown = self.run("--gpu-memory", "16")
        assert code == 0
        line = next(line for line in shown.splitlines() if "7b" in line and "fp16" in line)
        assert "no" in line
        assert "estimate" in shown

    def test_json(self) -> None:
        found = json.loads(self.run("7b", "--gpu-memory", "16,24", "--json")[1])
        assert [(row["card_bytes"], row["format"], row["fits"]) for row in found] == [
            (16 * GIB, "fp16", False),
            (16 * GIB, "awq", True),
            (24 * GIB, "fp16", True),
            (24 * GIB, "awq", True),
        ]
        assert found[0]["quantize"] is None
        # docs/results: 7.0 to 7.8 GB measured on the GPU with the states on it, which take 0.9 GB of that
        assert found[1]["quantize"]["gpu_bytes"] == pytest.approx(7.0e9, rel=0.15)

    def test_a_directory(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m", version="gemm")
        (row,) = json.loads(self.run(str(path), "--gpu-memory", "16", "--json")[1])
        assert row["format"] == "awq" and row["quantize"] is None

    @pytest.mark.parametrize("sizes", ["", "x", "16,", "-1", "nan", "0.5", "inf"])
    def test_no_size(self, sizes: str) -> None:
        with pytest.raises(ResourceError, match="--gpu-memory"):
            self.run("7b", "--gpu-memory", sizes)

    def test_no_model(self) -> None:
        with pytest.raises(FormatError, match=r"9b is neither one of 2b, 7b, 72b, qwen2.5-vl-3b, .* nor a directory"):
            self.run("9b")
        with pytest.raises(ResourceError, match="share"):
            self.run("7b", "--gpu-memory-utilization", "1.5")


def test_the_sum_is_what_servers_took() -> None:
    """Of vLLM 0.32, on an H100, by the driver: the reports have it. Each had 256 sequences of 4,096 tokens."""
    load = Load(context=4096, image_pixels=1280 * 28 * 28, max_num_seqs=256)
    for name in H100:
        size = name.partition("-")[0]
        systems = json.loads((RESULTS / "h100" / name / "report.json").read_text())["systems"]
        for system in systems.values():
            model = shape(size, "awq" in system["label"])
            planned = need(model, 81559 << 20, load).total + {"7b": 4, "2b": 2}[size] * GIB
            assert planned == pytest.approx(system["memory"]["gpu_bytes"], rel=0.04), system["label"]
