"""The output head in 4 bits: written whole in every format, near its source, the same however often a run stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.short import calibration, short_demo
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.errors import FormatError
from toolkit.fidelity.answers import differs_by_answer, kl_by_answer
from toolkit.formats.convert import convert
from toolkit.formats.linears import read_tensor
from toolkit.formats.packing import dequantize, join_outputs, pack_as, slice_outputs
from toolkit.formats.reference import load_reference
from toolkit.quantize import head, plan, quantize
from toolkit.quantize.progress import RunProgress
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.run import _divided
from toolkit.quantize.samples import prepare_samples
from toolkit.quantize.search import head as search
from toolkit.quantize.search.grid import round_to_grid

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_demo(tmp_path_factory.mktemp("head-source") / "short", blocks=1)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("head-calibration"), samples=12)


def made_with(source: Path, out: Path, manifest: Path, **recipe: Any) -> Path:
    return quantize(str(source), out, calib=str(manifest), lm_head=True, verdict=False, **recipe)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, source: Path, manifest: Path) -> Path:
    return quantize(str(source), tmp_path_factory.mktemp("head") / "out", calib=str(manifest), lm_head=True)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.get(name) for name in checkpoint.tensors}


def test_a_tied_head_becomes_a_packed_one_and_the_embeddings_stay(source: Path, made: Path) -> None:
    before, after = Checkpoint.open(source), Checkpoint.open(made)
    assert before.tied_lm_head and not after.tied_lm_head
    assert after.config["quantization_config"]["lm_head"] is True
    embeddings = f"{before.language_prefix}embed_tokens.weight"
    assert torch.equal(after.get(embeddings), before.get(embeddings))
    assert {name for name in after.tensors if name.startswith("lm_head")} == {
        f"lm_head.{part}" for part in ("qweight", "qzeros", "scales")
    }
    inspection = inspect_checkpoint(made)
    assert inspection.problems == []
    assert inspection.quantization is not None
    assert inspection.quantization["quantized"]["lm_head"] == 1
    assert "lm_head" not in inspection.quantization["left"]
    said = json.loads((made / "qvl.json").read_text())
    assert said["recipe"]["lm_head"] is True
    assert said["lm_head"]["relative_error"] < 0.01
    assert sum(said["lm_head"]["rows"].values()) == before.text_config["vocab_size"]
    card = (made / "README.md").read_text()
    assert "so is the output head" in card
    assert "embeddings are the source's" in card


def test_a_nested_config_says_so_in_both_places() -> None:
    from toolkit.checkpoint.config import untied

    found = untied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "vocab_size": 8}})
    assert found == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False, "vocab_size": 8}}


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_logits_are_nearer_than_by_rounding_to_nearest(
    source: Path, manifest: Path, tmp_path: Path, effort: str
) -> None:
    """At the text tokens of such chats, behind the 16-bit model's own norm; images' tokens count for nothing."""
    out = made_with(source, tmp_path / "out", manifest, effort=effort, samples=12)
    weight = read_tensor(Checkpoint.open(source), Checkpoint.open(source).head_name)
    found = read_tensor(Checkpoint.open(out), "lm_head.weight")
    nearest = dequantize(round_to_grid(weight, 128), torch.float32)
    model = load_reference(Checkpoint.open(source))
    shown = prepare_samples(Checkpoint.open(source), Recipe(calib=str(manifest)), RunProgress()).samples
    with torch.no_grad():
        states = [(model.model(**s.inputs).last_hidden_state[0], s.inputs["mm_token_type_ids"][0] == 0) for s in shown]
    x = torch.cat([hidden[text] for hidden, text in states])
    error, limit = (float((x @ (w - weight).t()).square().sum()) for w in (found, nearest))
    assert error < 0.8 * limit


def test_rounded_by_pieces_it_is_what_it_is_at_once(
    source: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows do not depend on each other; only what is clipped is chosen for a piece."""
    whole = made_with(source, tmp_path / "whole", manifest, clip=False)
    monkeypatch.setattr(search, "HEAD_ROWS", 256)
    pieces = made_with(source, tmp_path / "pieces", manifest, clip=False)
    a, b = tensors(whole), tensors(pieces)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a if name != "lm_head.qweight")
    differ = (a["lm_head.qweight"] != b["lm_head.qweight"]).float().mean()
    assert differ < 0.01  # the last bit of a product depends on its size


