"""Samples between two decoder layers, joined in one row, and attention that keeps them apart.

The decoder layer is transformers' own module; only its attention is told where one sample ends and the next begins, so
that samples of any length run through it joined, without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from toolkit.compat import patch_torchvision

__all__ = ["ATTENTION", "Batch", "Held", "Inputs", "States", "register_attention"]

#: What transformers calls the attention that :func:`register_attention` registers.
ATTENTION = "qvl_packed"


@dataclass(frozen=True)
class Batch:
    """A micro-batch: samples from number ``first`` on, of these ``lengths``, which are tokens ``start`` to ``stop``."""

    first: int
    start: int
    stop: int
    lengths: list[int]


@dataclass
class States:
    """The calibration samples between two decoder layers, joined in one row of T tokens.

    ``hidden``: [1, T, D] float32. ``rope``: cosines and sines [..., 1, T, head]. ``lengths``: tokens of each sample.
    ``vision``: [T] bool, true where a token is a piece of an image. ``added``: what is added to those tokens behind the
    next layers, in turn, [vision tokens, D] each. ``hidden`` and ``added`` may wait in host memory, the others are on
    the device.
    """

    hidden: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    lengths: list[int]
    vision: torch.Tensor
    added: tuple[torch.Tensor, ...] = ()
    #: Whether attention is computed in float32 on a GPU too.
    exact: bool = field(default=False, kw_only=True)

    @classmethod
    def join(cls, samples: Sequence[States]) -> States:
        """Return one row of all samples."""
        cos, sin = (torch.cat(tables, dim=-2) for tables in zip(*(s.rope for s in samples), strict=True))
        return cls(
            torch.cat([s.hidden for s in samples], dim=1),
            (cos, sin),
            [length for s in samples for length in s.lengths],
            torch.cat([s.vision for s in samples]),
            tuple(torch.cat(level) for level in zip(*(s.added for s in samples), strict=True)),
        )

    def add(self) -> None:
        """Add to images' tokens what comes behind the layer that was passed last; nothing behind later ones."""
        if self.added:
            level, *rest = self.added
            self.hidden[:, self.vision.to(self.hidden.device)] += level.to(self.hidden.device)
            self.added = tuple(rest)

    def batch(self, first: int, tokens: int) -> Batch:
        """Return the micro-batch of whole samples from number ``first`` on; one above ``tokens`` goes alone."""
        start = sum(self.lengths[:first])
        lengths = [self.lengths[first]]
        for length in self.lengths[first + 1 :]:
            if sum(lengths) + length > tokens:
                break
            lengths.append(length)
        return Batch(first, start, start + sum(lengths), lengths)

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Yield all samples in micro-batches."""
        first = 0
        while first < len(self.lengths):
            found = self.batch(first, tokens)
            yield found
            first += len(found.lengths)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return a decoder layer's arguments for a micro-batch; ``hidden_states`` is [1, T, D] float32."""
        cos, sin = (table[..., batch.start : batch.stop, :] for table in self.rope)
        return {
            "hidden_states": self.hidden[:, batch.start : batch.stop].to(device),
            "position_embeddings": (cos, sin),
            "attention_mask": None,
            "lengths": batch.lengths,
            "exact": self.exact,
        }


@dataclass(frozen=True)
class Inputs:
    """What a unit is given, ``x`` [n, K], and what its outputs are added to, ``residual`` [n, R] (None: to nothing)."""

    x: torch.Tensor
    residual: torch.Tensor | None = None


@dataclass
class Held:
    """Samples kept out of a search: a layer's input, its true output [1, n, D], and each unit's input [n, K]."""

    states: States
    output: torch.Tensor
    inputs: dict[str, torch.Tensor]


@functools.cache
def register_attention() -> None:
    """Let transformers' layers use packed attention; a micro-batch's ``lengths`` reach it as an argument."""
    patch_torchvision()
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)


def _packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    lengths: list[int],
    exact: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample. query [1, H, T, head], key and value [1, H_kv, T, head] -> [1, T, H, head].

    On a GPU it runs in bfloat16, as the served model's does, unless ``exact``: float32 has no flash kernel.
    """
    dtype = query.dtype
    if query.is_cuda and not exact:
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and not query.is_cuda:
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    # cuDNN's kernel, which torch would take, is compiled anew for every length: seconds, where flash takes none
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        outputs = [
            nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=shared > 1 and q.is_cuda
            )
            for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None
