"""How 4-bit weights are stored: names, dtypes and shapes of a packed module's tensors, by format. No torch.

AWQ's two layouts, as AutoAWQ 0.2.9 writes them, and compressed-tensors' ``pack-quantized`` with zero points. The table
of what is in the words is in `toolkit.formats.packing`; all three hold the same values, zeros and scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from toolkit.errors import FormatError

__all__ = ["LAYOUTS", "PACK", "WORDS", "Layout", "layer_shape", "layouts_in_words", "packed_bytes", "zeros_width"]

#: 4-bit values to an int32 word.
PACK = 8


@dataclass(frozen=True)
class Layout:
    """One format of quantized linear layers: what their tensors are called, behind the module's name."""

    #: As ``--to`` and ``--format`` call it.
    name: str
    #: As reports call it.
    title: str
    #: ``quant_method`` of its config.json.
    method: str
    #: Packed values, packed zero points, scales.
    qweight: str
    qzeros: str
    scales: str
    #: [N, K] as integers, where the format says that apart.
    shape: str | None = None

    @property
    def packed(self) -> tuple[str, str, str]:
        """Values, zero points and scales, in this order."""
        return self.qweight, self.qzeros, self.scales

    @property
    def parts(self) -> tuple[str, ...]:
        """All tensors of a packed module."""
        return (*self.packed, self.shape) if self.shape else self.packed

    def shapes(self, inputs: int, outputs: int, group_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a K x N layer's `parts`; ``group_size`` -1 is the whole row.

        Raises FormatError for sizes or groups that the format does not hold.
        """
        size = inputs if group_size == -1 else group_size
        if not inputs or inputs % size or inputs % PACK or outputs % PACK:
            raise FormatError(f"{outputs} x {inputs} weights don't fill words of {PACK} in groups of {size}.")
        groups = inputs // size
        if self.name == "gemm":
            found = ((inputs, outputs // PACK), (groups, outputs // PACK), (groups, outputs))
        elif self.name == "gemv":
            width = zeros_width(inputs, size)
            found = ((outputs, inputs // PACK), (outputs, width), (outputs, width * PACK))
        else:
            found = ((outputs, inputs // PACK), (outputs // PACK, groups), (outputs, groups))
        shapes: dict[str, tuple[int, ...]] = dict(zip(self.packed, found, strict=True))
        return shapes | {self.shape: (2,)} if self.shape else shapes


_AWQ = ("qweight", "qzeros", "scales")
#: By name, all formats that are read and written.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("gemm", "AWQ GEMM", "awq", *_AWQ),
        Layout("gemv", "AWQ GEMV", "awq", *_AWQ),
        Layout(
            "compressed-tensors",
            "compressed-tensors",
            "compressed-tensors",
            "weight_packed",
            "weight_zero_point",
            "weight_scale",
            "weight_shape",
        ),
    )
}
#: How names of packed values end, in whatever format.
WORDS = tuple(dict.fromkeys(f".{layout.qweight}" for layout in LAYOUTS.values()))


def layouts_in_words() -> str:
    """Return the names for a sentence: "gemm, gemv or compressed-tensors"."""
    *most, last = LAYOUTS
    return f"{', '.join(most)} or {last}"


def zeros_width(in_features: int, group_size: int) -> int:
    """Return the words a row of GEMV's ``qzeros`` takes for K inputs: AutoAWQ's ``calculate_zeros_width``.

    ceil(K/g / 8) words, rounded up to a multiple of 1, 2 or 4 words for groups of at least 128, of 64 or of 32.
    Raises FormatError for the group sizes the GEMV kernel does not know.
    """
    multiple = 1 if group_size >= 128 else {64: 2, 32: 4}.get(group_size)
    if multiple is None:
        raise FormatError(f"the GEMV layout has no group size {group_size}: use 32, 64 or at least 128, or GEMM.")
    words = -(-(in_features // group_size) // PACK)
    return -(-words // multiple) * multiple


def packed_bytes(layout: Layout, inputs: int, outputs: int, group_size: int, scale_bytes: int) -> int:
    """Return the bytes of a packed K x N layer whose scales take ``scale_bytes`` each. Raises like `Layout.shapes`."""
    sizes = {layout.scales: scale_bytes, layout.shape: 8}
    shapes = layout.shapes(inputs, outputs, group_size)
    return sum(math.prod(shape) * sizes.get(part, 4) for part, shape in shapes.items())


def layer_shape(
    format: str, group_size: int, qweight: tuple[int, ...], qzeros: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[int, int]:
    """Return (K, N) of a packed layer from the shapes of its values, zero points and scales.

    Raises FormatError when the three don't fit each other, the ``format`` (a name of `LAYOUTS`) and the group size,
    saying which shape was expected.
    """
    layout = LAYOUTS[format]
    if len(qweight) != 2:
        raise FormatError(f"{layout.qweight} has shape {list(qweight)}, not two dimensions.")
    inputs, outputs = (qweight[0], qweight[1] * PACK) if format == "gemm" else (qweight[1] * PACK, qweight[0])
    size = inputs if group_size == -1 else group_size
    if inputs == 0 or inputs % size:
        raise FormatError(f"its {inputs} inputs don't divide into groups of {size} (is its layout really {format}?).")
    expected = layout.shapes(inputs, outputs, group_size)
    for name, found in zip(layout.packed[1:], (qzeros, scales), strict=True):
        if tuple(found) != expected[name]:
            raise FormatError(
                f"{name} has shape {list(found)}, and the {format} layout of {outputs} x {inputs} weights "
                f"in groups of {size} needs {list(expected[name])}."
            )
    return inputs, outputs
