"""The search for one decoder layer: scales, clips and rounding from second moments, checked on tokens kept apart.

Whatever is chosen, no linear layer errs more on the held tokens than plain rounding to nearest would: a choice that
does is taken back, in the end to plain rounding itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from toolkit.formats.packing import QuantizedLinear
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.plan import CHUNK_TOKENS, screen_rows
from toolkit.quantize.search.compensate import Factor, compensate, factor
from toolkit.quantize.search.grid import (
    Moments,
    best_clip,
    dequantize,
    grid_steps,
    round_error,
    round_to_grid,
    scale_candidates,
    screen,
    takes_bfloat16,
    weight_means,
)
from toolkit.quantize.search.mixed import FUSED

if TYPE_CHECKING:
    from toolkit.quantize.stream import States

__all__ = ["Held", "LayerSearch", "Searched", "linear"]

Result = TypeVar("Result")

#: What divides a unit's input by its scales: a norm, or the rows of the linear before it.
_BEFORE = QWEN2_VL.before
#: Steps of the scales' exponent, from the first look to the last, which is half of AutoAWQ's.
_STEPS = (1 / 10, 1 / 20, 1 / 40)
#: Candidates that screening lets through.
_FINALISTS = 3


@dataclass
class Held:
    """Samples kept out of the moments: the layer's input and true output [1, n, D], and each unit's input [n, K]."""

    states: States
    output: torch.Tensor
    inputs: dict[str, torch.Tensor]


@dataclass
class Searched:
    """What a search decided for one layer.

    ``linears``: rounded weights, in the layer's scaled coordinates. ``others``: norms and biases that go with them.
    ``scales``: [K] by unit, what its inputs are divided by. ``rows``: [N, 1] by linear, what its outputs are.
    ``choices``: by linear, in words, what was chosen.
    """

    linears: dict[str, QuantizedLinear]
    others: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)

    def effective(self, unit: str, name: str) -> torch.Tensor:
        """Return the weight [N, K] float32 that a linear stands for, in the source's coordinates."""
        weight = dequantize(self.linears[name]).div_(self.scales[unit])
        return weight.mul_(self.rows[name]) if name in self.rows else weight


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return the layer's linear module of that local name."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module


