"""The layout of 4-bit weights that our kernel reads, which is Humming's for 16-bit activations.

A tile is 64 columns n by 16 inputs k, 512 bytes: 32 lanes of four int32 words. Word j of a lane holds the eight weights
that the lane brings to one tensor-core product of 16 n x 16 k, columns 16 j to 16 j + 15: those of lane 4 g + c are
columns g, g + 8, inputs 2 c, 2 c + 1, 2 c + 8, 2 c + 9. Nibble p of the word holds number (0, 2, 4, 6, 1, 3, 5, 7)[p]
of the eight, counted by column, half of the inputs, input: so a pair k, k + 1 stands at one place of both halfwords.

Scales and zero points of 64 columns are kept by lane: column 8 j + i stands at 8 i + j, so that a lane's eight scales
are 16 bytes and its eight zero points one word.

The kernel reads what Humming made; this says in numpy what that is, for tests and measurements.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ORDER", "by_lane", "pack", "pack_zeros", "unpack"]

#: Which of a word's eight weights each nibble holds.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: NDArray[np.integer]) -> NDArray[np.int32]:
    """Pack 4-bit values into tiles.

    Args:
        values: [K, N] of 0 to 15; K a multiple of 16, N of 64.

    Returns:
        [K / 16, N / 64, 32, 4].
    """
    inputs, columns = values.shape
    if inputs % 16 or columns % 64:
        raise ValueError(f"{inputs} x {columns} weights don't divide into tiles of 16 x 64")
    # k tile, k half, c, k bit | n tile, word, n half, g
    parts = values.astype(np.uint32).reshape(inputs // 16, 2, 4, 2, columns // 64, 4, 2, 8)
    lanes = parts.transpose(0, 4, 7, 2, 5, 6, 1, 3).reshape(inputs // 16, columns // 64, 32, 4, 8)
    words = np.zeros(lanes.shape[:-1], np.uint32)
    for nibble, element in enumerate(ORDER):
        words |= lanes[..., element] << np.uint32(4 * nibble)
    return words.view(np.int32)


def unpack(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Undo `pack`: [K / 16, N / 64, 32, 4] -> [K, N]."""
    ktiles, ntiles = words.shape[:2]
    lanes = np.empty((*words.shape, 8), np.uint8)
    for nibble, element in enumerate(ORDER):
        lanes[..., element] = words.view(np.uint32) >> np.uint32(4 * nibble) & 15
    parts = lanes.reshape(ktiles, ntiles, 8, 4, 4, 2, 2, 2).transpose(0, 6, 3, 7, 1, 4, 5, 2)
    return parts.reshape(ktiles * 16, ntiles * 64)


def by_lane(scales: NDArray[np.generic]) -> NDArray[np.generic]:
    """Bring the scales of a group into the lanes' order: [groups, N] -> [groups, N]."""
    groups, columns = scales.shape
    return scales.reshape(groups, columns // 64, 8, 8).swapaxes(2, 3).reshape(groups, columns)


def pack_zeros(zeros: NDArray[np.integer]) -> NDArray[np.int32]:
    """Pack zero points of 0 to 15 in the lanes' order: [groups, N] -> [groups, N / 8]."""
    lanes = by_lane(zeros).astype(np.uint32).reshape(zeros.shape[0], -1, 8)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(lanes << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return words.view(np.int32)
