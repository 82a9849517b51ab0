"""The samples on two ways through the decoder layers: the source's, and those that are quantized already."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.states import Batch, States

__all__ = ["PairedStream", "TakePair"]

#: Is given a unit's input [n, K] in the source and behind quantized layers, and which tokens they are; it may overwrite
#: them.
TakePair = Callable[[torch.Tensor, torch.Tensor, slice], None]


class _Seen(Exception):
    """Ends a layer's forward pass at the unit whose input was wanted."""


class PairedStream:
    """A stream's samples once more, on their way through quantized layers.

    ``source``: the stream, whose samples pass through the source's layers. ``calibration``, ``held``: the same samples
    behind the layers that are quantized.
    """

    def __init__(self, source: LayerStream) -> None:
        """Args: the stream, its samples captured."""
        self.source = source
        self.calibration = _copied(source.calibration)
        self.held = _copied(source.held)

    @torch.no_grad()
    def compare(self, layer: nn.Module, quantized: nn.Module, unit: str, take: TakePair) -> None:
        """Show a unit's input on both ways, micro-batch after micro-batch; the samples stay where they are.

        Args:
            layer: the source's.
            quantized: the same layer, as far as it is quantized.
            unit: whose input is wanted; nothing behind it is run.
            take: is given both.
        """
        source, first = self.source, 0
        while first < len(source.calibration.lengths):
            batch = source.calibration.batch(first, source.chunk_tokens)
            pair = None
            with contextlib.suppress(torch.OutOfMemoryError):
                pair = (
                    self._input_of(layer, source.calibration, batch, unit, narrow=source.narrow),
                    self._input_of(quantized, self.calibration, batch, unit, narrow=source.narrow),
                )
            if pair is None:
                source.back_off(batch.stop - batch.start if len(batch.lengths) == 1 else None)
                continue
            take(*pair, slice(batch.start, batch.stop))
            first += len(batch.lengths)

    @torch.no_grad()
    def held_inputs(self, quantized: nn.Module, unit: str) -> torch.Tensor:
        """Return a unit's input [n, K] of the held samples behind quantized layers, in float32."""
        batches = self.held.batches(self.source.chunk_tokens)
        return torch.cat([self._input_of(quantized, self.held, batch, unit, narrow=False) for batch in batches])

    def advance(self, quantized: nn.Module) -> None:
        """Pass the samples through a layer that is quantized whole."""
        self.source.pass_through(quantized, self.calibration, narrow=self.source.narrow)
        self.source.pass_through(quantized, self.held)

    def make_room(self) -> bool:
        """Let hidden states wait in host memory; returns False when all do already."""
        freed = self.source.make_room()
        if self.calibration.hidden.device.type == "cpu":
            return freed
        self.calibration.hidden = self.calibration.hidden.cpu()
        torch.cuda.empty_cache()
        return True

    def _input_of(self, layer: nn.Module, states: States, batch: Batch, unit: str, *, narrow: bool) -> torch.Tensor:
        """Return a unit's input [n, K] of a micro-batch."""
        seen: list[torch.Tensor] = []

        def look(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0][0])
            raise _Seen

        handle = layer.get_submodule(self.source.units[unit][0]).register_forward_pre_hook(look)
        try:
            with contextlib.suppress(_Seen), torch.autocast("cuda", torch.bfloat16, enabled=narrow):
                layer(**states.inputs(batch, self.source.device))
        finally:
            handle.remove()
        return seen[0]


def _copied(states: States) -> States:
    """Return the samples with hidden states of their own."""
    found = copy.copy(states)
    found.hidden = states.hidden.clone()
    return found
