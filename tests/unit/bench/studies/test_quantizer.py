"""The quantizer's benchmark: its page from results alone, parts that come together, errors of layers, its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.studies.cli import app
from bench.studies.quantizer import results
from bench.studies.quantizer.errors import Call, awq_layer, relative_error, rounded_layer
from bench.studies.quantizer.inputs import padded_batch, prepared, text_manifest, with_channels
from bench.studies.quantizer.page import render
from bench.studies.quantizer.settings import Settings
from tests.support.command import exit_code
from tests.support.short import short_demo
from toolkit.calibration.inputs import PreparedSample
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.errors import BenchError
from toolkit.formats.packing import dequantize, pack_gemm
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.grid import round_to_grid

ABOUT = {"date": "2026-01-02", "device": "a GPU", "versions": {"torch": "2.0"}, "tiny": False, "stock": True}


def run(seconds: list[float], **more: Any) -> dict[str, Any]:
    layers = [{"layer": i, "seconds": {"scale": s / 2, "total": s}} for i, s in enumerate(seconds)]
    return {
        "layers": layers,
        "seconds": {"layers": sum(seconds), "total": sum(seconds) + 1},
        "peak_device_bytes": 9_100_000_000,
        "peak_host_bytes": 500_000_000,
        "calibration": {"samples": 4, "tokens": 2048, "vision_tokens": 1000},
        "planned": {"device_bytes": 9_500_000_000, "host_bytes": 600_000_000, "seconds": 2.0},
        "output_bytes": 7_000_000_000,
        **more,
    }


def speed_part() -> dict[str, Any]:
    shape = {
        "tokens": 2048,
        "samples": 4,
        "held_out_tokens": 512,
        "systems": {
            "ours": run([3.0, 0.5, 0.7]),
            "stock": {**run([40.0, 30.0, 30.0]), "versions": {"autoawq": "0.2.9"}},
        },
        "errors": {"round to nearest": [0.3, 0.2, 0.1], "ours": [0.1, 0.1, 0.05], "stock": [0.2, 0.1, 0.1]},
    }
    return {"about": ABOUT, "group_size": 128, "shapes": {"7b": shape}}


def quality_part() -> dict[str, Any]:
    def method(name: str, kl: float, right: list[int]) -> dict[str, Any]:
        chat_kl = [kl * weight for weight in (0.5, 1.0, 1.5)]
        return {
            "name": name,
            "group_size": 128,
            "right": {"a_task": right},
            "kl": kl,
            "chat_kl": chat_kl,
            "layer_errors": [kl],
        }

    methods = [
        method("round to nearest", 0.004, [1, 0, 1]),
        {"name": "stock AutoAWQ, duo", "group_size": 128, "failed": "AssertionError: nan"},
        method("ours", 0.002, [1, 1, 1]),
    ]
    source = {"right": {"a_task": [1, 1, 0]}, "questions": 3, "chats": 3, "answer_tokens": 9, "error_tokens": 90}
    calibration = {"samples": 4, "tokens": 400}
    return {
        "about": ABOUT,
        "source": source,
        "methods": methods,
        "calibration": calibration,
        "stock": {"device": "a GPU"},
    }


def cost_part() -> dict[str, Any]:
    points = [
        {**run([1.0, s]), "samples": n, "tokens": 512 * n, "weights": 10**6} for n, s in ((1, 0.3), (2, 0.5), (3, 0.7))
    ]
    width = [
        {**run([1.0, s]), "shape": k, "tokens": 512, "weights": w} for k, s, w in (("2b", 0.1, 10), ("7b", 0.9, 30))
    ]
    return {"about": ABOUT, "shape": "7b", "samples": points, "width": width}


def test_the_page_is_made_of_the_results_alone(tmp_path: Path) -> None:
    parts = {
        "speed": speed_part(),
        "full": {"about": ABOUT, **run([1.0, 1.0], wall=41.25)},
        "wide": {"about": ABOUT, **run([9.0, 8.0])},
        "cost": cost_part(),
        "quality": quality_part(),
        "devices": {
            "about": ABOUT,
            "runs": {"0": run([4.0, 4.0], wall=20.0), "0,1": run([2.0, 2.0], wall=10.0)},
            "identical": True,
        },
        "backoff": {
            "about": ABOUT,
            "whole": run([1.0, 1.0]),
            "limits": [{"limit_bytes": 8e9, "notes": ["going on with 2048 tokens"], **run([1.0, 1.5])}],
        },
    }
    text = render(parts, tmp_path).read_text()
    assert (
        "| 7B | ours | 0.60 | 3.00 | 50.0x | 9.1 GB (9.5 GB planned) | 0.50 GB (0.60 GB planned) |" in text
    )  # medians of the later layers
    assert "| 7B | stock | 0.0000" not in text and "**0.6000**" in text and "autoawq 0.2.9" in text
    assert "41.2" in text
    assert "0.100 s + 390.62 s a million tokens, at most 0% off" in text
    assert "failed: AssertionError: nan" in text
    assert "| round to nearest | 128 | 2 | 2 | -1 +1 | 1.00 |" in text
    assert "| round to nearest | 128 | 0.00400 | +0.0" in text  # drifts further than ours: both ends above 0
    assert "Layers 2.00x, whole command 2.00x" in text and "byte for byte" in text
    assert "2026-01-02, a GPU" in text and "Not measured yet" not in text and "--tiny" not in text
    for name in ("speed", "cost", "quality"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    part = speed_part()
    part["about"] = {**ABOUT, "stock": False, "tiny": True}
    del part["shapes"]["7b"]["systems"]["stock"]
    text = render({"speed": part}, tmp_path).read_text()
    assert "Stock AutoAWQ was left out" in text and "--tiny" in text
    assert text.count("Not measured yet") == 6


def test_parts_are_merged_and_replaced(tmp_path: Path) -> None:
    assert results.read(tmp_path) == {}
    results.merge(tmp_path, "speed", {"x": 1})
    results.merge(tmp_path, "full", {"x": 2})
    assert results.merge(tmp_path, "speed", {"x": 3}) == {"speed": {"x": 3}, "full": {"x": 2}} == results.read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(BenchError, match="schema"):
        results.read(tmp_path)


class Scale(nn.Module):
    """A layer that multiplies its input; some layers answer with a tuple."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor, shift: float) -> tuple[torch.Tensor]:
        return (x * self.factor + shift,)


