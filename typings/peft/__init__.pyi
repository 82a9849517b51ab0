from collections.abc import Mapping
from os import PathLike
from typing import Any, Self

import torch
from torch import nn

class PeftConfig:
    inference_mode: bool
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str) -> Self: ...

class PeftModel(nn.Module):
    def __init__(self, model: nn.Module, peft_config: PeftConfig) -> None: ...
    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | PathLike[str]) -> Self: ...
    # of the tuner inside, which peft forwards to
    def merge_and_unload(self, *, safe_merge: bool = False) -> nn.Module: ...

def load_peft_weights(model_id: str, device: str | None = None) -> dict[str, torch.Tensor]: ...
def get_peft_model_state_dict(model: nn.Module, *, save_embedding_layers: bool = ...) -> dict[str, torch.Tensor]: ...

# keys that are missing, and keys that nothing takes
def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Any]
) -> tuple[list[str], list[str]]: ...
