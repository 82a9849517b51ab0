"""The samples on two ways through the decoder layers: the source's, and those that are quantized already."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.states import Batch, Inputs, States

__all__ = ["PairedStream", "TakePair"]

#: Is given what a unit is given in the source and behind quantized layers, and which tokens they are; it may overwrite
#: ``x``.
TakePair = Callable[[Inputs, Inputs, slice], None]


class _Seen(Exception):
    """Ends a layer's forward pass at the unit whose input was wanted."""


class PairedStream:
    """A stream's samples once more, on their way through quantized layers.

    ``source``: the stream, whose samples pass through the source's layers. ``calibration``, ``held``: the same samples
    behind the layers that are quantized.
    """

    def __init__(self, source: LayerStream, residuals: Mapping[str, str]) -> None:
        """Args: the stream, its samples captured; by the units whose outputs are added to something, the name of the
        module that is given that.
        """
        self.source = source
        self.residuals = residuals
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
    def compare_held(self, layer: nn.Module, states: States, quantized: nn.Module, unit: str) -> tuple[Inputs, Inputs]:
        """Return what a unit is given of the held samples in the source, and behind quantized layers; in float32.

        Args:
            layer, states: the source's, and the held samples before it. quantized, unit: as for :meth:`compare`.
        """
        found = []
        for module, before in ((layer, states), (quantized, self.held)):
            batches = before.batches(self.source.chunk_tokens)
            parts = [self._input_of(module, before, batch, unit, narrow=False) for batch in batches]
            residuals = [part.residual for part in parts if part.residual is not None]
            found.append(Inputs(torch.cat([part.x for part in parts]), torch.cat(residuals) if residuals else None))
        return found[0], found[1]

    def advance(self, quantized: nn.Module) -> None:
        """Pass the samples through a layer that is quantized whole."""
        self.source.pass_through(quantized, self.calibration, narrow=self.source.narrow)
        self.source.pass_through(quantized, self.held)
        self.calibration.add()
        self.held.add()

    def make_room(self) -> bool:
        """Let hidden states wait in host memory; returns False when all do already."""
        freed = self.source.make_room()
        if self.calibration.hidden.device.type == "cpu":
            return freed
        self.calibration.hidden = self.calibration.hidden.cpu()
        self.calibration.added = tuple(level.cpu() for level in self.calibration.added)
        torch.cuda.empty_cache()
        return True

    def _input_of(self, layer: nn.Module, states: States, batch: Batch, unit: str, *, narrow: bool) -> Inputs:
        """Return what a unit is given of a micro-batch."""
        seen: list[torch.Tensor] = []

        def look(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0][0])

        def look_and_end(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            look(module, arguments)
            raise _Seen

        handles = [layer.get_submodule(self.source.units[unit][0]).register_forward_pre_hook(look_and_end)]
        if unit in self.residuals:
            handles.append(layer.get_submodule(self.residuals[unit]).register_forward_pre_hook(look))
        try:
            with contextlib.suppress(_Seen), torch.autocast("cuda", torch.bfloat16, enabled=narrow):
                layer(**states.inputs(batch, self.source.device))
        finally:
            for handle in handles:
                handle.remove()
        return Inputs(seen[-1], seen[0] if unit in self.residuals else None)


def _copied(states: States) -> States:
    """Return the samples with hidden states of their own."""
    found = copy.copy(states)
    found.hidden = states.hidden.clone()
    return found
