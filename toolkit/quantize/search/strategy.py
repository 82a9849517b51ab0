"""What a search of one decoder layer is given, what it decides, and what all ways of searching have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from toolkit.formats.packing import QuantizedLinear, dequantize

if TYPE_CHECKING:
    from toolkit.models.family import Family
    from toolkit.quantize.stream.states import Held

__all__ = ["LayerTask", "SearchSettings", "Searched", "Strategy", "linear"]


@dataclass(frozen=True)
class SearchSettings:
    """What holds for all layers.

    ``group_size``, ``bits``: of the grid. ``norm_dtype``: dtype that norm weights are saved in; scales are corrected
    for the rounding it brings. ``clip``: search for clipped ranges too. ``rounding``: "nearest" or "compensated".
    ``scale``: search for AWQ's scales.
    """

    family: Family
    group_size: int
    bits: int
    norm_dtype: torch.dtype
    clip: bool = True
    rounding: str = "nearest"
    scale: bool = True


@dataclass(frozen=True)
class LayerTask:
    """One decoder layer to search, which is to be left as it is.

    ``layer``: transformers' module, float32. ``held``: samples kept out of the search, to check it on. ``skip``: local
    names of linears to leave in 16 bits. ``clock``: told the name of each step when it is over.
    """

    index: int
    layer: nn.Module
    held: Held
    skip: frozenset[str] = frozenset()
    clock: Callable[[str], None] = lambda step: None


@dataclass
class Searched:
    """What a search decided for one layer.

    ``linears``: rounded weights, in the layer's scaled coordinates. ``others``: norms and biases that go with them.
    ``scales``: [K] by unit, what its inputs are divided by. ``rows``: [N, 1] by linear, what its outputs are.
    ``choices``: by linear, in words, what was chosen.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)

    def effective(self, unit: str, name: str) -> torch.Tensor:
        """Return the weight [N, K] float32 that a linear stands for, in the source's coordinates."""
        weight = dequantize(self.linears[name], torch.float32).div_(self.scales[unit])
        return weight.mul_(self.rows[name]) if name in self.rows else weight


class Strategy(Protocol):
    """A way of searching layers."""

    #: Whether a search passes the calibration samples on to the next layer; else its caller has to.
    advances: bool

    def search(self, task: LayerTask) -> Searched:
        """Choose scales, clips and values for a layer."""
        ...


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return the layer's linear module of that local name."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module
