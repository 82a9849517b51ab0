"""Questions as token ids, laid out exactly as the checkpoint's chat template lays them out.

A prompt is a prefix shared by all questions (system turn, start of the user's turn), the image's merged patches,
and a suffix: the question, the start of the assistant's turn and, in training, the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from toolkit.paths import demo_checkpoint

__all__ = ["END", "PAD", "Packed", "answer_text", "pack", "prefix"]

#: Ends the assistant's turn.
END = 1012
#: ``<|endoftext|>``: fills suffixes up; never a target.
PAD = 1010

_USER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(demo_checkpoint() / "tokenizer.json"))
    for content, expected in (("<|im_end|>", END), ("<|endoftext|>", PAD)):
        if tokenizer.token_to_id(content) != expected:
            raise ValueError(f"the embedded tokenizer gives {content} another id than {expected}")
    return tokenizer


def _ids(text: str) -> list[int]:
    return list(_tokenizer().encode(text, add_special_tokens=False).ids)


@cache
def prefix(image: bool) -> tuple[int, ...]:
    """Return the ids before the image, or before the question where there is none."""
    return tuple(_ids(_USER + ("<|vision_start|>" if image else "")))


@lru_cache(maxsize=20_000)
def _question_ids(question: str, image: bool) -> tuple[int, ...]:
    start = "<|vision_end|>" if image else ""
    return tuple(_ids(f"{start}{question}<|im_end|>\n<|im_start|>assistant\n"))


@dataclass(frozen=True, slots=True)
class Packed:
    """Suffixes of a batch of B questions, padded at their ends to S ids.

    ``ids`` int64 [B, S]; ``predicts`` bool [B, S] marks positions whose *next* id is part of an answer (or its end);
    ``starts`` int64 [B] is where each answer begins.
    """

    ids: npt.NDArray[np.int64]
    predicts: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]


def pack(
    questions: Sequence[str], answers: Sequence[str] | None, *, image: bool = True, length: int | None = None
) -> Packed:
    """Pack questions, with answers to train on or without (``None``) to decode from.

    ``length`` fixes S; without it S is the longest suffix. Raises ``ValueError`` when a suffix is longer.
    """
    heads = [_question_ids(question, image) for question in questions]
    tails = [[*_ids(answer), END] for answer in answers] if answers is not None else [[] for _ in heads]
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    if length is None:
        length = longest
    elif longest > length:
        raise ValueError(f"a suffix of {longest} ids does not fit {length}")
    ids = np.full((len(heads), length), PAD, np.int64)
    predicts = np.zeros((len(heads), length), np.bool_)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head)] = head
        ids[row, len(head) : len(head) + len(tail)] = tail
        predicts[row, len(head) - 1 : len(head) + len(tail) - 1] = bool(tail)
    return Packed(ids, predicts, np.array([len(head) for head in heads], np.int64))


def answer_text(ids: Sequence[int]) -> str:
    """Return the text of generated ids, up to the end of the turn."""
    kept = list(ids)
    if END in kept:
        kept = kept[: kept.index(END)]
    return str(_tokenizer().decode(kept, skip_special_tokens=True))
