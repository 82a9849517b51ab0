"""The output head's share of a quantization: searched behind the last layer, and written as the journal's last part."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from toolkit.quantize.parts import write_layer
from toolkit.quantize.tower import stage_numbers

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe
    from toolkit.quantize.search.strategy import SearchSettings
    from toolkit.quantize.stream.paired import PairedStream
    from toolkit.quantize.stream.passing import LayerStream

__all__ = ["HEAD", "head_number", "quantize_head"]

#: Its module in the file, a tied one too.
HEAD = "lm_head"


def head_number(checkpoint: Checkpoint, recipe: Recipe) -> int | None:
    """Return the journal's number of the output head, the last; None where it stays in 16 bits."""
    return checkpoint.num_layers + len(stage_numbers(checkpoint, recipe)) if recipe.lm_head else None


def quantize_head(
    checkpoint: Checkpoint,
    recipe: Recipe,
    directory: Path,
    stream: LayerStream,
    settings: SearchSettings,
    paired: PairedStream | None,
) -> float:
    """Search the head on samples that stand behind the last layer, and write it.

    Args:
        checkpoint: the source.
        recipe: what is asked.
        directory: the journal's.
        stream: the samples.
        settings: what holds for all linears.
        paired: the samples behind the quantized layers, where the search is thorough.

    Returns:
        the relative squared error of logits at held text tokens.
    """
    import torch

    from toolkit.formats.packing import join_outputs, named, pack_as
    from toolkit.quantize.search.head import LastNorm, search_head

    norm = checkpoint.get(f"{checkpoint.language_prefix}norm.weight").to(stream.device, torch.float32)
    last = LastNorm(norm, float(checkpoint.text_config["rms_norm_eps"]))
    packed, choices = [], Counter[str]()
    wrong = signal = 0.0
    for piece in search_head(checkpoint.get(checkpoint.head_name), last, stream, settings, paired):
        packed.append(pack_as(recipe.format, piece.values).to(torch.device("cpu")))
        choices[piece.choice] += len(piece.values.values)
        wrong, signal = wrong + piece.wrong, signal + piece.signal
    tensors = named(recipe.format, HEAD, join_outputs(recipe.format, packed))
    error = wrong / max(signal, 1e-30)
    number = head_number(checkpoint, recipe)
    assert number is not None
    write_layer(
        directory, number, tensors, {"module": HEAD, "relative_error": error, "rows": dict(sorted(choices.items()))}
    )
    return error
