from typing import Any

import torch
from awq.models.base import BaseAWQForCausalLM
from torch import nn

class Qwen2VLAWQForCausalLM(BaseAWQForCausalLM):
    @staticmethod
    def get_model_layers(model: Any) -> nn.ModuleList: ...
    @staticmethod
    def move_embed(model: Any, device: str) -> None: ...
    @staticmethod
    def get_layers_for_scaling(
        module: nn.Module, input_feat: dict[str, torch.Tensor], module_kwargs: dict[str, Any]
    ) -> list[dict[str, Any]]: ...
