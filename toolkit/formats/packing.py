"""Formats of 4-bit weights, eight values to an int32 word: AWQ's two layouts and compressed-tensors. Pure functions.

For a linear layer with K inputs, N outputs and groups of g inputs; AWQ as AutoAWQ 0.2.9 packs it, compressed-tensors as
its 0.17 packs ``pack-quantized`` weights with zero points:

    ========  ===================================  ===============================  ===================
    tensor    GEMM                                 GEMV                             compressed-tensors
    ========  ===================================  ===============================  ===================
    qweight   [K, N/8], nibble i of a word is      [N, K/8], nibbles in order       [N, K/8], like GEMV
              output column                        along K
              (0, 2, 4, 6, 1, 3, 5, 7)[i] of 8
    qzeros    [K/g, N/8], the same nibble order    [N, W] with W of `zeros_width`,  [N/8, K/g], nibbles
                                                   in order, then zeros             in order along N
    scales    [K/g, N]                             [N, 8 W], then zeros             [N, K/g]
    ========  ===================================  ===============================  ===================

Nibble 0 is the lowest four bits of the word. A weight is (value - zero) * scale. compressed-tensors means numbers
from -8 to 7 and stores them with 8 added, values and zeros alike, so its words hold AWQ's numbers; what it calls the
tensors is in `toolkit.checkpoint.layouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.checkpoint.layouts import LAYOUTS, PACK, zeros_width
from toolkit.errors import FormatError

__all__ = [
    "GEMM_ORDER",
    "PackedLinear",
    "QuantizedLinear",
    "dequantize",
    "gemm_to_gemv",
    "gemv_to_gemm",
    "join_outputs",
    "named",
    "pack",
    "pack_as",
    "pack_compressed",
    "pack_gemm",
    "pack_gemv",
    "pack_scales",
    "slice_outputs",
    "unpack",
    "unpack_as",
    "unpack_compressed",
    "unpack_gemm",
    "unpack_gemv",
]

#: Which of a word's eight columns nibble i holds in the GEMM layout.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear layer, unpacked; G = K / group_size groups."""

    #: uint8 [N, K], 0 to 15.
    values: Tensor
    #: uint8 [N, G], 0 to 15.
    zeros: Tensor
    #: Floating point [N, G].
    scales: Tensor


@dataclass(frozen=True)
class PackedLinear:
    """The values, zeros and scales of a quantized linear layer as a checkpoint holds them, whatever it calls them."""

    #: int32.
    qweight: Tensor
    #: int32.
    qzeros: Tensor
    #: float16 as a rule; the dtype is kept.
    scales: Tensor

    def to(self, device: torch.device) -> PackedLinear:
        """Return the layer on a device."""
        return PackedLinear(*(tensor.to(device) for tensor in (self.qweight, self.qzeros, self.scales)))


def pack(values: Tensor, interleaved: bool = False) -> Tensor:
    """Pack integers 0 to 15, [R, C], into int32 words [R, C/8].

    Nibble i of a word is its column i, or ``GEMM_ORDER[i]`` when ``interleaved``. Works on eight values at once, as
    the bytes of an int64 (little-endian, like safetensors). Raises FormatError when C is not a multiple of 8.
    """
    rows, columns = values.shape
    if columns % PACK:
        raise FormatError(f"{columns} values a row can't be packed: 8 go into a word.")
    flat = values.to(torch.uint8).reshape(-1)
    if flat.storage_offset() % PACK:
        flat = flat.clone()  # a view as int64 has to begin on a whole one
    word = flat.view(torch.int64)
    for distance, mask in _GATHER:
        word = (word | word >> distance) & mask
    if interleaved:
        word = _swap(_swap(word, *_SWAP_NIBBLES), *_SWAP_BYTES)
    return word.to(torch.int32).reshape(rows, columns // PACK)


def unpack(words: Tensor, interleaved: bool = False) -> Tensor:
    """Unpack int32 words [R, C] into uint8 values [R, 8 C]; the inverse of `pack`."""
    rows, columns = words.shape
    word = words.reshape(-1).to(torch.int64) & 0xFFFFFFFF
    if interleaved:
        word = _swap(_swap(word, *_SWAP_BYTES), *_SWAP_NIBBLES)
    for distance, mask in _SPREAD:
        word = (word | word << distance) & mask
    return word.view(torch.uint8).reshape(rows, columns * PACK)


#: Eight nibbles, each in a byte of 64 bits, move together by pairs, fours and eights into 32 bits; and back.
_GATHER = ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0xFFFFFFFF))
_SPREAD = ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F))
#: 0 1 2 3 4 5 6 7 becomes GEMM_ORDER by exchanging nibbles 1-2 and 5-6, then bytes 1-2.
_SWAP_NIBBLES = (4, 0x00F000F0)
_SWAP_BYTES = (8, 0x0000FF00)


def _swap(word: Tensor, distance: int, mask: int) -> Tensor:
    """Exchange the bits under ``mask`` with those ``distance`` above them."""
    difference = (word ^ word >> distance) & mask
    return word ^ difference ^ difference << distance


