from os import PathLike

import torch
from awq.models.base import BaseAWQForCausalLM

class AutoAWQForCausalLM:
    @classmethod
    def from_pretrained(
        cls,
        model_path: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | str = ...,
        safetensors: bool = ...,
        device_map: str | None = ...,
    ) -> BaseAWQForCausalLM: ...