def test_the_relative_error_is_measured_against_what_a_layer_adds() -> None:
    calls: list[Call] = []
    for tokens in (3, 5):
        x = torch.randn(1, tokens, 8)
        calls.append((x, {"shift": 0.0}, x * 3.0))
    assert relative_error(Scale(3.0), calls) == 0.0
    assert relative_error(Scale(3.2), calls) == pytest.approx((0.2 / 2.0) ** 2, rel=1e-5)
    assert relative_error(Scale(1.0), calls) == pytest.approx(1.0)  # a layer that adds nothing


class Block(nn.Module):
    """What a decoder layer's tensors are called, without its arithmetic."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, bias=False)
        for group in ("self_attn", "mlp"):
            setattr(self, group, nn.Module())
        for name in QWEN2_VL.linears:
            owner, _, leaf = name.partition(".")
            self.get_submodule(owner).add_module(leaf, nn.Linear(size, size))


def test_an_awq_layer_has_the_files_weights_norms_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size, group = 64, 32
    truth = Block(size)
    quantized = {name: round_to_grid(torch.randn(size, size), group) for name in QWEN2_VL.linears}
    config = {
        **json.loads((short_demo(tmp_path / "short") / "config.json").read_text()),
        "quantization_config": {"bits": 4, "group_size": group, "quant_method": "awq", "version": "gemm"},
    }
    with CheckpointWriter(tmp_path / "awq") as writer:
        for name, linear in quantized.items():
            packed = pack_gemm(linear)
            for part in ("qweight", "qzeros", "scales"):
                writer.add(f"model.layers.0.{name}.{part}", getattr(packed, part))
            writer.add(f"model.layers.0.{name}.bias", torch.full((size,), 0.5))
        writer.add("model.layers.0.norm.weight", torch.full((size,), 2.0))
        writer.set_config(config)
    layer = awq_layer(truth, Checkpoint.open(tmp_path / "awq"), 0)
    for name, linear in quantized.items():
        assert torch.equal(layer.get_submodule(name).weight, dequantize(linear, torch.float32))
        assert torch.equal(layer.get_submodule(name).bias, torch.full((size,), 0.5))
        rounded = rounded_layer(truth, group).get_submodule(name).weight
        own = truth.get_submodule(name).weight
        assert not torch.equal(rounded, own) and torch.allclose(rounded, own, atol=0.02)
    assert torch.equal(layer.get_submodule("norm").weight, torch.full((size,), 2.0))
    assert torch.equal(truth.get_submodule("norm").weight, torch.ones(size))


def test_samples_are_padded_on_the_left() -> None:
    def sample(ids: list[int], images: int) -> PreparedSample:
        inputs = {"input_ids": torch.tensor([ids])}
        if images:
            inputs |= {"pixel_values": torch.ones(4 * images, 6), "image_grid_thw": torch.ones(images, 3)}
        return PreparedSample(inputs, len(ids), 0, "")

    batch = padded_batch([sample([1, 2, 3], 1), sample([4], 0), sample([5, 6], 2)], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert len(batch["pixel_values"]) == 12 and len(batch["image_grid_thw"]) == 3


def test_text_samples_have_the_tokens_asked_for(tmp_path: Path) -> None:
    settings = Settings(out=str(tmp_path), tiny=True)
    model = short_demo(tmp_path / "short")
    chats = prepared(model, text_manifest(settings, model, 6, seed=1))
    assert [chat.tokens for chat in chats] == [settings.tokens] * 6
    ids = [chat.inputs["input_ids"][0].tolist() for chat in chats]
    other = prepared(model, text_manifest(settings, model, 6, seed=2))
    assert all(chat.inputs["input_ids"][0].tolist() not in ids for chat in other)


def test_channels_are_made_to_differ(tmp_path: Path) -> None:
    source = short_demo(tmp_path / "short")
    before, after = Checkpoint.open(source), Checkpoint.open(with_channels(source, tmp_path / "out"))
    changed = {name for name in before.tensors if not torch.equal(before.get(name), after.get(name))}
    prefix = before.layer_prefix(0)
    wanted = {f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")}
    assert changed == wanted | {f"{before.language_prefix}embed_tokens.weight"}
    up = f"{prefix}mlp.up_proj.weight"
    ratio = after.get(up).float() / before.get(up).float()
    rows = ratio.nanmedian(dim=1).values
    assert rows.log().std() == pytest.approx(0.7, abs=0.15)


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--parts", "sped"], "choose among"), (["--render"], "no results")):
        assert exit_code(app, "quantizer", "--out", tmp_path, *arguments) == 2
        assert words in " ".join(capsys.readouterr().err.split())
