"""The optimizers: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Muon", "split_parameters"]

#: Coefficients of the quintic Newton-Schulz iteration (Keller Jordan, "Muon", 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return roughly the nearest orthogonal matrix of each of [n, rows, columns] (Newton-Schulz; bf16 on a GPU)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    result: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result


class Muon:
    """Momentum whose step is orthogonalized; matrices of one shape step together. Decay as in AdamW.

    The step is scaled by 0.2 sqrt(max(rows, columns)), so that its size is like AdamW's (Moonlight, 2025).
    Gradients are passed in, so that they may live in buffers of a CUDA graph.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[tuple(parameter.shape)].append(parameter)
        self._groups = [(group, torch.zeros_like(torch.stack(group))) for group in groups.values()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step at learning rate ``rate`` from the parameters' ``.grad``."""
        for parameters, mean in self._groups:
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            mean.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp_(mean, self.momentum))
            update *= 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(parameters, 1 - rate * self.weight_decay)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-rate)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices for Muon, the rest for AdamW). Embeddings of tokens and patches count as the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed_tokens" not in name else rest).append(parameter)
    return matrices, rest
