"""How a checkpoint's linear layers are quantized, whatever its config.json calls it."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.checkpoint.layouts import LAYOUTS, Layout

__all__ = ["QuantizationInfo"]


@dataclass(frozen=True)
class QuantizationInfo:
    """How a checkpoint's linear layers are quantized, as its ``quantization_config`` says."""

    bits: int
    #: Inputs that share a scale; -1 is the whole row.
    group_size: int
    zero_point: bool
    #: How the words are packed, a name of `toolkit.checkpoint.layouts.LAYOUTS`: "gemm", "gemv", "compressed-tensors".
    format: str
    #: Modules left in 16 bits, as each engine reads it (`toolkit.checkpoint.left_out`). AWQ: empty means what is not
    #: packed. compressed-tensors: its ``ignore``.
    modules_to_not_convert: tuple[str, ...] = ()
    #: Whether lm_head is quantized too.
    lm_head: bool = False

    @property
    def layout(self) -> Layout:
        """Names and shapes of a packed module's tensors."""
        return LAYOUTS[self.format]
