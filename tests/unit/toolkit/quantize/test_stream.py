"""How weights and pictures reach the search: through staging, in place of a convolution, in narrow products."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import CheckpointError
from toolkit.paths import demo_checkpoint
from toolkit.quantize import stream as model
from toolkit.quantize.search import grid as search
from toolkit.quantize.search.grid import Moments


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


def test_a_tensor_goes_through_staging_in_pieces(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.Staging, "_SIZE", 1000)  # no multiple of an element
    staging = model.Staging()
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


def test_the_patch_embedding_is_its_convolution() -> None:
    rng = torch.Generator().manual_seed(0)
    convolution = nn.Conv3d(3, 32, kernel_size=(2, 14, 14), stride=(2, 14, 14), bias=False)
    patches = torch.randn(20, 3 * 2 * 14 * 14, generator=rng)
    with torch.no_grad():
        expected = convolution(patches.view(20, 3, 2, 14, 14)).view(20, 32)
        found = model._Patches(convolution.weight)(patches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_narrow_moments_and_losses_are_close_to_wide_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 256, generator=rng) @ torch.randn(256, 256, generator=rng)
    weights = torch.rand(3000, generator=rng)
    for given in (None, weights):
        wide, narrow = Moments(256, x.device), Moments(256, x.device, narrow=True)
        for moments in (wide, narrow):
            moments.add(x.clone(), given)
            moments.finish()
        assert wide.tokens == narrow.tokens and torch.equal(wide.sizes, narrow.sizes)
        size = wide.second.diagonal().mean()
        assert (wide.second - narrow.second).abs().max() < 1e-3 * size
        assert (wide.second - narrow.second).abs().max() > 0
    weight, scales = torch.randn(64, 256, generator=rng), torch.rand(3, 256, generator=rng) + 0.5
    exact = search.screen(weight, wide.second, scales, 128)
    fast = search.screen(weight, wide.second.bfloat16(), scales, 128)
    torch.testing.assert_close(fast, exact, rtol=3e-3, atol=0)


def test_a_cpu_multiplies_in_float32() -> None:
    assert not search.takes_bfloat16(torch.device("cpu"))
    assert search._products_agree(torch.device("cpu"))
