"""Divergence from fp16: nothing for fp16 itself, little for rounding, much for a wrecked model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.support import rounded
from toolkit.demo import fidelity
from toolkit.errors import CheckpointError
from toolkit.models.qwen2_vl import QWEN2_VL


def test_divergence_is_kl_per_token() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert fidelity.divergence([p], [p]) == 0
    assert fidelity.divergence([p, p], [p, q]) == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)


@pytest.mark.slow
def test_rounding_costs_little_and_coarse_rounding_more() -> None:
    fidelity.patch_torchvision()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(fidelity.demo_checkpoint())
    chats = fidelity.held_out_chats(processor, per_task=2)
    opening = processor.tokenizer.encode("<|im_start|>assistant\n")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    models = (fidelity.load(None), fidelity.load(None, 32), fidelity.load(None, -1))
    exact, fine, coarse = (fidelity.answer_logits(m, chats, opening, end) for m in models)
    assert len(exact) == 16 and all(len(answer) >= 2 for answer in exact)
    assert 0 < fidelity.divergence(exact, fine) < 0.05
    assert fidelity.divergence(exact, fine) < fidelity.divergence(exact, coarse)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_linears_in_16_bits_are_read_as_they_are(tmp_path: Path, version: str) -> None:
    left = frozenset({(1, name) for name in QWEN2_VL.linears} | {(0, "mlp.down_proj")})
    mixed = fidelity.load(rounded.write(tmp_path / "m", left, version)).state_dict()
    source, nearest = fidelity.load(None).state_dict(), fidelity.load(None, 128).state_dict()
    kept = {f"model.language_model.layers.{index}.{name}.weight" for index, name in left}
    for name in source:
        expected = source[name] if name in kept else nearest[name]
        assert torch.allclose(mixed[name], expected, rtol=2e-3, atol=1e-6), name  # scales are rounded to fp16
    assert all(torch.equal(mixed[name], source[name]) for name in kept)


def test_what_is_no_checkpoint(tmp_path: object) -> None:
    with pytest.raises(CheckpointError):
        fidelity.load(tmp_path)  # type: ignore[arg-type]


def test_what_is_measured_of_a_candidate() -> None:
    sure, torn = (torch.tensor([row, row]).log() for row in ([0.9, 0.05, 0.05], [0.3, 0.5, 0.2]))
    answers = [torch.tensor([0, 0]), torch.tensor([0, 0])]
    found = fidelity.measure("torn", [sure, sure], [sure, torn], answers)
    assert found.changed == [False, True] and found.right == [True, False]
    kl = 0.9 * math.log(0.9 / 0.3) + 0.05 * math.log(0.05 / 0.5) + 0.05 * math.log(0.05 / 0.2)
    assert found.sums == pytest.approx([0, 2 * kl], abs=1e-6)


@pytest.mark.slow
def test_a_table_holds_candidates_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = rounded.write(tmp_path / "fine", frozenset(), group_size=32)
    fidelity.compare([str(fine)], per_task=2, device="cpu", seed=3, out=tmp_path / "found.json")
    said = capsys.readouterr().out
    assert "16 held-out answers (seed 3)" in said
    found = json.loads((tmp_path / "found.json").read_text())
    nearest, first = found["candidates"]
    assert first["over_first"]["geometric"]["value"] == pytest.approx(1)
    assert nearest["over_first"]["geometric"]["value"] > 1  # groups of 128, to nearest
    assert set(found["right_fp16"]) == set(fidelity.TASKS) <= set(said.split())
    assert len(first["answer_kl"]) == 16
