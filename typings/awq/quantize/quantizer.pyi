from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

class AwqQuantizer:
    awq_model: Any
    model: Any
    w_bit: int
    group_size: int
    zero_point: bool
    version: str
    calib_data: Any
    duo_scaling: bool
    apply_clip: bool
    modules: Any
    module_kwargs: Any
    inps: Any
    def __init__(
        self,
        awq_model: Any,
        model: Any,
        tokenizer: Any,
        w_bit: int,
        group_size: int,
        zero_point: bool,
        version: str,
        calib_data: Any,
        split: str,
        text_column: str,
        duo_scaling: bool,
        modules_to_not_convert: Sequence[str] | None = None,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int = ...,
    ) -> None: ...
    def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> tuple[Any, Any, Any]: ...
    def quantize(self) -> None: ...
    def pseudo_quantize_tensor(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...
    def _get_input_feat(self, layer: nn.Module, named_linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]: ...
    def _module_forward(self, x: torch.Tensor, module: nn.Module, module_kwargs: dict[str, Any]) -> torch.Tensor: ...
    def _search_best_scale(
        self,
        module: nn.Module,
        prev_op: nn.Module,
        layers: Sequence[nn.Linear],
        inp: torch.Tensor,
        module2inspect: nn.Module | None = None,
        kwargs: dict[str, Any] = ...,
    ) -> tuple[str, tuple[str, ...], torch.Tensor]: ...
    def _compute_best_scale(
        self,
        x: torch.Tensor,
        w_mean: torch.Tensor,
        x_mean: torch.Tensor,
        module2inspect: nn.Module,
        linears2scale: Sequence[nn.Linear],
        fp16_output: torch.Tensor,
        kwargs: dict[str, Any] = ...,
        /,
    ) -> torch.Tensor: ...
    def _search_best_clip(
        self, layer: nn.Module, named_linears: dict[str, nn.Linear], input_feat: dict[str, torch.Tensor]
    ) -> list[tuple[str, torch.Tensor]]: ...
    def _compute_best_clip(
        self,
        w: torch.Tensor,
        input_feat: torch.Tensor,
        *,
        n_grid: int = 20,
        max_shrink: float = 0.5,
        n_sample_token: int = 512,
    ) -> torch.Tensor: ...
    def _apply_quant(self, module: nn.Module, named_linears: dict[str, nn.Linear]) -> None: ...
