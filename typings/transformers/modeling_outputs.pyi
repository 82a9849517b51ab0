import torch

class BaseModelOutputWithPooling:
    pooler_output: torch.Tensor
    def __init__(self, *, pooler_output: torch.Tensor) -> None: ...
