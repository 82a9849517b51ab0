"""NaN and infinity are found wherever they are, and what fp16 does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import tiny
from toolkit.checkpoint import values
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.values import read_values, refuse_values
from toolkit.errors import CheckpointError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAN, INF = float("nan"), float("inf")


def with_values(path: Path, name: str, found: list[float], dtype: torch.dtype) -> Checkpoint:
    """Write the tiny model with some values at the end of one tensor."""
    tensors = {key: tensor.to(dtype) for key, tensor in tiny.tensors().items()}
    tensors[name].view(-1)[-len(found) :] = torch.tensor(found, dtype=dtype)
    tiny.write_tensors(tiny.write(path), tensors)
    return Checkpoint.open(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_each_kind_in_each_dtype(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    checkpoint = with_values(tmp_path / "m", "model.norm.weight", [value, 1.0, value], dtype)
    with pytest.raises(CheckpointError, match=r"NaN or infinite: model\.norm\.weight \(2 of 128 values\)"):
        refuse_values(checkpoint)


def test_every_tensor_is_looked_at(tmp_path: Path) -> None:
    for number, name in enumerate(tiny.tensors()):
        checkpoint = with_values(tmp_path / str(number), name, [NAN], torch.float16)
        assert [found.tensor.name for found in read_values(checkpoint) if found.not_finite] == [name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_numbers_are_none(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    most = info.max if dtype != torch.float32 else 65504.0
    checkpoint = with_values(tmp_path / "m", "model.norm.weight", [most, -most, info.tiny, -0.0, 0.0], dtype)
    counts: list[int] = []
    refuse_values(checkpoint, counts.append)
    assert counts == list(range(1, len(checkpoint.tensors) + 1))


def test_a_tensor_of_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CHUNK", 1000)
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint = with_values(tmp_path / "m", name, [INF] + [0.0] * 700 + [NAN], torch.bfloat16)
    assert {f.tensor.name: f.not_finite for f in read_values(checkpoint) if f.not_finite} == {name: 2}


def test_what_fp16_does_not_hold(tmp_path: Path) -> None:
    name = "visual.merger.ln_q.weight"
    for value in (65519.0, -65519.0):
        refuse_values(with_values(tmp_path / str(value), name, [value], torch.float32))
    for value in (65520.0, -1e30):
        checkpoint = with_values(tmp_path / str(value), name, [value], torch.float32)
        with pytest.raises(CheckpointError, match=r"65,504.*: visual\.merger\.ln_q\.weight\. Save it as bfloat16"):
            refuse_values(checkpoint)
    refuse_values(with_values(tmp_path / "bf16", name, [1e30], torch.bfloat16))  # stays bfloat16


def test_many_are_counted(tmp_path: Path) -> None:
    tiny.write_tensors(tiny.write(tmp_path / "m"), {n: torch.full_like(t, NAN) for n, t in tiny.tensors().items()})
    with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.weight .* and {len(tiny.tensors()) - 3} more\."):
        refuse_values(Checkpoint.open(tmp_path / "m"))


def test_words_of_packed_weights_are_no_floats(tmp_path: Path) -> None:
    refuse_values(Checkpoint.open(tiny.write(tmp_path / "m", version="gemm")))
