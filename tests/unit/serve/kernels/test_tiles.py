"""The layout of the kernel's weights: what a lane holds, there and back, and a product done the kernel's way."""

from __future__ import annotations

import numpy as np
import pytest

from serve.kernels.tiles import by_lane, pack, pack_zeros, unpack


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 16, shape, dtype=np.uint8)


@pytest.mark.parametrize(("inputs", "columns"), [(16, 64), (128, 192), (48, 128)])
def test_there_and_back(inputs: int, columns: int) -> None:
    values = random(inputs, columns)
    words = pack(values)
    assert words.shape == (inputs // 16, columns // 64, 32, 4) and words.dtype == np.int32
    assert np.array_equal(unpack(words), values)


@pytest.mark.parametrize(("inputs", "columns"), [(8, 64), (16, 32)])
def test_what_does_not_divide_is_refused(inputs: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{inputs} x {columns}"):
        pack(random(inputs, columns))


def test_a_word_holds_what_a_lane_brings_to_a_product() -> None:
    values = random(64, 128)
    words = pack(values).view(np.uint32)
    for ktile, ntile, lane, j in [(0, 0, 0, 0), (3, 1, 13, 2), (2, 0, 31, 3)]:
        g, c = divmod(lane, 4)
        n, k = 64 * ntile + 16 * j + g, 16 * ktile + 2 * c
        word = int(words[ktile, ntile, lane, j])
        halves = [((word >> 4 * p) & 15, (word >> 4 * p + 16) & 15) for p in range(4)]
        places = [(k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)]  # an input, and the one after it
        assert halves == [(values[a, b], values[a + 1, b]) for a, b in places]


def test_a_lanes_scales_are_those_of_its_columns() -> None:
    scales = np.arange(128).reshape(1, 128)
    for ntile in range(2):
        for g in range(8):
            lane = by_lane(scales)[0, 64 * ntile + 8 * g : 64 * ntile + 8 * g + 8]
            assert list(lane) == [64 * ntile + g + 8 * j for j in range(8)]
    zeros = random(3, 128)
    words = pack_zeros(zeros).view(np.uint32)
    assert words.shape == (3, 16)
    assert [int(words[1, 8 + 5]) >> 4 * j & 15 for j in range(8)] == [zeros[1, 64 + 5 + 8 * j] for j in range(8)]


@pytest.mark.parametrize("base", [128.0, 1024.0])
def test_zero_points_taken_out_by_the_sum_of_the_inputs(base: float) -> None:
    """What w4a16.cu computes, group by group in float32, is the product of the dequantized weights."""
    rng = np.random.default_rng(0)
    values, zeros = random(256, 64), random(2, 64)
    scales = rng.uniform(0.001, 0.01, (2, 64)).astype(np.float32)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    total = np.zeros((3, 64), np.float32)
    for group, rows in enumerate((slice(0, 128), slice(128, 256))):
        acc = x[:, rows] @ (base + unpack(pack(values))[rows].astype(np.float32))
        total += scales[group] * (acc - (base + zeros[group]) * x[:, rows].sum(1, keepdims=True))
    dense = (values.astype(np.float64) - zeros.repeat(128, 0)) * scales.repeat(128, 0)
    assert np.linalg.norm(total - x @ dense) < 1e-4 * np.linalg.norm(x @ dense)
