"""The clip search's kernel: on any weights it finds bounds as good as the search in plain torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

AGREE = """
import sys
import torch
from toolkit.quantize.search import clips, gram, grid
from toolkit.quantize.search.kernels.clip import best_clip

def losses(weight, moments, bounds):
    w = weight.float().view(*bounds.shape[:2], -1)
    d = (grid.snap(w.clamp(-bounds, bounds), 4) - w).double()
    return torch.einsum("ngi,gij,ngj->ng", d, moments.double(), d)

def weights(kind, rows, columns, rng):
    w = torch.randn(rows, columns, generator=rng) * torch.randn(rows, columns, generator=rng).exp()
    if kind == "one sign":
        return w.abs() + 1
    if kind == "some zero":
        w[::3] = 0
    if kind == "float16":
        return w.half()
    if kind == "transposed":
        return w.t().contiguous().t()
    return w

device, rng = sys.argv[1], torch.Generator().manual_seed(0)
for kind, rows, group in (
    ("normal", 70, 32), ("normal", 64, 64), ("normal", 130, 128),
    ("one sign", 20, 64), ("some zero", 20, 64), ("float16", 20, 32), ("transposed", 20, 128),
):
    weight = weights(kind, rows, 3 * group, rng).to(device)
    x = (torch.randn(500, 3 * group, generator=rng) @ torch.randn(3 * group, 3 * group, generator=rng)).to(device)
    moments = gram.group_moments(x, group)
    ours = best_clip(weight, moments, 4, 20, 10, grid.MIN_RANGE)
    chunk = weight.float().reshape(rows, 3, group)
    theirs = clips._best_clip(chunk, moments, 4, 20, 10)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    tried = chunk.abs().amax(-1, keepdim=True) * (1 - torch.arange(10, device=device) / 20)
    assert ((ours - tried).abs() <= 1e-6 * tried).any(-1).all(), kind
    a, b = losses(weight, moments, ours), losses(weight, moments, theirs)
    assert (a <= b * 1.01).all() and a.sum() <= b.sum() * 1.001, (kind, rows, group)
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_bounds_are_as_good(device: str) -> None:
    pytest.importorskip("triton")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    subprocess.run([sys.executable, "-c", AGREE, device], env={**os.environ, **interpreted}, check=True, timeout=120)
