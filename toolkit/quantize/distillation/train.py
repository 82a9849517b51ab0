"""The loop: batches of samples, Adam on shares of what is in the file, and the state that did best on other samples."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from toolkit.errors import ResourceError
from toolkit.quantize.distillation.divergence import Head
from toolkit.quantize.distillation.layers import Student
from toolkit.quantize.distillation.lessons import Lessons, apart
from toolkit.quantize.distillation.sizes import CHUNK_TOKENS, EPOCHS

Result = TypeVar("Result")

__all__ = ["Distilled", "Rates", "distill"]

#: How fast Adam forgets gradients and their squares, and what keeps it from dividing by zero.
_BETAS, _EPSILON = (0.9, 0.95), 1e-12
#: Below this many tokens at once the trouble is not the chunk.
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class Rates:
    """How far a step goes at most, as a share of what is in the file, by kind; and how many there are.

    ``epochs``: passes over the samples. ``steps``: of an epoch, about, where there are as many samples. ``warmup``: the
    share of all steps in which rates rise; from there they fall by a cosine. ``looks``: how often the samples that are
    held back are asked. ``seed``: of the samples' order.
    """

    scales: float = 3e-4
    norms: float = 3e-4
    biases: float = 3e-4
    epochs: int = EPOCHS
    steps: int = 64
    warmup: float = 0.1
    looks: int = 4
    seed: int = 0

    def of(self, name: str) -> float:
        """Return the rate of what has a name inside its layer."""
        kind = name.rpartition(".")[2]
        return self.scales if kind == "scales" else self.biases if kind == "bias" else self.norms

    def pace(self, step: int, steps: int) -> float:
        """Return the share of the rates at a step, the first of which is number 1."""
        warm = max(1, round(self.warmup * steps))
        if step <= warm:
            return step / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm + 1))


@dataclass(frozen=True)
class Distilled:
    """What came of it: ``looks``, nats a token on the samples held back, at the start and at each look; ``taken``, the
    look whose state was kept (0: the start); ``steps`` that were made; samples that were held back.
    """

    looks: list[float]
    taken: int
    steps: int
    held: int


class _Learning:
    """What learns, and Adam's memory of it."""

    def __init__(self, model: Student, rates: Rates) -> None:
        found = [(rates.of(name), module) for layer in model.learned() for name, module in layer.items()]
        self.rates = [rate for rate, _ in found]
        self.shares: list[nn.Parameter] = [module.share for _, module in found]
        self.first = [torch.zeros_like(share) for share in self.shares]
        self.second = [torch.zeros_like(share) for share in self.shares]
        self.best = [share.detach().clone() for share in self.shares]

    @torch.no_grad()
    def step(self, number: int, pace: float) -> None:
        """Follow the gradients, and forget them."""
        of_first, of_second = _BETAS
        faded, faded_squares = 1 - of_first**number, 1 - of_second**number
        for rate, share, first, second in zip(self.rates, self.shares, self.first, self.second, strict=True):
            gradient = share.grad
            assert gradient is not None
            first.lerp_(gradient, 1 - of_first)
            second.lerp_(gradient.square(), 1 - of_second)
            share.addcdiv_(first, (second / faded_squares).sqrt_().add_(_EPSILON), value=-rate * pace / faded)
        self.forget()

    def forget(self) -> None:
        """Drop all gradients."""
        for share in self.shares:
            share.grad = None

    @torch.no_grad()
    def keep(self) -> None:
        """Make this the state to go back to."""
        for best, share in zip(self.best, self.shares, strict=True):
            best.copy_(share)

    @torch.no_grad()
    def go_back(self) -> None:
        """Return to the state that was kept."""
        for best, share in zip(self.best, self.shares, strict=True):
            share.copy_(best)


