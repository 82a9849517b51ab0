"""How far a model's next tokens are from its source's, and the gradient of that, a few tokens' logits at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.quantize.distillation.sizes import LOGITS
from toolkit.quantize.search.gram import product

__all__ = ["Head"]

#: What differences of probabilities are multiplied by: most are below what float16 tells from zero.
_LARGER = 2.0**12


@dataclass(frozen=True)
class Head:
    """What comes behind the decoder layers: the last norm, ``norm`` [D] float32 with its ``eps``, and the output head,
    ``weight`` [V, D] in its 16 bits (float32 on a CPU).
    """

    norm: Tensor
    eps: float
    weight: Tensor

    def normed(self, hidden: Tensor) -> Tensor:
        """Return what the output head is given, [n, D], of the decoder's output [n, D] float32."""
        return nn.functional.rms_norm(hidden, self.norm.shape, self.norm, self.eps)

    @torch.no_grad()
    def divergence(self, true: Tensor, hidden: Tensor) -> Tensor:
        """Return KL(source || model) of each token, float32 [n], in nats.

        Args:
            true: what the source's head is given, [n, D]. hidden: the model's decoder output, [n, D] float32.
        """
        found = []
        for part in zip(*(each.split(self._tokens) for each in (true, self.normed(hidden))), strict=True):
            p, q = self._logarithms(*part)
            found.append(q.sub_(p).neg_().mul_(p.exp_()).sum(-1))
        return torch.cat(found)

    def pull(self, true: Tensor, hidden: Tensor) -> Tensor:
        """Return the gradient by ``hidden`` of the divergences' sum; the arguments are :meth:`divergence`'s."""
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            normed = self.normed(hidden)
        with torch.no_grad():
            parts = zip(*(each.split(self._tokens) for each in (true, normed)), strict=True)
            gradients = torch.cat([self._pull(*part) for part in parts])
        (gradient,) = torch.autograd.grad(normed, hidden, gradients)
        return gradient

    def _pull(self, true: Tensor, normed: Tensor) -> Tensor:
        """Return the gradient by what the head is given: by a logit it is q - p."""
        p, q = self._logarithms(true, normed)
        return product(q.exp_().sub_(p.exp_()).mul_(_LARGER), self.weight).div_(_LARGER)

    @property
    def _tokens(self) -> int:
        return max(1, LOGITS // len(self.weight))

    def _logarithms(self, true: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the source's probabilities and of the model's, [n, V] each."""
        p, q = (product(each, self.weight.t()).log_softmax(-1) for each in (true, normed))
        return p, q
