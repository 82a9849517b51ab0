"""Qwen2-VL as a plain module for batches whose images share one size: much faster to train than the general one.

Parameters carry the hub's names (``model.*``, ``visual.*``), and logits equal transformers' (a test holds them to it).
Positions follow from the image's size alone, so nothing here depends on data, and a CUDA graph can replay it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Settings", "TinyQwen2VL", "normalize"]

#: CLIP's channel means and deviations, as in the checkpoint's preprocessor_config.json.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Settings:
    """The shape of the model; ``export.config`` writes it as config.json."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    vision_depth: int = 5
    vision_embed_dim: int = 160
    vision_num_heads: int = 5
    vision_mlp_ratio: int = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the language model."""
        return self.hidden_size // self.num_attention_heads


def normalize(pixels: Tensor) -> Tensor:
    """Turn uint8 [B, H, W, 3] into what the image processor makes of it, float32 of the same shape."""
    mean, std = _channels(pixels.device)
    return (pixels.float() / 255 - mean) / std


@cache
def _channels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Keep the constants on the device: sending them again would wait for all work queued there."""
    return torch.tensor(_MEAN, device=device), torch.tensor(_STD, device=device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to [..., N, head_dim] (the half-split form of RoFormer that Qwen uses)."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


class _VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, patches, width = x.shape
        q, k, v = self.qkv(x).view(batch, patches, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, patches, width))  # type: ignore[no-any-return]


class _VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # type: ignore[no-any-return]


class _VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _VisionAttention(width, heads)
        self.mlp = _VisionMLP(width, ratio * width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class _PatchEmbed(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        kernel = (settings.temporal_patch_size, settings.patch_size, settings.patch_size)
        self.proj = nn.Conv3d(3, settings.vision_embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed [B, N, 3 x 14 x 14]. A still image repeats its frame, so the kernel's frames add up."""
        weight = self.proj.weight.sum(2).flatten(1)
        return F.linear(patches, weight).float()


class _Merger(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.inner = settings.vision_embed_dim * settings.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(settings.vision_embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, settings.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(x.shape[0], -1, self.inner))  # type: ignore[no-any-return]


class _Vision(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.patch_embed = _PatchEmbed(settings)
        self.blocks = nn.ModuleList(
            _VisionBlock(settings.vision_embed_dim, settings.vision_num_heads, settings.vision_mlp_ratio)
            for _ in range(settings.vision_depth)
        )
        self.merger = _Merger(settings)
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def positions(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [rows x columns, head_dim] of the 2-D positions, patches in merge order."""
        if (rows, columns) not in self._tables:
            merge = self.settings.spatial_merge_size
            grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
            grid = grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
            half = self.settings.vision_embed_dim // self.settings.vision_num_heads // 2
            inverse = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float) / half)
            angles = (grid[:, :, None] * inverse).flatten(1).repeat(1, 2)
            self._tables[rows, columns] = (angles.cos().to(device), angles.sin().to(device))
        return self._tables[rows, columns]

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalized images [B, H, W, 3] into merged patches [B, H/28 x W/28, hidden_size]."""
        batch, height, width, _ = pixels.shape
        patch, merge = self.settings.patch_size, self.settings.spatial_merge_size
        rows, columns = height // patch, width // patch
        cells = pixels.view(batch, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        x = self.patch_embed(cells.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns, -1))
        cos, sin = self.positions(rows, columns, pixels.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger(x)  # type: ignore[no-any-return]


class _RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _Attention(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, head = settings.hidden_size, settings.head_dim
        self.heads, self.kv_heads, self.head_dim = settings.num_attention_heads, settings.num_key_value_heads, head
        self.q_proj = nn.Linear(width, self.heads * head)
        self.k_proj = nn.Linear(width, self.kv_heads * head)
        self.v_proj = nn.Linear(width, self.kv_heads * head)
        self.o_proj = nn.Linear(self.heads * head, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = self._share(_rotate(k, cos, sin)), self._share(v)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]

    def _share(self, x: Tensor) -> Tensor:
        """Repeat [B, kv_heads, N, head_dim] for the query heads that share a key head."""
        return x[:, :, None].expand(-1, -1, self.heads // self.kv_heads, -1, -1).flatten(1, 2)


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.post_attention_layernorm = _RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attn = _Attention(settings)
        self.mlp = _MLP(settings.hidden_size, settings.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class _Language(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.num_hidden_layers))
        self.norm = _RMSNorm(settings.hidden_size, settings.rms_norm_eps)


class TinyQwen2VL(nn.Module):
    """The whole model: :meth:`encode` images, then :meth:`forward` prefix + image + suffix to logits."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()
        self.visual = _Vision(self.settings)
        self.model = _Language(self.settings)
        # Kept for good: a captured CUDA graph goes on reading these tables.
        self._tables: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def positions(
        self, before: int, rows: int, columns: int, after: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [tokens, head_dim] of the m-rope positions (Qwen2-VL paper, section 2.1).

        ``rows`` x ``columns`` merged patches stand between ``before`` and ``after`` text tokens. Text counts up in
        all three axes alike; a patch has the image's start in time plus its row and column; the text behind goes
        on from the largest position used.
        """
        key = (before, rows, columns, after)
        if key not in self._tables:
            cells = rows * columns
            image = torch.stack(
                [
                    torch.zeros(cells, dtype=torch.long),
                    torch.arange(rows).repeat_interleave(columns),
                    torch.arange(columns).repeat(rows),
                ]
            )
            start = before + max(rows, columns)
            text = (torch.arange(before).expand(3, -1), (start + torch.arange(after)).expand(3, -1))
            position = torch.cat([text[0], before + image, text[1]], 1).float()
            head = self.settings.head_dim
            inverse = 1.0 / self.settings.rope_theta ** (torch.arange(0, head, 2, dtype=torch.float) / head)
            by_axis = position[:, :, None] * inverse
            sections = by_axis.split(list(self.settings.mrope_section), -1)
            angles = torch.cat([section[axis] for axis, section in enumerate(sections)], -1).repeat(1, 2)
            self._tables[key] = (angles.cos().to(device), angles.sin().to(device))
        return self._tables[key]

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalized images [B, H, W, 3] into [B, H/28 x W/28, hidden_size]."""
        return self.visual(pixels)  # type: ignore[no-any-return]

    def forward(self, prefix: Tensor, image: Tensor | None, grid: tuple[int, int], suffix: Tensor) -> Tensor:
        """Return logits [B, S, vocab_size] at the suffix's positions.

        ``prefix`` int64 [P] is shared by the batch, ``image`` is :meth:`encode`'s result of ``grid`` merged patches
        (rows, columns; ``None`` and (0, 0) without image), ``suffix`` int64 [B, S].
        """
        embed = self.model.embed_tokens
        parts = [embed(prefix).expand(suffix.shape[0], -1, -1), embed(suffix)]
        if image is not None:
            parts.insert(1, image.float())
        x = torch.cat(parts, 1)
        cos, sin = self.positions(prefix.shape[0], *grid, suffix.shape[1], suffix.device)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        x = self.model.norm(x[:, x.shape[1] - suffix.shape[1] :])
        return F.linear(x, embed.weight)

    def half_state(self) -> dict[str, Any]:
        """Return the weights as fp16 tensors on the CPU, under the hub's names."""
        return {name: value.detach().half().cpu().contiguous() for name, value in self.state_dict().items()}
