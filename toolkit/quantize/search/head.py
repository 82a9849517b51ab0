"""The output head in 4 bits: a linear like any other, but for its rows, which are as many as there are tokens.

Its inputs are what comes out behind the last norm. Those of images' tokens never reach it in a server, and no answer is
predicted there, so text tokens alone count. Rows do not depend on each other: they are rounded `HEAD_ROWS` at a time,
each piece clipped or not and checked on the held tokens for itself. AWQ's scales are not searched for, as they would
have to be folded into the norm, and most of them lose their check under compensation anyway.

With ``--effort best`` the head is rounded on what reaches it behind the quantized layers, as their units are
(:mod:`toolkit.quantize.search.chained`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.formats.packing import QuantizedLinear, dequantize
from toolkit.quantize.search.chained import UnitRounding
from toolkit.quantize.search.gram import Moments, PairedMoments
from toolkit.quantize.search.rounding import Rounder, UnitWeights, round_unit
from toolkit.quantize.search.sizes import HEAD_ROWS
from toolkit.quantize.search.strategy import SearchSettings
from toolkit.quantize.stream.paired import PairedStream
from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.sizes import CHUNK_TOKENS
from toolkit.quantize.stream.states import Inputs, States

__all__ = ["HeadPiece", "LastNorm", "search_head"]


@dataclass(frozen=True)
class LastNorm:
    """The norm before the head: ``weight`` [D] float32 on the device where the head is searched, and its epsilon."""

    weight: Tensor
    eps: float

    def text(self, states: States) -> Iterator[Tensor]:
        """Yield what the head is given at the samples' text tokens, float32 [n, D], in the samples' order."""
        for part in (~states.vision).nonzero().flatten().split(CHUNK_TOKENS):
            hidden = states.hidden[0, part.to(states.hidden.device)].to(self.weight.device)
            yield nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class HeadPiece:
    """Some rows of the head, rounded: their values, how in words, and how far logits of the held tokens move.

    ``wrong``: squared error of the logits, summed; ``signal``: their squares, summed.
    """

    values: QuantizedLinear
    choice: str
    wrong: float
    signal: float


@torch.no_grad()
def search_head(
    weight: Tensor, norm: LastNorm, stream: LayerStream, settings: SearchSettings, paired: PairedStream | None = None
) -> Iterator[HeadPiece]:
    """Round the head, a piece of its rows after the other.

    Args:
        weight: [V, D] in any float dtype, anywhere.
        norm: before it.
        stream: whose samples stand behind the last layer.
        settings: what holds for all linears.
        paired: the samples behind the quantized layers, with which the search is thorough; None: it is not.
    """
    held = torch.cat(list(norm.text(stream.held)))
    rounded = _plainly(weight, norm, stream, held, settings)
    if paired is not None:
        rounded = _thoroughly(weight, norm, paired, held, settings)
    for rows, (values, choice) in zip(weight.split(HEAD_ROWS), rounded, strict=True):
        true = held @ rows.to(held.device, torch.float32).t()
        wrong = held @ dequantize(values, torch.float32).t() - true
        yield HeadPiece(values, choice, *(float(part.double().square().sum()) for part in (wrong, true)))


def _plainly(
    weight: Tensor, norm: LastNorm, stream: LayerStream, held: Tensor, settings: SearchSettings
) -> Iterator[tuple[QuantizedLinear, str]]:
    moments = Moments(weight.shape[1], stream.device, narrow=stream.narrow)
    for x in norm.text(stream.calibration):
        moments.add(x)
    moments.finish()
    rounder = Rounder(moments, settings)
    for rows in weight.split(HEAD_ROWS):
        part = rows.to(stream.device, torch.float32)
        unit = UnitWeights(part, [len(part)], part.new_ones(len(part), 1), held)
        found = round_unit(unit, rounder, torch.ones_like(moments.sizes))
        yield found.linears[0], found.choices[0]


def _thoroughly(
    weight: Tensor, norm: LastNorm, paired: PairedStream, held: Tensor, settings: SearchSettings
) -> Iterator[tuple[QuantizedLinear, str]]:
    stream = paired.source
    moments = PairedMoments(weight.shape[1], 0, stream.device, narrow=stream.narrow)
    for source, behind in zip(norm.text(stream.calibration), norm.text(paired.calibration), strict=True):
        moments.add_pair(Inputs(source), Inputs(behind))
    moments.finish()
    inputs = Inputs(held), Inputs(torch.cat(list(norm.text(paired.held))))
    for rows in weight.split(HEAD_ROWS):
        part = rows.to(stream.device, torch.float32)
        yield UnitRounding(part, [len(part)], moments, inputs, settings).run()[0]
