"""The search for AWQ's scales: two families of candidates, screened by second moments.

AWQ (arXiv 2306.00978) chooses scales s for the inputs of a linear y = W x; W s is rounded, and s divided out again:
its error is D = round(W s) / s - W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.quantize.search.gram import Moments, product, takes_bfloat16
from toolkit.quantize.search.grid import grid_steps, round_error
from toolkit.quantize.search.sizes import screen_rows
from toolkit.quantize.search.strategy import LayerTask, SearchSettings, linear
from toolkit.quantize.stream.sizes import CHUNK_TOKENS

__all__ = ["Heads", "ScaleSearch", "scale_candidates", "screen", "stacked", "stride_of", "weight_means"]

#: Steps of the scales' exponent, from the first look to the last, which is half of AutoAWQ's.
_STEPS = (1 / 10, 1 / 20, 1 / 40)
#: Candidates that screening lets through.
_FINALISTS = 3
#: The unit whose input comes from attention's value heads.
_PER_HEAD = "self_attn.o_proj"
_ATTENTION = "self_attn"


def weight_means(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return, of each input channel, the mean size of its weights [N, K] within their groups, 0 to 1: [K] float32."""
    groups = weight.float().view(-1, weight.shape[1] if group_size == -1 else group_size).abs()
    return (groups / (groups.amax(1, keepdim=True) + 1e-6)).view_as(weight).mean(0)


def scale_candidates(x_sizes: torch.Tensor, w_sizes: torch.Tensor | None, ratios: torch.Tensor) -> torch.Tensor:
    """Return AWQ's scales [R, K] for exponents r: plain, x^r, or with ``w_sizes`` its duo scaling, x^r / w^(1-r).

    Args:
        x_sizes: [K], how large each input channel is.
        w_sizes: [K], how large its weights are, 0 to 1.
        ratios: [R], the exponents, 0 to 1.
    """
    r = ratios.unsqueeze(1)
    scales = x_sizes.clamp(min=1e-6).unsqueeze(0).pow(r)
    if w_sizes is not None:
        scales = scales / (w_sizes.pow(1 - r) + 1e-4)
    scales = scales.clamp(min=1e-4)
    return scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()


def screen(
    weight: torch.Tensor, moments: torch.Tensor, candidates: torch.Tensor, group_size: int, bits: int = 4
) -> torch.Tensor:
    """Return tr(D H D^T) [C] of each candidate's rounding error D.

    Args:
        weight: [N, K] float32.
        moments: H, [K, K] float32, or bfloat16 where that is enough and faster; sums are float32.
        candidates: scales [C, K].
        group_size, bits: of the grid.
    """
    losses = []
    for scales in candidates:
        error = round_error(weight, scales, group_size, bits)
        losses.append(product(error, moments).mul_(error).sum())
    return torch.stack(losses)


