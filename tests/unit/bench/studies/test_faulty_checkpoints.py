from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.studies.cli import app
from bench.studies.faulty_checkpoints import NORMS, folded_scales, perturb_scales, round_linears, unfold
from tests.support import rounded, tiny
from tests.support.command import exit_code
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import CheckpointError, FormatError
from toolkit.paths import demo_checkpoint


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    """The embedded model, packed."""
    return rounded.write(tmp_path / "awq", frozenset())


def scaled(awq: Path, layer: int, by: float) -> Path:
    """Divide a layer's norm before attention, as AWQ does when it scales the weights after it."""
    file = awq / "model.safetensors"
    found = load_file(file)
    name = f"{Checkpoint.open(awq).layer_prefix(layer)}{NORMS[0]}"
    sign = torch.arange(found[name].numel()) % 2 * 2 - 1
    found[name] = (found[name].float() / (1 + by * sign)).half()
    save_file(found, file)
    return awq


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.get(name).clone() for name in checkpoint.tensors}


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_one_layers_scales_are_off_up_and_down(awq: Path, tmp_path: Path) -> None:
    perturb_scales(awq, tmp_path / "bad", 2, 0.05, seed=1)
    prefix = Checkpoint.open(awq).layer_prefix(2)
    found = changed(awq, tmp_path / "bad")
    assert len(found) == 7 and all(name.startswith(prefix) and name.endswith(".scales") for name in found)
    old, new = tensors(awq), tensors(tmp_path / "bad")
    for name in found:
        ratio = new[name].float() / old[name].float()
        assert torch.allclose((ratio - 1).abs(), torch.full_like(ratio, 0.05), atol=2e-3)
        assert 0.4 < float((ratio > 1).float().mean()) < 0.6
    perturb_scales(awq, tmp_path / "again", 2, 0.05, seed=1)
    assert changed(tmp_path / "bad", tmp_path / "again") == set()
    perturb_scales(awq, tmp_path / "other", 2, 0.05, seed=2)
    assert changed(tmp_path / "bad", tmp_path / "other")


def test_a_layer_is_unfolded(awq: Path, tmp_path: Path) -> None:
    sound = rounded.write(tmp_path / "sound", frozenset())
    scaled(scaled(awq, 1, 0.1), 3, 0.3)
    assert changed(sound, awq) == {f"{Checkpoint.open(awq).layer_prefix(i)}{NORMS[0]}" for i in (1, 3)}
    assert unfold(awq, tmp_path / "most", demo_checkpoint()) == 3  # the most scaled
    assert changed(sound, tmp_path / "most") == {f"{Checkpoint.open(awq).layer_prefix(1)}{NORMS[0]}"}
    assert unfold(awq, tmp_path / "one", demo_checkpoint(), 1) == 1
    assert changed(awq, tmp_path / "one") == {f"{Checkpoint.open(awq).layer_prefix(1)}{NORMS[0]}"}


def test_what_was_folded_is_found_again(awq: Path) -> None:
    for layer, by in ((0, 0.0), (4, 0.25)):
        attention, mlp = folded_scales(scaled(awq, layer, by), demo_checkpoint(), layer)
        assert torch.allclose((attention - 1).abs(), torch.full_like(attention, by), atol=2e-3)
        assert torch.equal(mlp, torch.ones_like(mlp))


def test_rounded_is_plain_rounding(awq: Path, tmp_path: Path) -> None:
    damaged = perturb_scales(scaled(awq, 1, 0.2), tmp_path / "damaged", 0, 0.5)
    round_linears(damaged, tmp_path / "rounded", demo_checkpoint())
    assert changed(rounded.write(tmp_path / "sound", frozenset()), tmp_path / "rounded") == set()


def test_the_command_writes_a_checkpoint(awq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = "faulty-checkpoints"
    assert exit_code(app, write, "scales", awq, tmp_path / "a", "--layer", 1) == 0
    assert changed(awq, tmp_path / "a")
    scaled(awq, 2, 0.1)
    assert exit_code(app, write, "unfolded", awq, tmp_path / "b", "--source", demo_checkpoint()) == 0
    assert capsys.readouterr().out == "layer 2\n"
    assert str(tmp_path / "a") in str(exit_code(app, write, "scales", awq, tmp_path / "a"))  # exists
    assert exit_code(app, write, "unfolded", awq, tmp_path / "c") == 2
    assert exit_code(app, write, "folded", awq, tmp_path / "c") == 2


def test_what_has_no_such_fault_is_refused(awq: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing was folded"):
        unfold(awq, tmp_path / "x", demo_checkpoint())
    with pytest.raises(CheckpointError, match="16-bit weights"):
        perturb_scales(demo_checkpoint(), tmp_path / "x", 0)
    with pytest.raises(CheckpointError, match="layers 0 to 4, not 5"):
        perturb_scales(awq, tmp_path / "x", 5)
    small = tiny.write(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"not of one model|no tensor"):
        round_linears(awq, tmp_path / "x", small)
    gemv = rounded.write(tmp_path / "gemv", frozenset(), version="gemv")
    with pytest.raises(FormatError, match="not in the gemm layout"):
        round_linears(gemv, tmp_path / "x", demo_checkpoint())
    assert not (tmp_path / "x").exists()
