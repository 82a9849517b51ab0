from os import PathLike
from typing import Self

from torch import nn

class PeftModel(nn.Module):
    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | PathLike[str]) -> Self: ...
    # of the tuner inside, which peft forwards to
    def merge_and_unload(self, *, safe_merge: bool = False) -> nn.Module: ...
