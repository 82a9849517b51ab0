import torch
from torch import nn
from transformers import Qwen2VLTextConfig

class Qwen2VLDecoderLayer(nn.Module):
    def __init__(self, config: Qwen2VLTextConfig, layer_idx: int) -> None: ...
    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        lengths: list[int] = ...,
    ) -> torch.Tensor: ...
