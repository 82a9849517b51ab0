"""What comes before the decoder layers."""

from __future__ import annotations

import torch
from torch import nn

from toolkit.quantize.stream.shell import Patches


def test_the_patch_embedding_is_its_convolution() -> None:
    rng = torch.Generator().manual_seed(0)
    convolution = nn.Conv3d(3, 32, kernel_size=(2, 14, 14), stride=(2, 14, 14), bias=False)
    patches = torch.randn(20, 3 * 2 * 14 * 14, generator=rng)
    with torch.no_grad():
        expected = convolution(patches.view(20, 3, 2, 14, 14)).view(20, 32)
        found = Patches(convolution.weight)(patches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
