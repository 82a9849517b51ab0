from typing import Any

from awq.quantize.quantizer import AwqQuantizer
from torch import nn

class BaseAWQForCausalLM(nn.Module):
    model: Any  # transformers' of another release under bench, ours under toolkit; None once it is let go
    quantizer: Any  # of the class that was given to quantize
    def __init__(
        self, model: Any, model_type: str, is_quantized: bool, config: Any, quant_config: Any, processor: Any
    ) -> None: ...
    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: dict[str, Any] = ...,
        calib_data: Any = ...,
        *,
        duo_scaling: bool = ...,
        apply_clip: bool = ...,
        max_calib_samples: int = ...,
        max_calib_seq_len: int = ...,
        quantizer_cls: type[AwqQuantizer] = ...,
        **kwargs: Any,  # handed to quantizer_cls
    ) -> None: ...
    def save_quantized(self, save_dir: str) -> None: ...
