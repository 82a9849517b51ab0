"""Quantization end to end on one or two layers of the embedded model, and every way it refuses."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rounded
from tests.support.forked import fork, wait
from tests.support.short import calibration, short_demo
from tests.support.tiny import files
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.problems import find_problems
from toolkit.compat import patch_torchvision
from toolkit.errors import AlreadyQuantized, CheckpointError, FormatError, ManifestError, ResourceError
from toolkit.formats.convert import convert
from toolkit.formats.linears import read_quantized
from toolkit.formats.packing import PackedLinear, dequantize, unpack_gemm
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize import quantize, run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_demo(tmp_path_factory.mktemp("source") / "short")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="session")
def gemm(tmp_path_factory: pytest.TempPathFactory, source: Path, manifest: Path) -> Path:
    return quantize(str(source), tmp_path_factory.mktemp("gemm") / "out", calib=str(manifest))


def packed(checkpoint: Checkpoint, name: str) -> PackedLinear:
    return PackedLinear(*(checkpoint.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.get(name) for name in checkpoint.tensors}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_output_is_the_source_with_its_linears_packed(source: Path, gemm: Path) -> None:
    before, after = Checkpoint.open(source), Checkpoint.open(gemm)
    linears = {f"{name}.weight" for name in before.linear_names(0)}
    kept = {name for name in before.tensors if name not in linears}
    parts = {f"{name}.{part}" for name in before.linear_names(0) for part in ("qweight", "qzeros", "scales")}
    assert set(after.tensors) == kept | parts
    for name in kept:
        assert after.get(name).dtype == before.get(name).dtype
        if not name.startswith(before.layers_prefix):
            assert torch.equal(after.get(name), before.get(name)), name
    assert after.config == {
        **before.config,
        "quantization_config": {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": ["visual", "model.visual"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
    }
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.json", "generation_config.json"):
        assert (gemm / name).read_bytes() == (source / name).read_bytes()


def test_norm_times_weight_is_what_it_was(source: Path, gemm: Path) -> None:
    """The scales moved from norm to linears cancel: norm x weight differs from the source by rounding alone.

    (Not looked at: up_proj, whose rows down_proj's scales divide.)
    """
    before, after = Checkpoint.open(source), Checkpoint.open(gemm)
    prefix = before.layer_prefix(0)
    for norm, names in (("input_layernorm", QWEN2_VL.linears[:3]), ("post_attention_layernorm", QWEN2_VL.linears[4:5])):
        for name in names:
            true = before.get(f"{prefix}{name}.weight").float() * before.get(f"{prefix}{norm}.weight").float()
            got = (
                dequantize(unpack_gemm(packed(after, prefix + name)), torch.float32)
                * after.get(f"{prefix}{norm}.weight").float()
            )
            error = ((got - true).norm() / true.norm()).item()
            assert 0.01 < error < 0.15, (name, error)


def test_qvl_json_tells_what_was_done(gemm: Path, source: Path, manifest: Path) -> None:
    told = json.loads((gemm / "qvl.json").read_text())
    assert told["source"]["hash"] == Checkpoint.open(source).content_hash()
    assert told["calibration"]["samples"] == 4 and told["calibration"]["vision_tokens"] > 0
    assert told["recipe"]["format"] == "gemm" and told["recipe"]["group_size"] == 128
    assert [layer["layer"] for layer in told["layers"]] == [0]
    measured = json.loads((gemm / "qvl-run.json").read_text())
    assert measured["layers"][0]["seconds"]["total"] > 0 and measured["peak_host_bytes"] > 1e8
    assert 0 < told["layers"][0]["relative_error"] < 0.05
    assert "# " in (gemm / "README.md").read_text()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, gemm: Path, source: Path, manifest: Path) -> None:
    again = quantize(str(source), tmp_path / "again", calib=str(manifest))
    measured = {"qvl-run.json"}
    ours, theirs = (files(directory) for directory in (again, gemm))
    assert ours.keys() == theirs.keys() and {name for name in ours if ours[name] != theirs[name]} <= measured


@pytest.mark.parametrize("form", ["gemv", "compressed-tensors"])
def test_other_formats_hold_the_same_numbers(
    tmp_path: Path, gemm: Path, source: Path, manifest: Path, form: str
) -> None:
    other = Checkpoint.open(quantize(str(source), tmp_path / "other", calib=str(manifest), format=form))
    assert other.quantization is not None and other.quantization.format == form
    for name in other.linear_names(0):
        a, b = read_quantized(other, name), unpack_gemm(packed(Checkpoint.open(gemm), name))
        assert torch.equal(a.values, b.values) and torch.equal(a.zeros, b.zeros) and torch.equal(a.scales, b.scales)
    converted = Checkpoint.open(convert(gemm, tmp_path / "converted", form))
    assert other.config == converted.config and find_problems(other) == find_problems(converted)


def test_names_and_config_of_transformers_5_are_kept(tmp_path: Path, gemm: Path, source: Path, manifest: Path) -> None:
    patch_torchvision()
    from transformers import AutoConfig

    flat = Checkpoint.open(source)
    AutoConfig.from_pretrained(source).save_pretrained(tmp_path / "config")
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    assert "text_config" in config
    with CheckpointWriter(tmp_path / "nested") as writer:
        for name in flat.tensors:
            inner = (
                f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
            )
            writer.add(inner, flat.get(name))
        writer.copy_side_files(source)
        writer.set_config(config)
    out = Checkpoint.open(quantize(str(tmp_path / "nested"), tmp_path / "out", calib=str(manifest)))
    assert out.layers_prefix == "model.language_model.layers."
    assert {**out.config, "quantization_config": None} == {**config, "quantization_config": None}
    name = "0.mlp.down_proj.qweight"
    assert torch.equal(out.get(out.layers_prefix + name), Checkpoint.open(gemm).get("model.layers." + name))


def changed(source: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor], **config: Any) -> Path:
    """Write a checkpoint whose tensors went through ``change``."""
    checkpoint = Checkpoint.open(source)
    with CheckpointWriter(out) as writer:
        for name in checkpoint.tensors:
            writer.add(name, change(name, checkpoint.get(name)))
        writer.copy_side_files(source)
        writer.set_config({**checkpoint.config, **config})
    return out


def test_an_fp32_source_is_written_in_16_bits(
    tmp_path: Path, gemm: Path, source: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = changed(source, tmp_path / "wide", lambda _, tensor: tensor.float(), torch_dtype="float32")
    out = quantize(str(wide), tmp_path / "out", calib=str(manifest))
    assert same(tensors(out), tensors(gemm))
    assert Checkpoint.open(out).config["torch_dtype"] == "float16"
    assert "fp32 weights" in (told := capsys.readouterr().err) and "is written as fp16" in told
    # what stays in 16 bits by wish, too
    left = Checkpoint.open(quantize(str(wide), tmp_path / "left", calib=str(manifest), skip="down_proj"))
    assert {tensor.dtype for tensor in left.tensors.values()} == {"F16", "I32"}


@pytest.mark.parametrize("name", ["visual.merger.mlp.0.bias", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_nan_is_found_before_anything_is_written(tmp_path: Path, source: Path, manifest: Path, name: str) -> None:
    def spoilt(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if key != name else tensor.clone().index_fill_(0, torch.tensor([3]), float("nan"))

    broken = changed(source, tmp_path / "broken", spoilt)
    with pytest.raises(CheckpointError, match=rf"NaN or infinite: {re.escape(name)} \("):
        quantize(str(broken), tmp_path / "out", calib=str(manifest))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    patch_torchvision()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    directory = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(directory)
    return directory


def test_a_whole_row_as_one_group(tmp_path: Path, source: Path, manifest: Path) -> None:
    out = Checkpoint.open(quantize(str(source), tmp_path / "out", calib=str(manifest), group_size=-1))
    assert out.quantization is not None and out.quantization.group_size == -1
    assert out.tensors["model.layers.0.mlp.down_proj.scales"].shape == (1, 256)


def test_an_adapter_is_merged_first(tmp_path: Path, source: Path, manifest: Path, adapter: Path) -> None:
    from safetensors.torch import load_file

    from toolkit.sources.adapter import merge

    base = Checkpoint.open(source)
    merged = Checkpoint.open(merge(base, adapter, tmp_path / "merged"))
    lora = load_file(adapter / "adapter_model.safetensors")
    key = next(k for k in lora if "down_proj.lora_A" in k)
    delta = 2.0 * lora[key.replace("lora_A", "lora_B")] @ lora[key]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(merged.get(name).float(), base.get(name).float() + delta, atol=2e-3)
    assert torch.equal(merged.get("visual.merger.mlp.0.weight"), base.get("visual.merger.mlp.0.weight"))
    direct = quantize(str(source), tmp_path / "direct", calib=str(manifest), adapter=adapter)
    assert same(tensors(direct), tensors(quantize(str(merged.path), tmp_path / "two", calib=str(manifest))))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["direct", "merged", "two"]


def test_an_adapter_that_trains_the_head_and_brings_a_template(
    tmp_path: Path, source: Path, manifest: Path, adapter: Path
) -> None:
    from safetensors.torch import load_file, save_file

    lora = tmp_path / "lora"
    lora.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    head = Checkpoint.open(source).get("model.embed_tokens.weight") * 2
    found = load_file(adapter / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": head}
    save_file(found, lora / "adapter_model.safetensors")
    template = json.loads((source / "chat_template.json").read_text())["chat_template"] + "\n"
    (lora / "chat_template.jinja").write_text(template)
    out = Checkpoint.open(quantize(str(source), tmp_path / "out", calib=str(manifest), adapter=lora))
    assert not out.tied_lm_head and torch.equal(out.get("lm_head.weight"), head)
    assert (out.path / "chat_template.jinja").read_text() == template
    assert not (out.path / "chat_template.json").exists()


def test_an_adapter_that_is_none(tmp_path: Path, source: Path, manifest: Path, adapter: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        quantize(str(source), tmp_path / "out", calib=str(manifest), adapter=tmp_path / "empty")
    other = short_demo(tmp_path / "other", layers=1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    (broken / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit"):
        quantize(str(other), tmp_path / "out", calib=str(manifest), adapter=broken)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"format": "marlin"}, FormatError, "unknown format 'marlin': choose gemm"),
        ({"bits": 3}, FormatError, "4-bit values only"),
        ({"group_size": 100}, FormatError, "group size 100 is not one .* use 32, 64, 128, -1"),
        ({"scaling": "trio"}, FormatError, "choose plain or duo"),
        ({"rounding": "up"}, FormatError, "choose nearest or compensated"),
        ({"search": "autoawq", "rounding": "compensated"}, FormatError, "AutoAWQ's search rounds to nearest"),
        ({"effort": "most"}, FormatError, "choose fast or best"),
        ({"effort": "best", "devices": "cpu,cpu"}, FormatError, "devices can't share the layers out: choose one of"),
        ({"effort": "best", "layers_report": "l.json"}, FormatError, "make the report with --effort fast"),
        ({"skip": "("}, FormatError, "regular expression"),
        ({"samples": 0}, ManifestError, "at least 1"),
        ({"devices": "abacus"}, ResourceError, "unknown device 'abacus'"),
        ({"devices": "meta"}, ResourceError, "not supported"),
        ({"max_tokens": 3}, ManifestError, "no sample of .* is within 3 tokens"),
        ({"calib": "absent.jsonl"}, ManifestError, "no calibration manifest"),
    ],
)
def test_bad_settings_leave_nothing(
    tmp_path: Path, source: Path, manifest: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(str(source), tmp_path / "out", **{"calib": str(manifest), **settings})
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_does_not_divide_names_the_layer(tmp_path: Path, manifest: Path) -> None:
    source = rounded.narrowed(tmp_path / "odd", 448, None)
    with pytest.raises(FormatError, match=r"128 does not divide the 448 inputs of model\.layers\.0\.mlp\.down_proj: "):
        quantize(str(source), tmp_path / "out", calib=str(manifest))
    with pytest.raises(FormatError, match="use 32, 64, -1"):
        quantize(str(source), tmp_path / "out", calib=str(manifest))


def test_a_quantized_source_is_refused(tmp_path: Path, gemm: Path, manifest: Path) -> None:
    with pytest.raises(AlreadyQuantized, match=r"quantized already.*qvl convert"):
        quantize(str(gemm), tmp_path / "out", calib=str(manifest))


def test_an_existing_output_needs_force(tmp_path: Path, source: Path, manifest: Path, gemm: Path) -> None:
    out = tmp_path / "out"
    short_demo(out)
    before = tensors(out)
    with pytest.raises(CheckpointError, match="--force"):
        quantize(str(source), out, calib=str(manifest))
    assert same(tensors(out), before)
    quantize(str(source), out, calib=str(manifest), force=True)
    assert same(tensors(out), tensors(gemm))


def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = short_demo(tmp_path / "in")
    search = run.search_shares

    def then_replaced(*args: Any) -> Any:
        outcome = search(*args)
        (source / "model.safetensors").touch()
        return outcome

    monkeypatch.setattr(run, "search_shares", then_replaced)
    with pytest.raises(CheckpointError, match="were replaced during the run"):
        quantize(str(source), tmp_path / "out", calib=str(manifest))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_command_line_says_one_thing_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "toolkit.cli", "quantize", "--model", str(tmp_path), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


class Refused:
    """A finder that refuses to import AutoAWQ."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "awq":
            raise ImportError("awq is not to be imported")


def quantize_without_awq(*args: Any, **settings: Any) -> None:
    """As if nothing of AutoAWQ, and nothing that quantizes, had been imported."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "awq" or name.startswith("toolkit.quantize"):
            del sys.modules[name]
    sys.meta_path.insert(0, Refused())
    importlib.import_module("toolkit.quantize").quantize(*args, **settings)
    assert not any(name.partition(".")[0] == "awq" for name in sys.modules)


@pytest.mark.slow
def test_the_default_search_does_without_autoawq(tmp_path: Path, source: Path, manifest: Path, gemm: Path) -> None:
    assert wait(fork(quantize_without_awq, str(source), tmp_path / "out", calib=str(manifest))) == 0
    assert same(tensors(tmp_path / "out"), tensors(gemm))


def test_a_plan_that_does_not_fit_has_the_figures(source: Path, tmp_path: Path) -> None:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.quantize.plan import make_plan
    from toolkit.quantize.recipe import Recipe

    checkpoint = Checkpoint.open(source)
    cpu = torch.device("cpu")
    small = make_plan(checkpoint, Recipe(), [PreparedSample({}, 100, 0, "")] * 10, cpu)
    assert all("needs" in line and "free" in line for line in small.check(tmp_path / "o", cpu))
    huge = make_plan(checkpoint, Recipe(), [PreparedSample({}, 10**9, 0, "")] * 10, cpu)
    with pytest.raises(ResourceError, match=r"not enough host memory: needs [\d.]+ GB, [\d.]+ GB free: use fewer"):
        huge.check(tmp_path / "o", cpu)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_told_before_the_work(tmp_path: Path, source: Path, manifest: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ResourceError, match=r"not enough disk: needs [\d.]+ GB"):
            quantize(str(source), disk / "out", calib=str(manifest))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_autoawqs_search_makes_the_same_kind_of_checkpoint(
    tmp_path: Path, source: Path, manifest: Path, gemm: Path
) -> None:
    out = quantize(str(source), tmp_path / "out", calib=str(manifest), search="autoawq", scaling="duo")
    a, b = tensors(out), tensors(gemm)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    errors = [json.loads((d / "qvl.json").read_text())["layers"][0]["relative_error"] for d in (out, gemm)]
    assert errors[1] < errors[0] < 0.02


def test_layers_in_16_bits(tmp_path: Path, manifest: Path) -> None:
    """By a pattern, and by a report of which hurt most; what is left is the source's, and said to engines."""
    source = short_demo(tmp_path / "in", layers=2)
    report = tmp_path / "layers.json"
    out = quantize(str(source), tmp_path / "a", calib=str(manifest), skip=r"layers\.0\.mlp", layers_report=report)
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    for name in ("gate_proj", "up_proj", "down_proj"):
        kept = f"{before.layer_prefix(0)}mlp.{name}.weight"
        assert torch.equal(after.get(kept), before.get(kept))
    norm = f"{before.layer_prefix(0)}post_attention_layernorm.weight"
    assert torch.equal(after.get(norm), before.get(norm))
    assert "layers.0.mlp.down_proj" in after.config["quantization_config"]["modules_to_not_convert"]
    told = json.loads(report.read_text())
    assert report.with_suffix(".png").stat().st_size > 10_000
    assert [set(layer["error"]) for layer in told["layers"]] == [{"rtn", "autoawq", "moments"}] * 2
    assert told["sums"]["moments"] < told["sums"]["autoawq"] < told["sums"]["rtn"]

    quantize(str(source), tmp_path / "b", calib=str(manifest), layers_report=report)
    worst = max(json.loads(report.read_text())["layers"], key=lambda layer: layer["error"]["moments"])["layer"]
    mixed = Checkpoint.open(quantize(str(source), tmp_path / "c", calib=str(manifest), from_report=report, budget=0.05))
    plain = Checkpoint.open(tmp_path / "b")
    assert plain.nbytes < mixed.nbytes <= plain.nbytes * 1.05
    left = [n for n in mixed.linear_names(worst) if f"{n}.weight" in mixed.tensors]
    assert left and all(torch.equal(mixed.get(f"{n}.weight"), before.get(f"{n}.weight")) for n in left)


def test_a_dry_run_says_what_is_needed_and_writes_nothing(
    tmp_path: Path, source: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(str(source), tmp_path / "out", calib=str(manifest), dry_run=True)
    told = capsys.readouterr().err
    assert "host memory: needs" in told and "time" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_that_share_the_layers_write_the_same_bytes(tmp_path: Path, manifest: Path) -> None:
    source = short_demo(tmp_path / "in", layers=3, halved=True)
    one = quantize(str(source), tmp_path / "one", calib=str(manifest), devices="cpu")
    two = quantize(str(source), tmp_path / "two", calib=str(manifest), devices="cpu,cpu")
    a, b = files(one), files(two)
    assert a.keys() == b.keys() and {name for name in a if a[name] != b[name]} == {"qvl-run.json"}


def test_balance_by_modality_is_told(tmp_path: Path, source: Path, manifest: Path) -> None:
    out = quantize(str(source), tmp_path / "out", calib=str(manifest), balance="modality")
    told = json.loads((out / "qvl.json").read_text())
    assert len(told["vision_sensitivity"]) == 1 and told["recipe"]["balance"] == "modality"