def pack_scales(format: str, scales: Tensor, inputs: int) -> Tensor:
    """Return scales [N, G] as a format holds them; ``inputs``: K."""
    if format == "gemm":
        return scales.t().contiguous()
    if format == "gemv":
        groups = scales.shape[1]
        return torch.nn.functional.pad(scales, (0, zeros_width(inputs, inputs // groups) * PACK - groups))
    return scales.contiguous()


def pack_gemm(layer: QuantizedLinear) -> PackedLinear:
    """Pack a layer in the GEMM layout. Raises FormatError when N is not a multiple of 8."""
    values, zeros = (pack(part.t(), interleaved=True) for part in (layer.values, layer.zeros))
    return PackedLinear(values, zeros, pack_scales("gemm", layer.scales, layer.values.shape[1]))


def unpack_gemm(packed: PackedLinear) -> QuantizedLinear:
    """Unpack a layer in the GEMM layout."""
    return QuantizedLinear(
        unpack(packed.qweight, interleaved=True).t().contiguous(),
        unpack(packed.qzeros, interleaved=True).t().contiguous(),
        packed.scales.t().contiguous(),
    )


def pack_gemv(layer: QuantizedLinear) -> PackedLinear:
    """Pack a layer in the GEMV layout. Raises FormatError when K is not a multiple of 8 or of the group size."""
    inputs, groups = layer.values.shape[1], layer.scales.shape[1]
    if groups == 0 or inputs % groups:
        raise FormatError(f"{inputs} inputs can't be divided into {groups} groups.")
    padding = zeros_width(inputs, inputs // groups) * PACK - groups
    zeros = torch.nn.functional.pad(layer.zeros, (0, padding))
    return PackedLinear(pack(layer.values), pack(zeros), pack_scales("gemv", layer.scales, inputs))


def unpack_gemv(packed: PackedLinear, group_size: int) -> QuantizedLinear:
    """Unpack a layer in the GEMV layout; the padding is dropped. ``group_size`` -1 is one group a row."""
    inputs = packed.qweight.shape[1] * PACK
    groups = inputs // (inputs if group_size == -1 else group_size)
    return QuantizedLinear(
        unpack(packed.qweight), unpack(packed.qzeros)[:, :groups].contiguous(), packed.scales[:, :groups].contiguous()
    )


def pack_compressed(layer: QuantizedLinear) -> PackedLinear:
    """Pack a layer as compressed-tensors does. Raises FormatError when K or N is not a multiple of 8."""
    scales = pack_scales("compressed-tensors", layer.scales, layer.values.shape[1])
    return PackedLinear(pack(layer.values), pack(layer.zeros.t()).t().contiguous(), scales)


def unpack_compressed(packed: PackedLinear) -> QuantizedLinear:
    """Unpack a layer of compressed-tensors."""
    return QuantizedLinear(unpack(packed.qweight), unpack(packed.qzeros.t()).t().contiguous(), packed.scales)


_PACK = {"gemm": pack_gemm, "gemv": pack_gemv, "compressed-tensors": pack_compressed}


def pack_as(format: str, layer: QuantizedLinear) -> PackedLinear:
    """Pack a layer in a format, a name of `LAYOUTS`. Raises FormatError for a shape that it does not hold."""
    return _PACK[format](layer)


def unpack_as(format: str, packed: PackedLinear, group_size: int) -> QuantizedLinear:
    """Unpack a layer of a format; ``group_size`` -1 is one group a row."""
    if format == "gemv":
        return unpack_gemv(packed, group_size)
    return unpack_gemm(packed) if format == "gemm" else unpack_compressed(packed)


def join_outputs(format: str, parts: Sequence[PackedLinear]) -> PackedLinear:
    """Return one layer of a format whose outputs are those of all parts, in turn; each has a multiple of 8."""
    along = 1 if format == "gemm" else 0
    each = zip(*((part.qweight, part.qzeros, part.scales) for part in parts), strict=True)
    return PackedLinear(*(torch.cat(tensors, along) for tensors in each))


def slice_outputs(format: str, packed: PackedLinear, start: int, stop: int) -> PackedLinear:
    """Return outputs ``start`` to ``stop`` of a layer of a format, views of it; both are multiples of 8."""
    words = slice(start // PACK, -(-stop // PACK))
    if format == "gemm":
        return PackedLinear(packed.qweight[:, words], packed.qzeros[:, words], packed.scales[:, start:stop])
    zeros = words if format == "compressed-tensors" else slice(start, stop)
    return PackedLinear(packed.qweight[start:stop], packed.qzeros[zeros], packed.scales[start:stop])


def named(format: str, module: str, packed: PackedLinear) -> dict[str, Tensor]:
    """Return a packed layer's tensors by their full names in a checkpoint of that format."""
    layout = LAYOUTS[format]
    parts = (packed.qweight, packed.qzeros, packed.scales)
    found = {f"{module}.{name}": tensor for name, tensor in zip(layout.packed, parts, strict=True)}
    if layout.shape is not None:
        outputs, words = packed.qweight.shape  # the formats that say it have [N, K/8]
        found[f"{module}.{layout.shape}"] = torch.tensor([outputs, words * PACK])
    return found


def gemm_to_gemv(packed: PackedLinear) -> PackedLinear:
    """Repack a GEMM layer as GEMV: the same values, zeros and scales, bit for bit."""
    return pack_gemv(unpack_gemm(packed))


def gemv_to_gemm(packed: PackedLinear, group_size: int) -> PackedLinear:
    """Repack a GEMV layer as GEMM: the same values, zeros and scales, bit for bit."""
    return pack_gemm(unpack_gemv(packed, group_size))


def dequantize(layer: QuantizedLinear, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight matrix [N, K] = (value - zero) * scale, computed in ``dtype`` (None: the scales')."""
    dtype = layer.scales.dtype if dtype is None else dtype
    groups = layer.values.view(*layer.scales.shape, -1).to(dtype) - layer.zeros.to(dtype).unsqueeze(-1)
    return (groups * layer.scales.to(dtype).unsqueeze(-1)).view(layer.values.shape)