class _Loop:
    """One distillation of one model."""

    def __init__(self, model: Student, head: Head, lessons: Lessons, on_note: Callable[[str], None]) -> None:
        self.model = model
        self.head = head
        self.lessons = lessons
        self.on_note = on_note
        self.chunk_tokens = CHUNK_TOKENS

    def run(self, rates: Rates, on_step: Callable[[int, int], None]) -> Distilled:
        """Train; see :func:`distill`."""
        rest, held = apart([self.lessons.tokens(i) for i in range(len(self.lessons.states))])
        batches = list(self._batches(rest, rates))
        learning = _Learning(self.model, rates)
        looks, taken = [self._divergence(held)], 0
        at = {round((i + 1) * len(batches) / rates.looks) for i in range(rates.looks)}
        for step, batch in enumerate(batches, 1):
            self._again_with_less(lambda batch=batch: self._learn(batch), learning.forget)  # type: ignore[misc]
            learning.step(step, rates.pace(step, len(batches)))
            if step in at:
                looks.append(self._divergence(held))
                if looks[-1] < min(looks[:-1]):
                    taken = len(looks) - 1
                    learning.keep()
            on_step(step, len(batches))
        learning.go_back()
        return Distilled(looks, taken, len(batches), len(held))

    def _batches(self, samples: Sequence[int], rates: Rates) -> Iterator[list[int]]:
        """Yield the samples of each step, in another order each epoch."""
        random = torch.Generator().manual_seed(rates.seed)
        tokens = math.ceil(sum(self.lessons.tokens(i) for i in samples) / rates.steps)
        for _ in range(rates.epochs):
            order = torch.randperm(len(samples), generator=random).tolist()
            yield from self.lessons.batches([samples[i] for i in order], tokens)

    def _learn(self, batch: Sequence[int]) -> None:
        """Add up a batch's gradients, some samples at a time."""
        total = max(1, self.lessons.count(batch))
        for part in self.lessons.batches(batch, self.chunk_tokens):
            states, true, rows = self.lessons.take(part, self.model.device)
            kept: list[Tensor] = []
            hidden = self.model.forward(states, kept)
            gradient = torch.zeros_like(hidden)
            gradient[rows] = self.head.pull(true, hidden[rows]).div_(total)
            self.model.backward(states, kept, gradient)

    def _divergence(self, samples: Sequence[int]) -> float:
        """Return nats a token on some samples."""

        def measured() -> float:
            total = 0.0
            for part in self.lessons.batches(samples, self.chunk_tokens):
                states, true, rows = self.lessons.take(part, self.model.device)
                total += float(self.head.divergence(true, self.model.forward(states)[rows]).double().sum())
            return total / max(1, self.lessons.count(samples))

        return self._again_with_less(measured, lambda: None)

    def _again_with_less(self, work: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """Do some work; out of memory, undo and do it again with fewer tokens at a time.

        Raises:
            ResourceError: that is no help.
        """
        with contextlib.suppress(torch.OutOfMemoryError):
            return work()
        undo()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.chunk_tokens // 2 < _LEAST_TOKENS:
            raise ResourceError(
                f"out of memory on {self.model.device} in distillation, even with {self.chunk_tokens} tokens "
                "at a time: free memory there and run the same command again, or add --no-distill to a new one"
            )
        self.chunk_tokens //= 2
        tokens = f"{self.chunk_tokens} tokens at a time"
        self.on_note(f"{self.model.device} is out of memory: distillation goes on with {tokens}")
        return self._again_with_less(work, undo)


def distill(
    model: Student,
    head: Head,
    lessons: Lessons,
    rates: Rates,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Distilled:
    """Train what can learn in a model; it is left in the state that did best on samples held back, the start included.

    Args:
        model: as it was written.
        head: the source's.
        lessons: two samples at least.
        rates: how fast, how long, and in which order.
        on_step: called with the steps made and all that there are.
        on_note: told when memory backs off.

    Raises:
        ResourceError: memory that no back-off could save.
    """
    with _repeatable():
        return _Loop(model, head, lessons, on_note).run(rates, on_step)


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Have a GPU add up gradients in an order of its own in the block: attention's backward pass does not by itself."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        # of what has no such way, which for products is a matter of several streams: here is one
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # that is for finding faults, and takes time
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warned)
            memory.fill_uninitialized_memory = filled
