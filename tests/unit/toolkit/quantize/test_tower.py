"""The vision tower in 4 bits: what is written stands for what transformers computes, and a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.short import calibration, short_demo
from tests.support.tiny import files
from toolkit.calibration.inputs import PreparedSample
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.errors import ManifestError
from toolkit.formats.convert import convert
from toolkit.formats.linears import read_tensor
from toolkit.formats.reference import load_reference
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize import plan, quantize, tower
from toolkit.quantize.progress import RunProgress
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.samples import prepare_samples
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.strategy import SearchSettings
from toolkit.quantize.search.tower import CentredMoments, TowerSearch
from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.tower import TowerStream

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_demo(tmp_path_factory.mktemp("tower-source") / "short", blocks=2, halved=True)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("tower-calibration"), samples=12)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, source: Path, manifest: Path) -> Path:
    out = tmp_path_factory.mktemp("tower") / "out"
    return quantize(str(source), out, calib=str(manifest), group_size=32, vision="awq")


@pytest.fixture(scope="session")
def samples(source: Path, manifest: Path) -> list[PreparedSample]:
    return prepare_samples(Checkpoint.open(source), Recipe(calib=str(manifest)), RunProgress()).samples


def merged(model: Any, samples: list[PreparedSample]) -> torch.Tensor:
    """What the tower makes of the samples' images."""
    images = [sample.inputs for sample in samples if "pixel_values" in sample.inputs]
    with torch.no_grad():
        outputs = [model.model.visual(i["pixel_values"].float(), grid_thw=i["image_grid_thw"]) for i in images]
    return torch.cat([output.pooler_output for output in outputs])


def test_every_linear_of_the_tower_is_packed(source: Path, made: Path) -> None:
    before, after = Checkpoint.open(source), Checkpoint.open(made)
    modules = QWEN2_VL.tower.modules(before.vision)
    assert set(after.packed_tower()) == set(modules)
    assert after.config["quantization_config"]["modules_to_not_convert"] == [
        "visual.patch_embed",
        "model.visual.patch_embed",
    ]
    inspection = inspect_checkpoint(made)
    assert inspection.problems == []
    quantization = inspection.quantization
    assert quantization is not None
    assert quantization["quantized"]["vision attn.qkv"] == before.vision.depth
    assert "vision" not in quantization["left"]
    stages = json.loads((made / "qvl.json").read_text())["vision"]
    assert [stage["stage"] for stage in stages][-2:] == ["visual.blocks.1", "visual.merger"]
    assert len(json.loads((made / "qvl.json").read_text())["layers"]) == 1


def test_the_tower_sees_what_its_source_sees(source: Path, made: Path, samples: list[PreparedSample]) -> None:
    """Read back by transformers it is near the source's, and nearer than by rounding to nearest."""
    model = load_reference(Checkpoint.open(source))
    true = merged(model, samples)
    found = merged(load_reference(Checkpoint.open(made)), samples)
    for name in QWEN2_VL.tower.modules(Checkpoint.open(source).vision):
        linear = model.model.visual.get_submodule(name)
        rounded = round_to_grid(linear.weight.data, 32)
        groups = rounded.values.float().view(*rounded.scales.shape, -1) - rounded.zeros.float().unsqueeze(-1)
        linear.weight.data = (groups * rounded.scales.float().unsqueeze(-1)).view(linear.weight.shape)
    nearest = merged(model, samples)
    error, limit = (float((x - true).square().mean() / true.square().mean()) for x in (found, nearest))
    assert error < 0.9 * limit
    assert error < 0.01


def test_streamed_blocks_are_the_tower(source: Path, samples: list[PreparedSample]) -> None:
    stream = TowerStream(Checkpoint.open(source), CPU)
    seen = [sample for sample in samples if "pixel_values" in sample.inputs]
    calibration_, held = stream.patches(seen[:1], CPU)
    passing = LayerStream({}, (160, 640), CPU, CPU)
    passing.calibration, passing.held = calibration_, held
    for index in range(2):
        passing.calibration.stage = index  # type: ignore[attr-defined]
        passing.advance(stream.load(index))
    merger: Any = stream.load(2)
    with torch.no_grad():
        found = merger.merger(passing.calibration.hidden[0])
    assert torch.allclose(found, merged(load_reference(Checkpoint.open(source)), seen[:1]), atol=1e-4)


