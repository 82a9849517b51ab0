"""What vLLM's words of 4-bit weights stand for."""

from __future__ import annotations

import pytest
import torch

from serve.kernels.words import unpack


@pytest.mark.parametrize(("inputs", "columns", "group"), [(64, 16, 32), (128, 40, 128), (256, 8, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_weights_come_back(inputs: int, columns: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 16, (inputs, columns))
    zeros = torch.randint(0, 16, (inputs // group, columns))
    scales = (torch.rand(inputs // group, columns) + 0.5).to(dtype)
    shifts = 4 * torch.arange(8)
    words = (values.view(-1, 8, columns) << shifts.view(1, 8, 1)).sum(1)
    points = (zeros.t().reshape(-1, 8, inputs // group) << shifts.view(1, 8, 1)).sum(1)
    found = unpack(to_int32(words), scales, to_int32(points))
    wanted = (values - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    assert found.shape == (columns, inputs) and found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, wanted.t().to(dtype))


def to_int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