@pytest.mark.parametrize("form", ["gemm", "gemv", "compressed-tensors"])
def test_formats_hold_the_same_and_convert_into_each_other(
    source: Path, made: Path, manifest: Path, tmp_path: Path, form: str
) -> None:
    direct = made if form == "gemm" else made_with(source, tmp_path / "direct", manifest, format=form)
    assert inspect_checkpoint(direct).problems == []
    assert torch.equal(*(read_tensor(Checkpoint.open(path), "lm_head.weight") for path in (direct, made)))
    for to in {"gemm", "gemv", "compressed-tensors"} - {form}:
        other = convert(direct, tmp_path / to, to)
        assert inspect_checkpoint(other).problems == []
        assert torch.equal(*(read_tensor(Checkpoint.open(path), "lm_head.weight") for path in (other, made)))


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_run_that_stops_before_the_head_goes_on_to_the_same_bytes(
    source: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    once = made_with(source, tmp_path / "once", manifest, effort=effort, samples=12)

    def stopped(*arguments: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("toolkit.quantize.worker.quantize_head", stopped)
        with pytest.raises(KeyboardInterrupt):
            made_with(source, tmp_path / "twice", manifest, effort=effort, samples=12)
    assert not (tmp_path / "twice").exists()
    twice = made_with(source, tmp_path / "twice", manifest, effort=effort, samples=12)
    files = sorted(path.name for path in once.glob("*.safetensors"))
    assert files == sorted(path.name for path in twice.glob("*.safetensors"))
    assert all((once / name).read_bytes() == (twice / name).read_bytes() for name in files)


def test_a_vocabulary_that_engines_pad_is_refused(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    odd = {**checkpoint.text_config, "vocab_size": 1000}
    from dataclasses import replace

    with pytest.raises(FormatError, match="1000 is none, leave --lm-head out"):
        plan.check_settings(replace(checkpoint, text_config=odd), Recipe(lm_head=True))
    plan.check_settings(replace(checkpoint, text_config=odd), Recipe())


def test_the_head_goes_with_the_last_device() -> None:
    assert _divided([0, 1, 2, 3, 4], 4, 2, head=4)[-1][-1] == 4
    assert _divided([4], 4, 2, head=4) == [(), (4,)]
    assert _divided([0, 1, 2, 3], 4, 1) == [(0, 1, 2, 3)]
    checkpoint = type("C", (), {"num_layers": 4})()
    assert head.head_number(checkpoint, Recipe(lm_head=True)) == 4
    assert head.head_number(checkpoint, Recipe()) is None


@pytest.mark.parametrize("form", ["gemm", "gemv", "compressed-tensors"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_outputs_are_joined_and_sliced(form: str, group_size: int) -> None:
    values = round_to_grid(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), group_size)
    if form == "gemv" and group_size == -1:
        group_size = 256
    packed = pack_as(form, values)
    parts = [slice_outputs(form, packed, start, stop) for start, stop in ((0, 8), (8, 40), (40, 64))]
    joined = join_outputs(form, parts)
    for a, b in zip(
        (joined.qweight, joined.qzeros, joined.scales), (packed.qweight, packed.qzeros, packed.scales), strict=True
    ):
        assert torch.equal(a, b)


def test_the_plan_has_the_head(source: Path) -> None:
    from toolkit.calibration.inputs import PreparedSample

    checkpoint = Checkpoint.open(source)
    samples = [PreparedSample({"input_ids": torch.zeros(1, 8, dtype=torch.int64)}, 8, 4, "")]
    without, with_head = (plan.make_plan(checkpoint, Recipe(lm_head=asked), samples, CPU, 1) for asked in (False, True))
    assert with_head.disk > without.disk
    assert with_head.seconds > without.seconds


def test_divergence_is_measured_with_the_candidates_own_head() -> None:
    rng = torch.Generator().manual_seed(0)
    states, head = [torch.randn(5, 16, generator=rng)], torch.randn(32, 16, generator=rng)
    own = head + 0.1 * torch.randn(32, 16, generator=rng)
    assert float(kl_by_answer(states, states, head)[0].sum()) == 0
    found = kl_by_answer(states, states, head, own)[0]
    p, q = ((states[0] @ weight.t()).double().log_softmax(-1) for weight in (head, own))
    assert torch.allclose(found, (p.exp() * (p - q)).sum(-1), atol=1e-5)
    flipped = head.flip(0)
    assert differs_by_answer(states, states, head) == [False]
    assert differs_by_answer(states, states, head, flipped) == [True]


def test_the_verdict_has_the_head_in_it(source: Path, manifest: Path, tmp_path: Path) -> None:
    """Its KL is that of what is written: with the head packed it is another than without."""
    costs = []
    for asked in (False, True):
        out = quantize(str(source), tmp_path / str(asked), calib=str(manifest), lm_head=asked)
        costs.append(json.loads((out / "qvl-run.json").read_text())["cost"]["all"]["sums"])
    assert costs[0] != costs[1]