def test_images_beyond_the_limit_are_left_out_evenly(source: Path, samples: list[PreparedSample]) -> None:
    stream = TowerStream(Checkpoint.open(source), CPU)
    every = [int(s.inputs["image_grid_thw"].prod()) for s in samples if "image_grid_thw" in s.inputs]
    kept, held = stream.patches(samples, CPU, limit=sum(every) // 2)
    assert sum(kept.lengths) + sum(held.lengths) <= sum(every) * 0.6
    assert [[sum(image) for image in stage] for stage in kept.segments] == [kept.lengths] * 3
    alone, _ = stream.patches(samples, CPU, limit=1)
    assert len(alone.lengths) == 1


def test_what_groups_do_not_divide_stays(
    source: Path, manifest: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = quantize(str(source), tmp_path / "out", calib=str(manifest), group_size=128, vision="awq")
    checkpoint = Checkpoint.open(out)
    packed = {f"blocks.{i}.mlp.fc2" for i in range(2)} | {"merger.mlp.0", "merger.mlp.2"}
    assert set(checkpoint.packed_tower()) == packed
    assert "attn.qkv, attn.proj, mlp.fc1 stay in 16 bits (6 of 10 linears)" in " ".join(capfd.readouterr().err.split())
    assert inspect_checkpoint(out).problems == []
    left = checkpoint.config["quantization_config"]["modules_to_not_convert"]
    assert "visual.blocks.0.attn.qkv" in left and "visual" not in left
    # what was not packed is the source's, bit for bit
    before = Checkpoint.open(source)
    assert torch.equal(checkpoint.get("visual.blocks.0.attn.qkv.weight"), before.get("visual.blocks.0.attn.qkv.weight"))
    # and the plan knew the size
    recipe = Recipe(calib=str(manifest), group_size=128, vision="awq")
    planned = plan.make_plan(before, recipe, [PreparedSample({}, 64, 32, "")], CPU).disk - 30_000_000
    assert planned == checkpoint.nbytes


def test_a_stopped_run_goes_on_within_the_tower(
    source: Path, manifest: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = tower.write_layer, []

    def stop(directory: Path, index: int, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(index)
        write(directory, index, *rest)

    settings: dict[str, Any] = {"calib": str(manifest), "group_size": 32, "vision": "awq"}
    monkeypatch.setattr(tower, "write_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(source), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert written == [1, 2]
    written.clear()

    def go_on(directory: Path, index: int, *rest: Any) -> None:
        written.append(index)
        write(directory, index, *rest)

    monkeypatch.setattr(tower, "write_layer", go_on)
    quantize(str(source), tmp_path / "out", **settings)
    assert written == [3]
    first, second = files(made), files(tmp_path / "out")
    assert {name for name in first if first[name] != second.get(name)} <= {"qvl-run.json"}


def test_without_images_there_is_nothing_to_search_on(source: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a line of text"}\n{"text": "and another"}\n')
    with pytest.raises(ManifestError, match=r"--vision awq: no calibration sample has an image"):
        quantize(str(source), tmp_path / "out", calib=str(texts), group_size=32, vision="awq")


@pytest.mark.parametrize("scaled", [False, True])
def test_scales_and_biases_are_folded(source: Path, samples: list[PreparedSample], scaled: bool) -> None:
    """A block with what the file holds is the block with the weights that the search says they stand for."""
    checkpoint = Checkpoint.open(source)
    stream = TowerStream(checkpoint, CPU)
    passing = LayerStream({u.name: u.linears for u in QWEN2_VL.tower.units}, (160, 640), CPU, CPU)
    passing.calibration, passing.held = stream.patches(samples, CPU)
    block: Any = stream.load(0)
    if scaled:  # channels that matter much, so that scales are worth their while
        block.norm1.weight.data[::7] *= 30
        block.attn.qkv.weight.data[320:] *= torch.linspace(0.01, 3, 160).unsqueeze(1)
    held = passing.hold(block)
    settings = SearchSettings(QWEN2_VL, 32, 4, torch.float16, rounding="nearest", clip=False)
    packed = frozenset(unit.name for unit in QWEN2_VL.tower.units)
    arguments = passing.held.inputs(passing.held.batch(0, 10**6), CPU)
    found = TowerSearch(passing, settings, packed).search(block, QWEN2_VL.tower.units, held.inputs)
    if scaled:
        assert "scaled" in found.choices["attn.qkv"].replace("unscaled", "")
    for name, weight in found.effective.items():
        block.get_submodule(name).weight.data = weight
        block.get_submodule(name).bias.data = found.biases[name]
    with torch.no_grad():
        said = block(**arguments)
        for name, values in found.linears.items():
            groups = values.values.float().view(*values.scales.shape, -1) - values.zeros.float().unsqueeze(-1)
            weight = groups * values.scales.float().unsqueeze(-1)
            block.get_submodule(name).weight.data = weight.view(values.values.shape)
        for name, tensor in found.others.items():
            module, _, kind = name.rpartition(".")
            getattr(block.get_submodule(module), kind).data = tensor
        held_in_file = block(**arguments)
    assert torch.allclose(said, held_in_file, atol=2e-3 * float(said.abs().max()))


def test_moments_are_taken_about_the_mean() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6.0)
    moments = CentredMoments(6, CPU)
    moments.add(x[:200].clone())
    moments.add(x[200:].clone())
    moments.finish()
    assert torch.allclose(moments.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(moments.second, torch.cov(x.t(), correction=0), atol=1e-4)


@pytest.mark.parametrize("layout", ["gemv", "compressed-tensors"])
def test_converting_repacks_the_tower_too(made: Path, tmp_path: Path, layout: str) -> None:
    there = convert(made, tmp_path / "there", layout)
    assert inspect_checkpoint(there).problems == []
    name = "visual.blocks.0.attn.qkv.weight"
    assert torch.equal(*(read_tensor(Checkpoint.open(path), name, torch.float32) for path in (there, made)))
    back = convert(there, tmp_path / "back", "gemm")
    before, after = Checkpoint.open(made), Checkpoint.open(back)
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.tensors)


def test_a_list_that_contradicts_the_tower_is_a_problem(made: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["visual"]
    (broken / "config.json").write_text(json.dumps(config))
    said = [problem.message for problem in inspect_checkpoint(broken).problems]
    assert any(m.startswith("packed, but listed in modules_to_not_convert: visual.blocks.0.attn.qkv") for m in said)
