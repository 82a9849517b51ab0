"""The search for one stage of the vision tower: scales, clips and values from centred second moments, and biases.

As for decoder layers (:mod:`toolkit.quantize.search.moments`), but for what layer norms and biases give. Every linear
of a tower has a bias, so the mean of what rounding changes is taken out of it: with m the mean input and D what W
becomes too much of, y errs by D x, and b - D m leaves D (x - m). What is left to the search is then the covariance of
the inputs in place of their second moments (the bias correction of Nagel et al., arXiv 1906.04721, taken before the
rounding and not after it).

Scales are folded into a layer norm's weight and bias, or into the rows of a linear before; behind an activation there
are none. Where the merger puts several patches in a row, they share the norm before it, and so its scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.formats.packing import QuantizedLinear, dequantize
from toolkit.quantize.search.gram import Moments
from toolkit.quantize.search.grid import grid_steps
from toolkit.quantize.search.rounding import RoundedUnit, Rounder, UnitWeights, round_unit
from toolkit.quantize.search.scales import scale_candidates, screen, stride_of, weight_means
from toolkit.quantize.search.strategy import SearchSettings, linear
from toolkit.quantize.stream.tower import whole

if TYPE_CHECKING:
    from toolkit.models.family import Unit
    from toolkit.quantize.stream.passing import LayerStream

__all__ = ["CentredMoments", "StageSearched", "TowerSearch"]

#: Exponents of the scales that are tried.
_RATIOS = 20


class CentredMoments(Moments):
    """The covariance of a linear's inputs in the place of their second moments; ``mean`` [K] beside it."""

    def __init__(self, inputs: int, device: torch.device, *, narrow: bool = False) -> None:
        super().__init__(inputs, device, narrow=narrow)
        self.mean = torch.zeros(inputs, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens [n, K]."""
        if weights is not None:
            raise ValueError("patches all weigh the same")
        self.mean += x.sum(0, dtype=self.mean.dtype)
        super().add(x)

    def finish(self) -> None:
        """Divide by the number of tokens, fill in the lower half, take the mean out."""
        super().finish()
        self.mean = (self.mean / self.weight).float()
        self.second.addr_(self.mean, self.mean, alpha=-1)
        self.second.diagonal().clamp_(min=0)


@dataclass
class StageSearched:
    """What was decided for a stage: rounded linears, its other tensors, and how in words; see `Searched`.

    ``effective``: [N, K] by linear, the weight that its values stand for in the source's coordinates.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    effective: dict[str, torch.Tensor] = field(default_factory=dict)
    #: Biases that go with ``effective``.
    biases: dict[str, torch.Tensor] = field(default_factory=dict)


class TowerSearch:
    """Searches the stages of a vision tower."""

    def __init__(self, stream: LayerStream, settings: SearchSettings, packed: frozenset[str]) -> None:
        """Args.

        stream: the patches.
        settings: what holds for all stages; ``norm_dtype`` is that of the tower's norms.
        packed: names inside their stage of the linears to quantize, "attn.qkv" and "mlp.0", say.
        """
        self.stream = stream
        self.settings = settings
        self.packed = packed

    @torch.no_grad()
    def search(self, stage: nn.Module, units: Sequence[Unit], held: dict[str, torch.Tensor]) -> StageSearched:
        """Search a stage; the patches that are searched on stand before the next one afterwards.

        Args:
            stage: a block or a merger, float32; it is left as it is.
            units: its linears.
            held: by unit, inputs [n, K] that check the search.
        """
        wanted = [unit for unit in units if unit.name in self.packed]
        moments = {
            unit.name: CentredMoments(
                linear(stage, unit.name).in_features, self.stream.device, narrow=self.stream.narrow
            )
            for unit in wanted
        }

        def take(seen: dict[str, torch.Tensor], _: slice) -> None:
            for name, found in moments.items():
                found.add(seen[name])

        self.stream.advance(stage, take)
        found = StageSearched(
            others={
                n: v.clone()
                for n, v in whole(stage).state_dict().items()
                if n.removesuffix(".weight") not in self.packed
            }
        )
        rows: dict[str, torch.Tensor] = {}
        for unit in reversed(wanted):  # a unit's scales divide the rows of the linear before it
            moments[unit.name].finish()
            _Unit(self, stage, unit, found, rows).search(moments.pop(unit.name), held[unit.name])
        return found


class _Unit:
    """One linear of a stage."""

    def __init__(
        self, tower: TowerSearch, stage: nn.Module, unit: Unit, found: StageSearched, rows: dict[str, torch.Tensor]
    ) -> None:
        """Args: the search, the stage, the linear; what was found so far; what divides rows [N, 1], by linear."""
        self.settings = tower.settings
        self.packed = tower.packed
        self.stage = stage
        self.unit = unit
        self.found = found
        self.rows = rows
        self.module = linear(stage, unit.name)
        #: What the inputs are divided by, as the file can have it, and the error of a norm's bias that it brings [K].
        self.offset: torch.Tensor | None = None

    def search(self, moments: CentredMoments, held: torch.Tensor) -> None:
        """Choose scales, round, mend the bias, and divide what comes before by the scales."""
        weight, name = self.module.weight.data, self.unit.name
        divided = self.rows.get(name, weight.new_ones(len(weight), 1))
        # q, k and v are checked apart, though they are one matrix here
        parts = 3 if self.module.out_features == 3 * self.module.in_features and self.unit.before else 1
        inputs = held - moments.mean
        rounded = round_unit(
            UnitWeights(weight / divided, [len(weight) // parts] * parts, divided, inputs),
            Rounder(moments, self.settings),
            self._scales(weight, moments),
        )
        self._take(rounded, divided, moments.mean)

    def _scales(self, weight: torch.Tensor, moments: CentredMoments) -> torch.Tensor:
        """Return the scales [K] that rounding to nearest errs least with; ones where nothing beats them."""
        ones = torch.ones_like(moments.sizes)
        if not self.unit.before:
            return ones
        ratios = torch.linspace(0, 1, _RATIOS + 1, device=weight.device)
        group, bits = self.settings.group_size, self.settings.bits
        allowed = self._allowed()
        families = [None, weight_means(weight, group)]
        candidates = torch.cat([allowed(scale_candidates(moments.sizes, sizes, ratios)) for sizes in families])
        candidates = torch.cat([ones.unsqueeze(0), candidates])
        losses = screen(weight[:: stride_of(weight)], moments.second, candidates, group, bits)
        return candidates[int(losses.argmin())]

    def _allowed(self) -> Any:
        """Return what turns candidates [C, K] into scales that the module before can be divided by."""
        before: Any = self.stage.get_submodule(self.unit.before)
        if isinstance(before, nn.Linear):
            if self.unit.before not in self.packed:
                return lambda candidates: candidates
            last = before.weight.data[-self.module.in_features :]
            steps = grid_steps(last, self.settings.group_size, self.settings.bits).amin(1)
            limits = (steps / torch.finfo(torch.float16).tiny).clamp(min=1e-2)
            return lambda candidates: candidates.minimum(limits)
        return partial(self._as_the_norm_has_them, before.weight.data)

    def _as_the_norm_has_them(self, old: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return candidates as a norm's weight [D], rounded to its dtype, makes them, one each of D of the K inputs."""
        shared = candidates.view(len(candidates), -1, len(old)).log().mean(1).exp()
        new = (old / shared).to(self.settings.norm_dtype).float()
        return torch.where(new != 0, old / new, shared).repeat(1, candidates.shape[1] // len(old))

    def _take(self, rounded: RoundedUnit, divided: torch.Tensor, mean: torch.Tensor) -> None:
        name, found, scales = self.unit.name, self.found, rounded.scales
        values = [
            torch.cat(part) for part in zip(*((p.values, p.zeros, p.scales) for p in rounded.linears), strict=True)
        ]
        found.linears[name] = QuantizedLinear(*values)
        found.choices[name] = "; ".join(dict.fromkeys(rounded.choices))
        effective = dequantize(found.linears[name], torch.float32).div_(scales).mul_(divided)
        offset = self._divide_before(scales)
        shown = mean if offset is None else mean + offset
        bias = self.module.bias.data + self.module.weight.data @ mean - effective @ shown
        found.effective[name] = effective
        found.biases[name] = bias if offset is None else bias + effective @ offset
        found.others[f"{name}.bias"] = bias / divided.squeeze(1)

    def _divide_before(self, scales: torch.Tensor) -> torch.Tensor | None:
        """Divide what comes before by the scales [K]; returns what rounding a norm's bias adds to the inputs [K]."""
        if not self.unit.before or bool((scales == 1).all()):
            return None
        others, before = self.found.others, self.unit.before
        module: Any = self.stage.get_submodule(before)
        if isinstance(module, nn.Linear):
            whole = torch.ones(module.out_features, 1, device=scales.device)
            whole[-len(scales) :, 0] = scales
            if before in self.packed:
                self.rows[before] = whole
            else:
                others[f"{before}.weight"] = others[f"{before}.weight"] / whole
                others[f"{before}.bias"] = others[f"{before}.bias"] / whole.squeeze(1)
            return None
        dtype, width = self.settings.norm_dtype, module.weight.numel()
        one = scales[:width]
        others[f"{before}.weight"] = (module.weight.data / one).to(dtype).float()
        if module.bias is None:
            return None
        others[f"{before}.bias"] = (module.bias.data / one).to(dtype).float()
        offset = others[f"{before}.bias"] * one - module.bias.data
        shown: torch.Tensor = offset.repeat(len(scales) // width)
        return shown
