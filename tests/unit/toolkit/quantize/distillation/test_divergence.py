"""The divergence of next tokens and its gradient, a few tokens at a time, against autograd over all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.quantize.distillation import divergence
from toolkit.quantize.distillation.divergence import Head


@pytest.mark.parametrize("logits", [2**26, 40 * 3])
def test_divergence_and_gradient(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "LOGITS", logits)
    torch.manual_seed(0)
    head = Head(torch.rand(16) + 0.5, 1e-6, torch.randn(40, 16))
    before, hidden = torch.randn(11, 16), torch.randn(11, 16, requires_grad=True)
    true = head.normed(before)
    p, q = (
        (nn.functional.rms_norm(x, (16,), head.norm, 1e-6) @ head.weight.t()).log_softmax(-1) for x in (before, hidden)
    )
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(head.divergence(true, hidden.detach()), expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(head.pull(true, hidden.detach()), gradient, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_its_source_is_not_pulled() -> None:
    torch.manual_seed(0)
    head = Head(torch.ones(16), 1e-6, torch.randn(40, 16))
    hidden = torch.randn(5, 16)
    assert float(head.divergence(head.normed(hidden), hidden).abs().max()) < 1e-6
    assert float(head.pull(head.normed(hidden), hidden).abs().max()) < 1e-5
