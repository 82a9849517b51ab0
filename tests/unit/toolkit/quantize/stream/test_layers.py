"""Weights on their way from a file to the device."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import CheckpointError
from toolkit.paths import demo_checkpoint
from toolkit.quantize.stream.layers import Staging


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


def test_a_tensor_goes_through_staging_in_pieces(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "_SIZE", 1000)  # no multiple of an element
    staging = Staging()
    for name in list(checkpoint.tensors)[:40]:
        found = staging.send(checkpoint, name, torch.device("cpu"))
        assert found.dtype == checkpoint.get(name).dtype
        assert torch.equal(found, checkpoint.get(name)), name


def test_reading_says_what_is_missing_and_what_was_cut_short(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        checkpoint.read_into("nothing", memoryview(bytearray(8)))
    name = max(checkpoint.tensors, key=lambda each: checkpoint.tensors[each].nbytes)
    buffer = bytearray(16)
    size = checkpoint.tensors[name].nbytes
    assert checkpoint.read_into(name, memoryview(buffer), size - 4) == 4
    assert checkpoint.read_into(name, memoryview(buffer), size) == 0

    for file in checkpoint.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    short = Checkpoint.open(tmp_path)
    file = short.tensors[name].file
    with file.open("r+b") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
        assert json.loads(stream.read(header))
        stream.truncate(short.tensors[name].offset + 2)
    with pytest.raises(CheckpointError, match="was cut short"):
        short.read_into(name, memoryview(buffer))
