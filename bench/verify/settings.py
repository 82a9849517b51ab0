"""What `qvl verify` is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from bench.verify.samples import QUESTION
from toolkit.options import Option, Settings

__all__ = ["VerifySettings"]


class VerifySettings(Settings):
    """Of one comparison."""

    url: Annotated[str | None, Option("A server that runs already; without it one is started, and stopped.")] = None
    name: Annotated[str | None, Option("The model's name in that server; default its first.")] = None
    images: Annotated[
        Path | None,
        Option("JSONL manifest of chats, or a directory of images; default drawn ones.", metavar="FILE|DIR"),
    ] = None
    question: Annotated[str, Option("Asked about each image of a directory.")] = QUESTION
    samples: Annotated[int, Option("Chats to compare, the first ones.", least=1)] = 8
    tokens: Annotated[int, Option("Greedy tokens to compare, at most.", least=1)] = 16
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        Option("What the server computes in; default what `qvl serve` would take."),
    ] = None
    device: Annotated[str | None, Option("Where transformers runs: cpu, cuda; default cuda where it is.")] = None
