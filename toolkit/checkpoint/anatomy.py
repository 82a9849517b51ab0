"""What a whole checkpoint consists of: the tensors its config calls for, and the part of the model each is in."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["PARTS", "Expected", "expected_tensors", "part_of"]

PARTS = ("vision", "embeddings", "layers", "norm", "lm_head", "other")


@dataclass(frozen=True)
class Expected:
    """A tensor the config calls for, by its full name in this checkpoint, in 16 bits."""

    name: str
    shape: tuple[int, ...]
    #: Whether it is the weight of a linear, of the language model or the vision tower, which may be packed instead.
    linear: bool = False


def part_of(checkpoint: Checkpoint, name: str) -> str:
    """Return which of `PARTS` the tensor ``name`` belongs to."""
    if name.startswith(checkpoint.visual_prefix):
        return "vision"
    if name.startswith(f"{checkpoint.language_prefix}embed_tokens."):
        return "embeddings"
    if name.startswith("lm_head."):
        return "lm_head"
    if name.startswith(checkpoint.layers_prefix):
        return "layers"
    return "norm" if name.startswith(f"{checkpoint.language_prefix}norm.") else "other"


def expected_tensors(checkpoint: Checkpoint) -> list[Expected]:
    """Return every tensor the config calls for, with its 16-bit shape, as the checkpoint's family defines them."""
    family, text, language = checkpoint.family, checkpoint.text_config, checkpoint.language_prefix
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    found = [Expected(f"{language}embed_tokens.weight", (vocab, hidden)), Expected(f"{language}norm.weight", (hidden,))]
    if not checkpoint.tied_lm_head:
        found.append(Expected("lm_head.weight", (vocab, hidden), linear=True))
    weights = {f"{name}.weight" for name in family.linears}
    layer_tensors = family.layer_tensors(text)
    for index in range(checkpoint.num_layers):
        layer = checkpoint.layer_prefix(index)
        found += [Expected(layer + name, shape, linear=name in weights) for name, shape in layer_tensors.items()]
    linears = {f"{name}.weight" for name in family.tower.modules(checkpoint.vision)}
    tower = family.vision_tensors(checkpoint.vision)
    return found + [Expected(checkpoint.visual_prefix + n, shape, linear=n in linears) for n, shape in tower.items()]
