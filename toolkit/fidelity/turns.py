"""How a chat template marks what the assistant says. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Turns"]


@dataclass(frozen=True)
class Turns:
    """How a chat template marks the assistant's turns: the ids before one, and the one that ends it."""

    opening: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """Return those of a Qwen tokenizer."""
        opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        return cls(tuple(opening), int(tokenizer.convert_tokens_to_ids("<|im_end|>")))
