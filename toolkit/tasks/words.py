"""The words that images show: real ones seen in training, real ones kept back, and made-up ones.

A reader that only remembers its training words is useless, so most words it trains on are made up: they teach letters.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from toolkit.paths import demo_checkpoint

__all__ = ["UNSEEN_WORDS", "WORDS", "pseudo_word"]

_HERE = Path(__file__).parent
_ALL = sorted((_HERE / "words.txt").read_text(encoding="ascii").split())
_SHORT = [word for word in _ALL if len(word) <= 5]

#: Words of 3 to 5 letters that no training image shows.
UNSEEN_WORDS: tuple[str, ...] = tuple(_SHORT[4::6])
#: Words of 3 to 6 letters that training images show.
WORDS: tuple[str, ...] = tuple(word for word in _ALL if word not in set(UNSEEN_WORDS))

_KEPT_BACK = frozenset(UNSEEN_WORDS)
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SHORTEST, _LONGEST = 3, 6


@cache
def _pieces() -> tuple[str, ...]:
    """Return the tokenizer's pieces of 2 to 5 lower-case letters: made-up words must use all of them."""
    vocabulary: dict[str, int] = json.loads((demo_checkpoint() / "vocab.json").read_text(encoding="utf-8"))
    return tuple(sorted(p for p in vocabulary if 2 <= len(p) <= 5 and p.isascii() and p.isalpha() and p.islower()))


def _letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(length))


def _syllables(rng: random.Random, length: int) -> str:
    word = ""
    while len(word) < length:
        word += rng.choice(_CONSONANTS) + rng.choice(_VOWELS)
        if rng.random() < 0.4:
            word += rng.choice(_CONSONANTS)
    return word[:length]


def _splice(rng: random.Random) -> str:
    head, tail = rng.choice(WORDS), rng.choice(WORDS)
    return head[: rng.randint(1, len(head))] + tail[-rng.randint(1, len(tail)) :]


def _joined_pieces(rng: random.Random, length: int) -> str:
    word = ""
    while len(word) < length:
        word += rng.choice(_pieces()) if rng.random() < 0.7 else rng.choice(_LETTERS)
    return word


def _one_letter_off(rng: random.Random) -> str:
    """Change one letter of a real word, so that the eye and not the memory has to decide."""
    word = rng.choice(WORDS)
    at = rng.randrange(len(word))
    return word[:at] + rng.choice(_LETTERS) + word[at + 1 :]


def pseudo_word(rng: random.Random) -> str:
    """Make up a word of 3 to 6 letters that is not one of ``UNSEEN_WORDS``."""
    while True:
        length = rng.randint(_SHORTEST, _LONGEST)
        kind = rng.random()
        if kind < 0.25:
            word = _letters(rng, length)
        elif kind < 0.45:
            word = _syllables(rng, length)
        elif kind < 0.65:
            word = _splice(rng)
        elif kind < 0.85:
            word = _joined_pieces(rng, length)
        else:
            word = _one_letter_off(rng)
        word = word[:_LONGEST]
        if len(word) >= _SHORTEST and word not in _KEPT_BACK:
            return word
