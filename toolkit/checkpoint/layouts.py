"""Shapes of AWQ's packed tensors, in both layouts; the table is in `toolkit.formats.packing`. No torch."""

from __future__ import annotations

from toolkit.errors import FormatError

__all__ = ["PACK", "PACKED", "layer_shape", "zeros_width"]

#: Tensors that stand in a packed module for its weight.
PACKED = ("qweight", "qzeros", "scales")

#: 4-bit values to an int32 word.
PACK = 8


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


def layer_shape(
    version: str, group_size: int, qweight: tuple[int, ...], qzeros: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[int, int]:
    """Return (K, N) of a packed layer from its tensors' shapes.

    Raises FormatError when the three don't fit each other, the layout ``version`` ("gemm" or "gemv") and the group
    size, saying which shape was expected.
    """
    if len(qweight) != 2:
        raise FormatError(f"qweight has shape {list(qweight)}, not two dimensions.")
    if version == "gemm":
        inputs, outputs = qweight[0], qweight[1] * PACK
    else:
        inputs, outputs = qweight[1] * PACK, qweight[0]
    size = inputs if group_size == -1 else group_size
    if inputs == 0 or inputs % size:
        raise FormatError(f"its {inputs} inputs don't divide into groups of {size} (is its layout really {version}?).")
    groups = inputs // size
    if version == "gemm":
        expected = ((groups, outputs // PACK), (groups, outputs))
    else:
        width = zeros_width(inputs, size)
        expected = ((outputs, width), (outputs, width * PACK))
    for name, found, right in (("qzeros", qzeros, expected[0]), ("scales", scales, expected[1])):
        if tuple(found) != right:
            raise FormatError(
                f"{name} has shape {list(found)}, and the {version} layout of {outputs} x {inputs} weights "
                f"in groups of {size} needs {list(right)}."
            )
    return inputs, outputs