class LayerSearch:
    """Searches one decoder layer, which is left as it is."""

    def __init__(
        self,
        layer: nn.Module,
        moments: dict[str, Moments],
        held: Held,
        *,
        group_size: int,
        bits: int,
        norm_dtype: torch.dtype,
        clip: bool = True,
        rounding: str = "nearest",
        skip: Iterable[str] = (),
        clock: Callable[[str], None] = lambda step: None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args.

        layer: transformers' decoder layer, float32.
        moments: of each unit's input, by the names in `FUSED`; used up one by one.
        held: samples that are not in ``moments``.
        group_size, bits: of the grid.
        norm_dtype: dtype that norm weights are saved in; scales are corrected for the rounding it brings.
        clip: search for clipped ranges too.
        rounding: ``nearest`` or ``compensated``.
        skip: linears to leave as they are.
        clock: told the name of each step when it is over.
        make_room: called when the device is out of memory; returns whether more of it is free now.
        """
        self.layer = layer
        self.moments = moments
        self.held = held
        self.group_size = group_size
        self.bits = bits
        self.norm_dtype = norm_dtype
        self.clips = (False, True) if clip else (False,)
        self.compensated = rounding == "compensated"
        self.skip = frozenset(skip)
        self.clock = clock
        self.make_room = make_room
        self.weights = {name: linear(layer, name).weight.data for names in FUSED.values() for name in names}
        attention: Any = layer.get_submodule("self_attn")
        self.heads = int(attention.config.num_attention_heads)
        self.kv_heads = int(attention.config.num_key_value_heads)

    @torch.no_grad()
    def run(self) -> Searched:
        """Search, round and check; see the module."""
        units = [unit for unit, names in FUSED.items() if names[0] not in self.skip]
        scales = {unit: self._persist(partial(self._best_scale, unit)) for unit in units}
        self.clock("scale")
        norms_and_biases = {
            name: value
            for name, value in self.layer.state_dict().items()
            if name.removesuffix(".weight") not in self.weights
        }
        self.found = Searched({}, norms_and_biases)
        # a unit's scales divide the rows of the linear before it, so what comes last is settled first
        for unit in reversed(units):
            self._persist(partial(self._round_unit, unit, scales[unit]))
            del self.moments[unit]
        return self.found

    def _persist(self, step: Callable[[], Result]) -> Result:
        """Do a step, which changes nothing before its end; out of memory, again once there is more room."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return step()
        # here the error is gone, and with it what the failed step had allocated
        return self._persist(step) if self.make_room() else step()

    def _weight(self, unit: str) -> torch.Tensor:
        """Return the weights of a unit's linears, one above the other: [N, K]."""
        names = FUSED[unit]
        return self.weights[names[0]] if len(names) == 1 else torch.cat([self.weights[name] for name in names])

    # --- scales -------------------------------------------------------------------------------------------------

    def _best_scale(self, unit: str) -> torch.Tensor:
        """Return the scales [K] that rounding to nearest errs least with; ones where nothing beats them.

        AWQ's two families of scales are screened on some of the rows, ever finer around the best exponent; the best few
        are held against each other and against none at all: q, k, v and gate, up by what attention and the MLP make of
        the held tokens, the others, whose outputs are plain sums, on all rows.
        """
        moments, weight = self.moments[unit], self._weight(unit)
        second = moments.second.bfloat16() if takes_bfloat16(weight.device) else moments.second
        sample = weight[:: _stride(weight)]
        limits = self._limits(unit)
        tried: list[tuple[float, torch.Tensor]] = []
        for w_sizes in (None, weight_means(weight, self.group_size)):
            losses: dict[float, float] = {}
            ratios = [i * _STEPS[0] for i in range(round(1 / _STEPS[0]) + 1)]
            for step in _STEPS:
                if step < _STEPS[0]:
                    best = min(losses, key=losses.__getitem__)
                    ratios = [r for r in (best - step, best + step) if 0 <= r <= 1]
                exponents = torch.tensor(ratios, device=weight.device)
                candidates = self._allowed(unit, scale_candidates(moments.sizes, w_sizes, exponents), limits)
                found = screen(sample, second, candidates, self.group_size, self.bits).tolist()
                losses.update(zip(ratios, found, strict=True))
                tried += zip(found, candidates, strict=True)
        tried.sort(key=lambda pair: pair[0])
        finalists = torch.stack([torch.ones_like(moments.sizes), *(scales for _, scales in tried[:_FINALISTS])])
        if unit in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            exact = self._module_losses(unit, finalists)
        else:
            exact = screen(weight, second, finalists, self.group_size, self.bits)
        return finalists[int(exact.argmin())]

    def _limits(self, unit: str) -> torch.Tensor | None:
        """Return the largest scales that leave the linear before a unit normal numbers in fp16; None behind a norm."""
        before: Any = self.layer.get_submodule(_BEFORE[unit])
        if not isinstance(before, nn.Linear):
            return None
        steps = grid_steps(before.weight, self.group_size, self.bits).amin(1)
        return (steps / torch.finfo(torch.float16).tiny).clamp(min=1e-2)

    def _allowed(self, unit: str, candidates: torch.Tensor, limits: torch.Tensor | None) -> torch.Tensor:
        """Return candidates [C, K] as they can be applied.

        What is divided must take the scales: heads that share a value head share its scales, a norm's weight is
        rounded to its dtype, and the scales of the linear before must stay normal numbers in fp16 (``limits``).
        """
        before: Any = self.layer.get_submodule(_BEFORE[unit])
        if limits is None:
            old = before.weight.data
            new = (old / candidates).to(self.norm_dtype).float()
            return torch.where(new != 0, old / new, candidates)
        if _BEFORE[unit] in self.skip:
            return torch.ones_like(candidates)
        rows = candidates
        if unit == "self_attn.o_proj":
            shared = candidates.view(len(candidates), self.kv_heads, self.heads // self.kv_heads, -1)
            rows = shared.log().mean(2).exp().flatten(1)
        rows = rows.minimum(limits)
        return self._per_head(rows) if unit == "self_attn.o_proj" else rows

    def _per_head(self, scales: torch.Tensor) -> torch.Tensor:
        """[C, value heads x size] -> [C, heads x size]."""
        split = scales.view(len(scales), self.kv_heads, 1, -1)
        return split.expand(-1, -1, self.heads // self.kv_heads, -1).flatten(1)

    def _per_value_head(self, scales: torch.Tensor) -> torch.Tensor:
        """[heads x size] -> [value heads x size], of scales that are equal within a value head."""
        return scales.view(self.kv_heads, self.heads // self.kv_heads, -1)[:, 0].flatten()

    def _module_losses(self, unit: str, candidates: torch.Tensor) -> torch.Tensor:
        """Return the squared error [C] of attention's or the MLP's output on the held tokens, rounding to nearest."""
        true = self._module_output(unit)
        losses = []
        try:
            for scales in candidates:
                for name in FUSED[unit]:
                    weight = self.weights[name]
                    error = round_error(weight, scales, self.group_size, self.bits)
                    linear(self.layer, name).weight.data = error.add_(weight)
                losses.append(self._module_output(unit).sub_(true).pow_(2).sum())
        finally:
            for name in FUSED[unit]:
                linear(self.layer, name).weight.data = self.weights[name]
        return torch.stack(losses)

    def _module_output(self, unit: str) -> torch.Tensor:
        states, outputs = self.held.states, []
        for batch in states.batches(CHUNK_TOKENS):
            x = self.held.inputs[unit][batch.start : batch.stop].unsqueeze(0)
            if unit == "mlp.gate_up_proj":
                outputs.append(self.layer.get_submodule("mlp")(x))
            else:
                arguments = {**states.inputs(batch, x.device), "hidden_states": x}
                outputs.append(self.layer.get_submodule("self_attn")(**arguments)[0])
        return torch.cat(outputs, dim=1)

    # --- rounding -----------------------------------------------------------------------------------------------

    def _round_unit(self, unit: str, scales: torch.Tensor) -> None:
        """Round a unit's linears, scaled or not and clipped or not: whatever errs less on the held tokens.

        Which it is is told by some of the rows, since rows do not depend on each other. Scales with which any of the
        linears then errs more than by plain rounding are not taken.
        """
        weight = self._weight(unit)
        rounder = _Rounder(self.moments[unit], self.group_size, self.bits, self.compensated)
        self.clock("factor")
        x = self.held.inputs[unit]
        back = torch.cat([self.found.rows.get(name, weight.new_ones(1, 1)).expand(len(self.weights[name]), 1)
                          for name in FUSED[unit]])  # fmt: skip
        sizes = [len(self.weights[name]) for name in FUSED[unit]]

        def errors(rounded: QuantizedLinear, rows: slice | None = None) -> list[float]:
            """Mean squared error of each linear's output, in the source's coordinates."""
            part = slice(None) if rows is None else rows
            wrong = dequantize(rounded).div_(rounder.scales).sub_(weight[part]).mul_(back[part])
            squares = torch.linalg.vector_norm(x @ wrong.t(), dim=0).square_().div_(len(x))
            whole = squares.new_zeros(len(weight))
            whole[part] = squares
            return [float(part_of.sum()) for part_of in whole.split(sizes)]

        ones = torch.ones_like(scales)
        plain = round_to_grid(weight, self.group_size, self.bits)
        limits = errors(plain)
        some = slice(None, None, _stride(weight))
        trials: list[tuple[torch.Tensor, list[bool], float]] = []

        def tried() -> list[QuantizedLinear]:
            """Some rows unclipped and clipped, in one go: compensation takes as long for few rows as for more."""
            rows, ways = weight[some], len(self.clips)
            return _split(rounder(rows.repeat(ways, 1), self.clips, [len(rows)] * ways), [len(rows)] * ways)

        for candidate in [ones] if torch.equal(scales, ones) else [ones, scales]:
            rounder.scale(candidate)
            by_clip = [errors(part, some) for part in tried()]
            best = [min(zip(told, self.clips, strict=True)) for told in zip(*by_clip, strict=True)]
            trials.append((candidate, [clip for _, clip in best], sum(error for error, _ in best)))
        for candidate, clips, _ in sorted(trials, key=lambda trial: trial[2]):
            rounder.scale(candidate)
            rounded = rounder(weight, clips, sizes)
            reached = errors(rounded)
            worse = [error > limit for error, limit in zip(reached, limits, strict=True)]
            if not any(worse) or candidate is ones:
                break
        self.clock("round")
        scaled = "unscaled" if candidate is ones else "scaled"
        for name, part, safe, clip, bad in zip(
            FUSED[unit], _split(rounded, sizes), _split(plain, sizes), clips, worse, strict=True
        ):
            self.found.linears[name] = safe if bad else part
            self.found.choices[name] = "plain rounding" if bad else f"{scaled}, clipped" if clip else scaled
        self._hand_back(unit, candidate)

    def _hand_back(self, unit: str, scales: torch.Tensor) -> None:
        """Divide what comes before a unit by its scales."""
        name, found = _BEFORE[unit], self.found
        found.scales[unit] = scales
        if f"{name}.weight" in found.others:
            old = found.others[f"{name}.weight"]
            found.others[f"{name}.weight"] = (old / scales).to(self.norm_dtype).float()
            return
        rows = self._per_value_head(scales) if unit == "self_attn.o_proj" else scales
        found.rows[name] = rows.unsqueeze(1)
        self.weights[name] = self.weights[name] / found.rows[name]
        if f"{name}.bias" in found.others:
            found.others[f"{name}.bias"] = found.others[f"{name}.bias"] / rows


class _Rounder:
    """Rounds rows of a unit's weight, given in the source's coordinates, under the scales that are set."""

    def __init__(self, moments: Moments, group_size: int, bits: int, compensated: bool) -> None:
        self.moments = moments
        self.group_size = group_size
        self.bits = bits
        self.factor: Factor | None = factor(moments.second, moments.tokens) if compensated else None
        self.scales = torch.ones_like(moments.sizes)
        self.blocks: torch.Tensor | None = None

    def scale(self, scales: torch.Tensor) -> None:
        """Set the scales [K]. The factor of the moments is scaled with them, which costs 0.4% against a new one."""
        if self.factor is not None and not torch.equal(scales, self.scales):
            ratio = (scales / self.scales)[self.factor.order]
            self.factor.feedback.mul_(ratio.unsqueeze(1)).div_(ratio)
        self.scales = scales
        self.blocks = None

    def __call__(self, rows: torch.Tensor, clips: Iterable[bool], sizes: list[int]) -> QuantizedLinear:
        """Round rows [N, K]; ``clips`` says for each part, of ``sizes`` rows, whether it is clipped."""
        weight = rows * self.scales
        grids = [self._grid(part, clip) for part, clip in zip(weight.split(sizes), clips, strict=True)]
        grid = grids[0] if len(grids) == 1 else QuantizedLinear(
            *(torch.cat(parts) for parts in zip(*((g.values, g.zeros, g.scales) for g in grids), strict=True))
        )  # fmt: skip
        if self.factor is None:
            return grid
        return QuantizedLinear(
            compensate(weight, grid.scales, grid.zeros, self.factor, self.bits), grid.zeros, grid.scales
        )

    def _grid(self, weight: torch.Tensor, clip: bool) -> QuantizedLinear:
        if clip:
            if self.blocks is None:
                self.blocks = self.moments.blocks(self.group_size, self.scales)
            bound = best_clip(weight, self.blocks, self.bits)
            weight = weight.view(*bound.shape[:2], -1).clamp(-bound, bound).view(weight.shape)
        return round_to_grid(weight, self.group_size, self.bits)


def _stride(weight: torch.Tensor) -> int:
    """Return which of the rows of [N, K] are enough to compare candidates on: every so-manyth."""
    return max(1, len(weight) // screen_rows(weight.shape[1]))


def _split(unit: QuantizedLinear, sizes: list[int]) -> list[QuantizedLinear]:
    """Return the linears of a unit."""
    parts = zip(unit.values.split(sizes), unit.zeros.split(sizes), unit.scales.split(sizes), strict=True)
    return [QuantizedLinear(*part) for part in parts]
