"""What is equal between transformers and a server, what is not, and what makes the difference where that can be told.

Prompts are compared token by token: images that come to another number of tokens were brought to another size, other
tokens around them are another chat template. Where prompts are equal, the first token's log-probabilities say whether
the same model answered: they are held against what rounding alone does to this model on these images, measured by
running transformers itself in 16 bits. Greedy tokens are compared until they part; where the model itself hardly
preferred the one to the other, that is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "ALLOWED",
    "Cause",
    "Images",
    "Parting",
    "Rounding",
    "Sample",
    "image_tokens",
    "parting",
    "prompt_causes",
    "spread",
]

#: How many times what 16 bits move a log-probability in transformers a server may be off by: it sums in another order.
ALLOWED = 3.0
#: Nats that are never told apart, in whatever precision.
_LEAST = 0.01
#: Tokens shown around the first that differs.
_AROUND = 8


@dataclass(frozen=True)
class Cause:
    """Why answers differ."""

    #: "image size", "chat template", "dtype", "kernel or weights", "sampling defaults", "later tokens"; "tie" is none.
    kind: str
    message: str


@dataclass(frozen=True)
class Images:
    """An image on both sides."""

    width: int
    height: int
    #: Pixels after the processor brought it to size, width and height.
    resized: tuple[int, int]
    tokens: int
    #: None: the prompts don't have as many images.
    served: int | None


@dataclass(frozen=True)
class Parting:
    """Where two greedy answers part."""

    #: Tokens before it, which are equal.
    at: int
    #: None: that side's answer ended.
    ours: int | None
    theirs: int | None
    #: By how much transformers preferred its token to the next one, in nats.
    margin: float


@dataclass(frozen=True)
class Sample:
    """One chat, compared."""

    where: str
    images: list[Images]
    #: Tokens of the prompt, in transformers and in the server.
    prompt_tokens: tuple[int, int]
    prompts_equal: bool
    #: The furthest that log-probabilities of the likeliest first tokens are apart, in nats; None: not comparable.
    first_token: float | None
    #: Greedy tokens: how many are equal, and of how many.
    equal: int
    compared: int
    parting: Parting | None
    answers: tuple[str, str]
    causes: list[Cause] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both sides answer alike, ties apart."""
        return all(cause.kind == "tie" for cause in self.causes)


@dataclass(frozen=True)
class Rounding:
    """How far rounding alone moves this model's log-probabilities: the largest over all chats, in nats, by dtype."""

    found: dict[str, float]

    def allowed(self, dtype: str) -> float:
        """Return how far apart equal models may be when a server computes in ``dtype``."""
        return ALLOWED * self.found.get(dtype, 0.0) + _LEAST

    def explains(self, distance: float, dtype: str) -> Cause | None:
        """Return why log-probabilities are so far apart where ``dtype`` does not make it; None: it does."""
        if distance <= self.allowed(dtype):
            return None
        for other in self.found:
            if other != dtype and distance <= self.allowed(other):
                return Cause(
                    "dtype",
                    f"first tokens are {distance:.3f} nats apart: more than {dtype} does ({self.allowed(dtype):.3f}), "
                    f"no more than {other} does ({self.allowed(other):.3f}). Does the server compute in {other}?",
                )
        return Cause(
            "kernel or weights",
            f"the prompts are equal and first tokens {distance:.3f} nats apart, more than rounding does "
            f"({max(map(self.allowed, (dtype, *self.found))):.3f}): a kernel, other weights than these, an adapter, or "
            "an image that was read in another way",
        )


def spread(ours: Sequence[float] | Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """Return the furthest that two sides' log-probabilities are apart, over one side's likeliest tokens.

    Tokens that are most unlikely count as well: where a model is sure, they are all that shows how it computes.
    """
    return max((abs(ours[token] - value) for token, value in theirs.items()), default=0.0)


def parting(
    ours: Sequence[int], margins: Sequence[float], theirs: Sequence[int], ends: Sequence[int]
) -> Parting | None:
    """Return where two answers part; None: nowhere, as far as the shorter goes that was not ended by its model.

    Args:
        ours: with the margin of each token. theirs: of the server.
        ends: tokens that end an answer; servers may leave the last one out.
    """
    for at, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return Parting(at, a, b, margins[at])
    at = min(len(ours), len(theirs))
    if len(theirs) < len(ours) and ours[at] not in ends:
        return Parting(at, ours[at], None, margins[at])
    if len(ours) < len(theirs) and ours and ours[-1] in ends:
        return Parting(at, None, theirs[at], margins[-1])
    return None


def prompt_causes(
    ours: Sequence[int], theirs: Sequence[int], image: int, pixels: int, text: Callable[[Sequence[int]], str]
) -> Iterator[Cause]:
    """Yield why two prompts differ; nothing where they are equal.

    Args:
        image: the token that stands for a part of an image. pixels: how many pixels that part has.
        text: decodes tokens.
    """
    (words, counts), (other_words, other_counts) = _folded(ours, image), _folded(theirs, image)
    if len(counts) == len(other_counts):
        for number, (a, b) in enumerate(zip(counts, other_counts, strict=True), 1):
            if a != b:
                yield Cause(
                    "image size",
                    f"image {number} comes to {a} tokens in transformers ({a * pixels:,} pixels), to {b} in the server "
                    f"({b * pixels:,}): other min_pixels or max_pixels (--mm-processor-kwargs), or another "
                    "preprocessor_config.json",
                )
    if words != other_words:
        at = next((i for i, (a, b) in enumerate(zip(words, other_words, strict=False)) if a != b), None)
        start = max(0, (min(len(words), len(other_words)) if at is None else at) - 2)
        shown = [
            text([token for token in side[start : start + _AROUND] if token >= 0]) for side in (words, other_words)
        ]
        what = (
            "the same images" if len(counts) == len(other_counts) else f"{len(counts)} and {len(other_counts)} images"
        )
        yield Cause(
            "chat template",
            f"prompts differ around {what}, from word {start + 2 if at is None else at} on: {shown[0]!r} in "
            f"transformers, {shown[1]!r} in the server: another chat template (--chat-template), or another default "
            "system message",
        )


def image_tokens(ids: Sequence[int], image: int) -> list[int]:
    """Return how many tokens each image of a prompt has."""
    return _folded(ids, image)[1]


def _folded(ids: Sequence[int], image: int) -> tuple[list[int], list[int]]:
    """Return a prompt with -1 for each image, and each image's tokens."""
    words: list[int] = []
    counts: list[int] = []
    for token in ids:
        if token != image:
            words.append(token)
        elif words and words[-1] == -1:
            counts[-1] += 1
        else:
            words.append(-1)
            counts.append(1)
    return words, counts
