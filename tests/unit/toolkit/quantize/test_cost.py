"""What quantizing costs in KL, against transformers' own model of the same weights; and what the verdict says of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.short import calibration, short_demo
from toolkit.calibration.inputs import PreparedSample
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.fidelity.answers import final_states, kl_by_answer, predictions
from toolkit.fidelity.turns import Turns
from toolkit.formats.reference import load_reference
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize import cost as costs
from toolkit.quantize import quantize
from toolkit.quantize.progress import RunProgress
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.samples import Calibration, prepare_samples

CPU = torch.device("cpu")


class Kept:
    """A run's finished layers, kept from being removed with the run's work."""

    written: costs.Written


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_demo(tmp_path_factory.mktemp("cost-source") / "short", layers=2, blocks=1, halved=True)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("cost-calibration"), samples=6)


@pytest.fixture(scope="module")
def sampled(source: Path, manifest: Path) -> Calibration:
    return prepare_samples(Checkpoint.open(source), Recipe(calib=str(manifest)), RunProgress())


@pytest.fixture(scope="module")
def run(source: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A run with a report: the checkpoint, the journal's parts as they were, and what it wrote of the cost."""
    import shutil

    kept = tmp_path_factory.mktemp("parts")
    out = tmp_path_factory.mktemp("cost") / "out"
    measure = costs.cost_of_all

    def keeping(written: costs.Written, *rest: Any) -> costs.Cost:
        shutil.copytree(written.parts.directory, kept, dirs_exist_ok=True)
        return measure(written, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "cost_of_all", keeping)
        quantize(
            str(source), out, calib=str(manifest), group_size=32, vision="awq", layers_report=out.with_name("r.json")
        )
    return out, kept, json.loads((out / "qvl-run.json").read_text())["cost"]


def by_transformers(model: Any, reference: Any, samples: list[PreparedSample], turns: Turns) -> list[float]:
    positions = [predictions(sample, turns) for sample in samples]
    states = [final_states(m, samples, positions) for m in (reference, model)]
    return [float(kl.sum()) for kl in kl_by_answer(states[0], states[1], reference.lm_head.weight)]


def test_the_whole_costs_what_transformers_says(
    source: Path, run: tuple[Path, Path, dict[str, Any]], sampled: Calibration
) -> None:
    out, _, cost = run
    held = costs.held_out(sampled.samples)
    assert 0 < len(held) < len(sampled.samples)
    expected = by_transformers(
        load_reference(Checkpoint.open(out)), load_reference(Checkpoint.open(source)), held, sampled.turns
    )
    assert cost["all"]["sums"] == pytest.approx(expected, rel=0.02, abs=1e-6)
    assert sum(expected) > 1e-5


def test_a_unit_costs_what_it_brings_alone(
    source: Path, run: tuple[Path, Path, dict[str, Any]], sampled: Calibration
) -> None:
    _, kept, cost = run
    checkpoint = Checkpoint.open(source)
    written = costs.Written(checkpoint, Recipe(group_size=32), kept, frozenset())
    reference = load_reference(Checkpoint.open(source))
    samples = costs.spread(sampled.samples)
    for layer, unit in ((0, "mlp.gate_up_proj"), (1, "self_attn.o_proj")):
        model = copy.deepcopy(reference)
        for name, weight in written.units(layer, CPU)[unit].items():
            model.model.language_model.layers[layer].get_submodule(name).weight.data = weight
        sums = by_transformers(model, reference, samples, sampled.turns)
        mean = sum(sums) / cost["units"]["tokens"]
        assert cost["units"]["kl"][f"{layer}/{unit}"] == pytest.approx(mean, rel=0.02)
    assert set(cost["units"]["kl"]) == {f"{i}/{unit}" for i in range(2) for unit in QWEN2_VL.fused}


def test_rounds_of_few_ways_give_the_same(
    source: Path, run: tuple[Path, Path, dict[str, Any]], sampled: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kept, cost = run
    monkeypatch.setattr(costs, "_WAYS_BYTES", {"cpu": 1})
    written = costs.Written(Checkpoint.open(source), Recipe(group_size=32), kept, frozenset())
    found = costs.cost_of_units(written, costs.spread(sampled.samples), sampled.turns, CPU)
    assert {f"{i}/{unit}": kl for (i, unit), kl in found.units.items()} == pytest.approx(cost["units"]["kl"], rel=1e-3)


def test_scales_are_taken_out_of_a_units_weights(source: Path, run: tuple[Path, Path, dict[str, Any]]) -> None:
    """Each unit's weights are near the source's, however it and those before it were scaled."""
    _, kept, _ = run
    checkpoint = Checkpoint.open(source)
    written = costs.Written(checkpoint, Recipe(group_size=32), kept, frozenset())
    for index in range(2):
        for weights in written.units(index, CPU).values():
            for name, weight in weights.items():
                true = checkpoint.get(f"{checkpoint.layer_prefix(index)}{name}.weight").float()
                assert float((weight - true).square().mean() / true.square().mean()) < 0.03


def test_the_report_says_it_and_the_verdict_too(
    source: Path,
    manifest: Path,
    run: tuple[Path, Path, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, _, cost = run
    report = json.loads(out.with_name("r.json").read_text())
    assert report["layers"][1]["units"]["mlp.down_proj"]["kl"] == cost["units"]["kl"]["1/mlp.down_proj"]
    mixed = quantize(
        str(source),
        tmp_path / "mixed",
        calib=str(manifest),
        group_size=32,
        from_report=out.with_name("r.json"),
        budget=0.1,
    )
    said = " ".join(capfd.readouterr().err.split())
    assert "size: " in said and "of the source's" in said
    assert "KL from the source on" in said and "that the search was not made from" in said
    assert "largest output errors: layers" in said
    assert "rank" not in said  # the report has KL: no warning
    left = Checkpoint.open(mixed).left_linears()
    dearest = max(cost["units"]["kl"], key=lambda key: cost["units"]["kl"][key])
    assert left
    assert all((layer, name) not in left or name for layer, name in left), dearest


def test_no_verdict_measures_nothing(source: Path, manifest: Path, tmp_path: Path) -> None:
    out = quantize(str(source), tmp_path / "out", calib=str(manifest), group_size=32, verdict=False)
    assert json.loads((out / "qvl-run.json").read_text())["cost"] == {}
