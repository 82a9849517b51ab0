"""What distillation learns from: samples before the first decoder layer, and what the source makes of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.quantize.stream.passing import held_samples
from toolkit.quantize.stream.states import States

__all__ = ["Lessons", "apart"]

#: One of so many samples is held back, beside those that checked the search.
_ONE_OF = 20


@dataclass(frozen=True)
class Lessons:
    """Samples, one by one.

    ``states``: before the first decoder layer. ``true``: what the source's output head is given, [n, D] in the head's
    dtype. Both may wait in host memory. Tokens of images don't count: what comes next there is not for a model to say.
    """

    states: Sequence[States]
    true: Sequence[Tensor]

    def tokens(self, sample: int) -> int:
        """Return how long a sample is."""
        return self.states[sample].lengths[0]

    def count(self, samples: Sequence[int]) -> int:
        """Return how many tokens of some samples count."""
        return sum(int((~self.states[i].vision).sum()) for i in samples)

    def batches(self, samples: Sequence[int], tokens: int) -> Iterator[list[int]]:
        """Yield some samples in their order, so many tokens at a time; one above that goes alone."""
        batch: list[int] = []
        size = 0
        for index in samples:
            if batch and size + self.tokens(index) > tokens:
                yield batch
                batch, size = [], 0
            batch.append(index)
            size += self.tokens(index)
        if batch:
            yield batch

    def take(self, batch: Sequence[int], device: torch.device) -> tuple[States, Tensor, Tensor]:
        """Return samples joined, what the source makes of those tokens that count, [n, D], and which they are, [n]."""
        states = States.join([self.states[i] for i in batch])
        rows = (~states.vision).nonzero().flatten()
        true = torch.cat([self.true[i] for i in batch])
        return states, true[rows.to(true.device)].to(device), rows


def apart(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return which samples, of these lengths, are learnt from, and which are held back.

    Those that checked the search are held back too: what is measured on them at the end is then of samples that
    nothing was made from. Of a single one, nothing is left to learn from.
    """
    more = len(lengths) // _ONE_OF
    held = held_samples(lengths) | {i * len(lengths) // more for i in range(more)}
    return [i for i in range(len(lengths)) if i not in held], sorted(held)
