"""Distillation as a step of a run: what it changes in the file, what it leaves, and a run that is stopped in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.short import calibration, short_demo
from tests.support.tiny import files
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.formats.linears import read_quantized
from toolkit.quantize import parts, quantize
from toolkit.quantize.distillation import stage, train
from toolkit.quantize.distillation.plan import DistillationPlan
from toolkit.quantize.distillation.train import Rates


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_demo(tmp_path_factory.mktemp("source") / "short", layers=2)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a quick search that leaves one linear in 16 bits."""
    manifest = calibration(tmp_path_factory.mktemp("calibration"))
    return {"calib": str(manifest), "rounding": "nearest", "clip": False, "skip": r"1\.self_attn\.o_proj"}


@pytest.fixture(autouse=True)
def learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples are learnt by heart, which this lets count."""
    monkeypatch.setattr(stage, "RATES", Rates(scales=3e-3, norms=3e-3, biases=3e-3, epochs=3))
    monkeypatch.setattr(train, "apart", lambda lengths: (list(range(len(lengths))),) * 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, source: Path, settings: dict[str, Any]) -> Path:
    return quantize(str(source), tmp_path_factory.mktemp("plain") / "out", distill=False, **settings)


def told(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "qvl.json").read_bytes())
    return found


@pytest.mark.parametrize("form", ["gemm", "gemv", "compressed-tensors"])
def test_scales_norms_and_biases_change_and_nothing_else(
    form: str, source: Path, plain: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    out = quantize(str(source), tmp_path / "out", distill=True, format=form, **settings)
    before, after = Checkpoint.open(plain), Checkpoint.open(out)
    linears = {name for index in range(2) for name in before.linear_names(index) if before.is_packed(name)}
    assert len(linears) == 13
    moved = 0
    for name in linears:
        a, b = read_quantized(before, name), read_quantized(after, name)
        assert torch.equal(a.values, b.values) and torch.equal(a.zeros, b.zeros) and b.scales.dtype == torch.float16
        moved += not torch.equal(a.scales, b.scales)
    assert moved == 13
    others = [n for n in before.tensors if n in after.tensors and n.rpartition(".")[0] not in linears]
    changed = {n for n in others if not torch.equal(before.get(n), after.get(n))}
    norms = {f"{before.layer_prefix(i)}{norm}.weight" for i in range(2) for norm in before.family.norms}
    assert changed == norms and all(before.get(n).dtype == after.get(n).dtype for n in others)
    biases = [n for n in before.tensors if n.endswith(".bias") and n.rpartition(".")[0] in linears]
    assert biases and all(not torch.equal(before.get(n), after.get(n)) for n in biases)
    found = told(out)["distillation"]
    assert found["held_back_kl"][found["taken"]] < found["held_back_kl"][0] and found["samples_held_back"] == 4
    assert "seconds" not in found and json.loads((out / "qvl-run.json").read_bytes())["distillation"]["seconds"] > 0
    assert told(plain)["distillation"] is None and not told(plain)["recipe"]["distill"]


def test_stopped_between_two_layers_it_ends_in_the_same_bytes(
    source: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(str(source), tmp_path / "whole", distill=True, **settings)
    write, distilled, runs = parts.write_layer, train.distill, []

    def stop(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    def counted(*arguments: Any) -> Any:
        runs.append(arguments)
        return distilled(*arguments)

    monkeypatch.setattr(stage, "distill", counted)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_layer", stop)
        for _ in range(2):  # the first layer, then the second
            with pytest.raises(KeyboardInterrupt):
                quantize(str(source), tmp_path / "out", distill=True, **settings)
    out = quantize(str(source), tmp_path / "out", distill=True, **settings)
    assert len(runs) == 1, "what was learned is kept"
    ours, theirs = files(out), files(whole)
    assert ours.keys() == theirs.keys() and {n for n in ours if ours[n] != theirs[n]} <= {"qvl-run.json"}


def test_where_it_does_not_fit_it_is_left_out_and_said(
    source: Path,
    plain: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from toolkit.quantize import plan

    small = DistillationPlan(0, 0, True, 0.0, "it takes 60 GB of GPU memory, and there are 24 GB")
    monkeypatch.setattr(plan, "plan_distillation", lambda *_, **__: small)
    quantize(str(source), tmp_path / "dry", distill=True, dry_run=True, **settings)
    assert "distillation: left out, it takes 60 GB of GPU memory" in " ".join(capsys.readouterr().err.split())
    out = quantize(str(source), tmp_path / "out", distill=True, **settings)
    assert "distillation is left out: it takes 60 GB of GPU memory" in " ".join(capsys.readouterr().err.split())
    assert told(out)["distillation"] == {"left_out": small.left_out}
    weights = {name: data for name, data in files(plain).items() if name.endswith(".safetensors")}
    assert weights and all(files(out)[name] == data for name, data in weights.items())


def test_of_one_sample_none_can_be_held_back(source: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    out = quantize(str(source), tmp_path / "out", distill=True, samples=1, **settings)
    assert told(out)["distillation"] == {"left_out": "of one sample none can be held back"}