@dataclass(frozen=True)
class Heads:
    """Attention's query heads and the key-value heads that they share."""

    heads: int
    kv_heads: int

    @classmethod
    def of(cls, layer: nn.Module) -> Heads:
        """Return those of a decoder layer."""
        config: Any = layer.get_submodule(_ATTENTION).config
        return cls(int(config.num_attention_heads), int(config.num_key_value_heads))

    def shared(self, scales: torch.Tensor) -> torch.Tensor:
        """Geometric means of the heads that share a value head: [C, heads x size] -> [C, value heads x size]."""
        grouped = scales.view(len(scales), self.kv_heads, self.heads // self.kv_heads, -1)
        return grouped.log().mean(2).exp().flatten(1)

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """[C, value heads x size] -> [C, heads x size]."""
        split = scales.view(len(scales), self.kv_heads, 1, -1)
        return split.expand(-1, -1, self.heads // self.kv_heads, -1).flatten(1)

    def one_each(self, scales: torch.Tensor) -> torch.Tensor:
        """[heads x size] -> [value heads x size], of scales that are equal within a value head."""
        return scales.view(self.kv_heads, self.heads // self.kv_heads, -1)[:, 0].flatten()


class ScaleSearch:
    """Chooses the scales of a layer's units, rounding to nearest."""

    def __init__(
        self,
        task: LayerTask,
        moments: Mapping[str, Moments],
        weights: Mapping[str, torch.Tensor],
        settings: SearchSettings,
    ) -> None:
        """Args: the layer, its units' moments, its linears' weights by name, and what holds for all layers."""
        self.task = task
        self.moments = moments
        self.weights = weights
        self.settings = settings
        self.units = settings.family.fused
        self.before = settings.family.before
        self.heads = Heads.of(task.layer)

    def best(self, unit: str) -> torch.Tensor:
        """Return the scales [K] that rounding to nearest errs least with; ones where nothing beats them.

        AWQ's two families of scales are screened on some of the rows, ever finer around the best exponent; the best few
        are held against each other and against none at all: q, k, v and gate, up by what attention and the MLP make of
        the held tokens, the others, whose outputs are plain sums, on all rows.
        """
        moments, weight = self.moments[unit], stacked(self.weights, self.units[unit])
        second = moments.second.bfloat16() if takes_bfloat16(weight.device) else moments.second
        sample = weight[:: stride_of(weight)]
        limits = self._limits(unit)
        tried: list[tuple[float, torch.Tensor]] = []
        for w_sizes in (None, weight_means(weight, self.settings.group_size)):
            losses: dict[float, float] = {}
            ratios = [i * _STEPS[0] for i in range(round(1 / _STEPS[0]) + 1)]
            for step in _STEPS:
                if step < _STEPS[0]:
                    best = min(losses, key=losses.__getitem__)
                    ratios = [r for r in (best - step, best + step) if 0 <= r <= 1]
                exponents = torch.tensor(ratios, device=weight.device)
                candidates = self._allowed(unit, scale_candidates(moments.sizes, w_sizes, exponents), limits)
                found = screen(sample, second, candidates, self.settings.group_size, self.settings.bits).tolist()
                losses.update(zip(ratios, found, strict=True))
                tried += zip(found, candidates, strict=True)
        tried.sort(key=lambda pair: pair[0])
        finalists = torch.stack([torch.ones_like(moments.sizes), *(scales for _, scales in tried[:_FINALISTS])])
        if len(self.units[unit]) > 1:
            exact = self._module_losses(unit, finalists)
        else:
            exact = screen(weight, second, finalists, self.settings.group_size, self.settings.bits)
        return finalists[int(exact.argmin())]

    def _limits(self, unit: str) -> torch.Tensor | None:
        """Return the largest scales that leave the linear before a unit normal numbers in fp16; None behind a norm."""
        before: Any = self.task.layer.get_submodule(self.before[unit])
        if not isinstance(before, nn.Linear):
            return None
        steps = grid_steps(before.weight, self.settings.group_size, self.settings.bits).amin(1)
        return (steps / torch.finfo(torch.float16).tiny).clamp(min=1e-2)

    def _allowed(self, unit: str, candidates: torch.Tensor, limits: torch.Tensor | None) -> torch.Tensor:
        """Return candidates [C, K] as they can be applied.

        What is divided must take the scales: heads that share a value head share its scales, a norm's weight is
        rounded to its dtype, and the scales of the linear before must stay normal numbers in fp16 (``limits``).
        """
        before: Any = self.task.layer.get_submodule(self.before[unit])
        if limits is None:
            old = before.weight.data
            new = (old / candidates).to(self.settings.norm_dtype).float()
            return torch.where(new != 0, old / new, candidates)
        if self.before[unit] in self.task.skip:
            return torch.ones_like(candidates)
        if unit != _PER_HEAD:
            return candidates.minimum(limits)
        return self.heads.spread(self.heads.shared(candidates).minimum(limits))

    def _module_losses(self, unit: str, candidates: torch.Tensor) -> torch.Tensor:
        """Return the squared error [C] of attention's or the MLP's output on the held tokens, rounding to nearest."""
        true = self._module_output(unit)
        losses = []
        try:
            for scales in candidates:
                for name in self.units[unit]:
                    weight = self.weights[name]
                    error = round_error(weight, scales, self.settings.group_size, self.settings.bits)
                    linear(self.task.layer, name).weight.data = error.add_(weight)
                losses.append(self._module_output(unit).sub_(true).pow_(2).sum())
        finally:
            for name in self.units[unit]:
                linear(self.task.layer, name).weight.data = self.weights[name]
        return torch.stack(losses)

    def _module_output(self, unit: str) -> torch.Tensor:
        """Return what attention or the MLP makes of the held tokens: [1, n, D]."""
        states, outputs = self.task.held.states, []
        name, _, _ = unit.partition(".")
        module = self.task.layer.get_submodule(name)
        for batch in states.batches(CHUNK_TOKENS):
            x = self.task.held.inputs[unit][batch.start : batch.stop].unsqueeze(0)
            if name == _ATTENTION:
                outputs.append(module(**{**states.inputs(batch, x.device), "hidden_states": x})[0])
            else:
                outputs.append(module(x))
        return torch.cat(outputs, dim=1)


def stacked(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Return the weights of linears that share an input, one above the other: [N, K]."""
    return weights[names[0]] if len(names) == 1 else torch.cat([weights[name] for name in names])


def stride_of(weight: torch.Tensor) -> int:
    """Return which of the rows of [N, K] are enough to compare candidates on: every so-manyth."""
    return max(1, len(weight) // screen_rows(weight.shape[1]))
