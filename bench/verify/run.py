"""Compare a server's answers with transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench.verify.compare import (
    Cause,
    Images,
    Rounding,
    Sample,
    image_tokens,
    parting,
    prompt_causes,
    spread,
)
from bench.verify.reference import Prompt, Reference, Tokens
from bench.verify.samples import Asked
from bench.verify.served import Served

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Verified", "verify"]

#: By name, the precisions in which a server computes.
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Verified:
    """What was found."""

    samples: list[Sample]
    #: The precision that the server is taken to compute in.
    dtype: str
    rounding: Rounding

    @property
    def same(self) -> bool:
        """Whether all answers are alike, ties apart."""
        return all(sample.same for sample in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; distances in nats."""
        return {
            "same": self.same,
            "dtype": self.dtype,
            "rounding": self.rounding.found,
            "samples": [{**asdict(sample), "same": sample.same} for sample in self.samples],
        }


@dataclass(frozen=True)
class _Answered:
    """transformers' side of one chat."""

    own: Prompt
    #: What both sides' answers are compared on: the server's tokens where only those around the images differ.
    shared: Prompt | None
    #: Log-probabilities of the first token, over the vocabulary.
    first: list[float] | None
    tokens: Tokens | None
    default: Tokens | None


def verify(
    checkpoint: Checkpoint,
    chats: Sequence[tuple[Asked, Served]],
    *,
    dtype: str,
    device: str = "cpu",
    on_sample: Callable[[str], None] = lambda where: None,
) -> Verified:
    """Run a checkpoint through transformers and compare what a server answered.

    Args:
        chats: what was asked, and what the server answered.
        dtype: "float16", "bfloat16" or "float32", what the server computes in if all is well.
        device: as torch names it; the model takes 4 bytes a weight there.
        on_sample: told the chat that is next.
    """
    reference = Reference(checkpoint, device)
    found = []
    for asked, served in chats:
        on_sample(asked.where)
        found.append(_answered(reference, asked, served))
    rounding = _rounding(reference, found, dtype, on_sample)
    samples = []
    for (asked, served), ours in zip(chats, found, strict=True):
        sample = _compared(reference, asked, served, ours)
        if sample.first_token is not None and (cause := rounding.explains(sample.first_token, dtype)):
            sample.causes.append(cause)
        _explain_tokens(reference, sample, served, ours, rounding.allowed(dtype))
        if not sample.same and asked.remarks:
            sample.causes.append(Cause("image reading", f"{', '.join(asked.remarks)}: not all tools read that alike"))
        samples.append(sample)
    return Verified(samples, dtype, rounding)


def _answered(reference: Reference, asked: Asked, served: Served) -> _Answered:
    prompt = reference.prompt(asked)
    image = _image_token(reference)
    if image_tokens(prompt.ids, image) != image_tokens(served.prompt, image):
        return _Answered(prompt, None, None, None, None)
    shared = prompt if prompt.ids == served.prompt else reference.with_ids(prompt, served.prompt)
    length = max(len(served.tokens), len(served.default), 1)
    tokens = reference.answer(shared, length)
    penalty = reference.repetition_penalty
    default = tokens if penalty == 1.0 else reference.answer(shared, length, penalty)
    return _Answered(prompt, shared, reference.first(shared).tolist(), tokens, default)


def _rounding(
    reference: Reference, found: Sequence[_Answered], dtype: str, on_sample: Callable[[str], None]
) -> Rounding:
    """Measure how far 16 bits move the first tokens of this model, on these chats."""
    moved: dict[str, float] = {}
    for name in sorted(_DTYPES, key=lambda name: name != dtype):
        on_sample(f"what {name} rounds")
        reference.rounded(_DTYPES[name])
        distances = [
            spread(each.first, _likely(reference.first(each.shared)))
            for each in found
            if each.shared is not None and each.first is not None
        ]
        moved[name] = max(distances, default=0.0)
    return Rounding(moved)


def _likely(logprobs: torch.Tensor) -> dict[int, float]:
    values, ids = logprobs.topk(min(20, len(logprobs)))
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def _image_token(reference: Reference) -> int:
    checkpoint = reference.checkpoint
    return int(checkpoint.config.get("image_token_id", checkpoint.family.vision_tokens["image_token_id"][1]))


def _compared(reference: Reference, asked: Asked, served: Served, ours: _Answered) -> Sample:
    """Return one chat with what its prompts tell, and the distances."""
    checkpoint, mark = reference.checkpoint, _image_token(reference)
    decode = reference.processor.tokenizer.decode
    pixels = checkpoint.family.token_pixels(checkpoint.vision)
    counts, theirs = image_tokens(ours.own.ids, mark), image_tokens(served.prompt, mark)
    patch = checkpoint.vision.patch
    seen: Sequence[int | None] = theirs if len(theirs) == len(counts) else [None] * len(counts)
    images = [
        Images(*image.size, (columns * patch, rows * patch), count, there)
        for image, (rows, columns), count, there in zip(asked.images, ours.own.grids, counts, seen, strict=True)
    ]
    causes = list(prompt_causes(ours.own.ids, served.prompt, mark, pixels, decode))
    first, tokens = ours.first, ours.tokens
    parted = parting(tokens.ids, tokens.margins, served.tokens, reference.ends) if tokens else None
    compared = min(len(tokens.ids), len(served.tokens)) if tokens else 0
    return Sample(
        where=asked.where,
        images=images,
        prompt_tokens=(len(ours.own.ids), len(served.prompt)),
        prompts_equal=ours.own.ids == served.prompt,
        first_token=None if first is None else spread(first, served.first),
        equal=parted.at if parted else compared,
        compared=compared,
        parting=parted,
        answers=(decode(tokens.ids) if tokens else "", decode(served.tokens)),
        causes=causes,
    )


def _explain_tokens(reference: Reference, sample: Sample, served: Served, ours: _Answered, allowed: float) -> None:
    """Add what makes tokens part where first tokens are alike: a tie, something later, or the server's defaults."""
    decode, parted = reference.processor.tokenizer.decode, sample.parting
    explained = any(cause.kind in ("dtype", "kernel or weights") for cause in sample.causes)
    if parted is not None and not explained:
        two = " and ".join(
            "the end" if token is None else repr(decode([token])) for token in (parted.ours, parted.theirs)
        )
        how = f"greedy answers part after {parted.at} tokens, between {two}"
        if parted.margin <= 2 * allowed:
            sample.causes.append(
                Cause("tie", f"{how}: transformers finds them {parted.margin:.3f} nats apart, which rounding decides")
            )
        else:
            sample.causes.append(
                Cause(
                    "later tokens",
                    f"{how}, {parted.margin:.2f} nats apart, though first tokens are alike: a KV cache in 8 bits, "
                    "speculative decoding, or a kernel for one row",
                )
            )
    if ours.default is None or parted is not None:
        return
    other = parting(ours.default.ids, ours.default.margins, served.default, reference.ends)
    if other is not None and other.margin > 2 * allowed:
        penalty = reference.repetition_penalty
        says = f"repetition_penalty {penalty:g}" if penalty != 1.0 else "nothing that changes greedy answers"
        sample.causes.append(
            Cause(
                "sampling defaults",
                f"with sampling set the answers are alike, with the server's defaults they part after {other.at} "
                f"tokens: generation_config.json says {says}, and the server has something else "
                "(--generation-config, --override-generation-config)",
            )
        )
