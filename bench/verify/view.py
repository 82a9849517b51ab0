"""What `qvl verify` prints: a table of chats, then why they differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from bench.verify.compare import Images, Sample
from toolkit.tables import table

if TYPE_CHECKING:
    from bench.verify.run import Verified

__all__ = ["render"]


def render(verified: Verified) -> RenderableType:
    """Lay out what was found for the terminal."""
    shown = table(["chat", "image", "prompt", "first token", "greedy", ""], (3, 4), wrapped=range(6))
    for sample in verified.samples:
        verdict = Text("same", "green") if sample.same else Text(", ".join(_kinds(sample)), "red")
        first = "" if sample.first_token is None else f"{sample.first_token:.3f}"
        greedy = f"{sample.equal} of {sample.compared}" if sample.compared else ""
        shown.add_row(sample.where, "\n".join(map(_image, sample.images)), _prompt(sample), first, greedy, verdict)
    rounding = ", ".join(f"{name} {moved:.3f}" for name, moved in verified.rounding.found.items())
    legend = Text(
        "image: as given, as resized, tokens. first token: the furthest that log-probabilities are apart, in nats; "
        f"rounding alone moves them by {rounding} in transformers (the server is taken to compute in "
        f"{verified.dtype}). greedy: tokens until they part.",
        "dim",
    )
    return Group(shown, "", legend, *_causes(verified))


def _kinds(sample: Sample) -> list[str]:
    return list(dict.fromkeys(cause.kind for cause in sample.causes if cause.kind != "tie"))


def _image(image: Images) -> str:
    tokens = f"{image.tokens}" if image.served in (None, image.tokens) else f"{image.tokens} against {image.served}"
    return f"{image.width}x{image.height}, {image.resized[0]}x{image.resized[1]}, {tokens}"


def _prompt(sample: Sample) -> str:
    ours, theirs = sample.prompt_tokens
    return f"{ours} tokens" if sample.prompts_equal else f"{ours} against {theirs} tokens"


def _causes(verified: Verified) -> Iterator[RenderableType]:
    """Yield each cause once, with the chats it was seen in."""
    said: dict[str, list[tuple[str, str]]] = {}
    for sample in verified.samples:
        for cause in sample.causes:
            said.setdefault(cause.kind, []).append((sample.where, cause.message))
    for kind, seen in said.items():
        where, message = seen[0]
        more = f" (and in {len(seen) - 1} more)" if seen[1:] else ""
        yield Text(f"{kind}: {where}: {message}{more}", "dim" if kind == "tie" else "yellow")
    if verified.same:
        yield Text("transformers and the server answer alike", "green")
