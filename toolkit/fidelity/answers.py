"""Answers in calibration chats, what a model makes of them, and how far apart two models are there.

What is kept of a model is not its logits, of which a large vocabulary makes gigabytes, but what comes out behind its
last norm, [n, D]: logits are made a few tokens at a time, with the source's head but where a candidate has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from toolkit.errors import ManifestError
from toolkit.fidelity.turns import Turns

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample

__all__ = ["answer_tokens", "differs_by_answer", "final_states", "kl_by_answer", "predictions"]

#: Tokens whose logits are held at once.
_TOKENS = 256


def answer_tokens(ids: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Return which tokens [T] the assistant says: from after each opening to the next end, with that."""
    tokens, opening = ids.tolist(), list(turns.opening)
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for start in range(len(opening), len(tokens)):
        if tokens[start - len(opening) : start] == opening:
            stop = tokens.index(turns.end, start) + 1 if turns.end in tokens[start:] else len(tokens)
            found[start:stop] = True
    return found


def predictions(sample: PreparedSample, turns: Turns) -> torch.Tensor:
    """Return the positions [n] whose next token is an answer's; of a chat without answers, any text token.

    Raises ManifestError for a sample with nothing to predict.
    """
    ids = sample.inputs["input_ids"][0].cpu()
    wanted = answer_tokens(ids, turns)
    if not bool(wanted.any()):
        types = sample.inputs.get("mm_token_type_ids")
        wanted = torch.ones(len(ids), dtype=torch.bool) if types is None else types[0].cpu() == 0
    found = wanted[1:].nonzero().flatten()
    if not len(found):
        raise ManifestError(f"{sample.where}: there is nothing to predict in this chat")
    return found


@torch.no_grad()
def final_states(
    model: Any,
    samples: Sequence[PreparedSample],
    positions: Sequence[torch.Tensor],
    on_sample: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Return what comes out behind the last norm at some positions of each sample: float32 [n, D], on the CPU.

    Args:
        model: transformers' ``...ForConditionalGeneration``.
        samples: model inputs; each goes through alone.
        positions: by sample.
        on_sample: called with the number of samples done.
    """
    found = []
    for sample, where in zip(samples, positions, strict=True):
        inputs = {name: value.to(model.device) for name, value in sample.inputs.items()}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
        found.append(hidden[where.to(hidden.device)].float().cpu())
        if on_sample is not None:
            on_sample(len(found))
    return found


@torch.no_grad()
def differs_by_answer(
    reference: Sequence[torch.Tensor],
    candidate: Sequence[torch.Tensor],
    head: torch.Tensor,
    own: torch.Tensor | None = None,
) -> list[bool]:
    """Return of each sample whether another token is likeliest anywhere; the arguments are `kl_by_answer`'s."""
    weights = _weights(head, own)
    found = []
    for pair in zip(reference, candidate, strict=True):
        picks = [
            torch.cat([(part.to(weight.device) @ weight.t()).argmax(-1) for part in side.split(_TOKENS)])
            for side, weight in zip(pair, weights, strict=True)
        ]
        found.append(bool((picks[0] != picks[1]).any()))
    return found


@torch.no_grad()
def kl_by_answer(
    reference: Sequence[torch.Tensor],
    candidate: Sequence[torch.Tensor],
    head: torch.Tensor,
    own: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return KL(reference || candidate) in nats at every position of each sample: float64 [n] each.

    Args:
        reference, candidate: from `final_states`.
        head: [V, D], the output head; the work is done where it is, in float32.
        own: the candidate's; None: the same.
    """
    lengths = [len(states) for states in reference]
    before, after = torch.cat(list(reference)), torch.cat(list(candidate))
    found = []
    weights = _weights(head, own)
    for pair in zip(before.split(_TOKENS), after.split(_TOKENS), strict=True):
        sides = zip(pair, weights, strict=True)
        p, q = ((part.to(weight.device) @ weight.t()).log_softmax(-1) for part, weight in sides)
        found.append((p.exp() * (p - q)).double().sum(-1).clamp(min=0).cpu())
    return list(torch.cat(found).split(lengths))


def _weights(head: torch.Tensor, own: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the heads of the reference and of the candidate in float32, where the first is."""
    weight = head.float()
    return weight, weight if own is None else own.to(weight.device, torch.float32)
