"""The packed layouts are AutoAWQ's, bit for bit, and every step can be undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.checkpoint.layouts import layer_shape, zeros_width
from toolkit.errors import FormatError
from toolkit.formats.packing import (
    GEMM_ORDER,
    PackedLinear,
    QuantizedLinear,
    dequantize,
    gemm_to_gemv,
    gemv_to_gemm,
    pack,
    pack_gemm,
    pack_gemv,
    unpack,
    unpack_gemm,
    unpack_gemv,
)

SHAPES = [(256, 256), (512, 128), (128, 512), (1152, 96), (2048, 64), (64 * 17, 40), (1920, 32), (128, 8)]


def random_layer(inputs: int, outputs: int, group_size: int, seed: int = 0) -> QuantizedLinear:
    rng = torch.Generator().manual_seed(seed)
    groups = inputs // group_size
    return QuantizedLinear(
        torch.randint(0, 16, (outputs, inputs), generator=rng, dtype=torch.uint8),
        torch.randint(0, 16, (outputs, groups), generator=rng, dtype=torch.uint8),
        (torch.rand((outputs, groups), generator=rng) * 0.02 + 1e-3).half(),
    )


@pytest.fixture(scope="module")
def awq() -> Iterator[SimpleNamespace]:
    """AutoAWQ's own packing; it warns on import that it is archived."""
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    with warnings.catch_warnings(record=True):
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.modules.linear.gemv import WQLinear_GEMV, calculate_zeros_width
        from awq.utils.packing_utils import dequantize_gemm
    yield SimpleNamespace(
        gemm=WQLinear_GEMM, gemv=WQLinear_GEMV, zeros_width=calculate_zeros_width, dequantize=dequantize_gemm
    )


def packed_by_awq(awq: SimpleNamespace, kind: str, layer: QuantizedLinear, group_size: int) -> PackedLinear:
    """Pack by AutoAWQ's own code, from the float weights the layer stands for."""
    outputs, inputs = layer.values.shape
    linear = torch.nn.Linear(inputs, outputs, bias=True)
    zeros = layer.zeros.float()
    with torch.no_grad():
        differences = layer.values.float() - zeros.repeat_interleave(group_size, 1)
        linear.weight.copy_(differences * layer.scales.float().repeat_interleave(group_size, 1))
    scales = layer.scales.float()
    if kind == "gemm":
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    packed = getattr(awq, kind).from_linear(linear, 4, group_size, False, scales, zeros)
    return PackedLinear(packed.qweight, packed.qzeros, packed.scales)


# A group size of K is what -1 means; AutoAWQ's from_linear takes it by its number only.
CASES = sorted({(k, n, g) for k, n in SHAPES for g in (32, 64, 128, k) if k % g == 0})


# AutoAWQ sizes GEMM's words by N // 32, so it can pack multiples of 32 only.
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [case for case in CASES if case[1] % 32 == 0])
def test_gemm_equals_autoawq(awq: SimpleNamespace, inputs: int, outputs: int, group_size: int) -> None:
    layer = random_layer(inputs, outputs, group_size)
    assert_same(pack_gemm(layer), packed_by_awq(awq, "gemm", layer, group_size))


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), CASES)
def test_gemv_equals_autoawq(awq: SimpleNamespace, inputs: int, outputs: int, group_size: int) -> None:
    layer = random_layer(inputs, outputs, group_size)
    assert_same(pack_gemv(layer), packed_by_awq(awq, "gemv", layer, group_size))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512])
def test_zeros_width_equals_autoawq(awq: SimpleNamespace, group_size: int) -> None:
    for groups in range(1, 120):
        assert zeros_width(groups * group_size, group_size) == awq.zeros_width(groups * group_size, group_size)


def test_dequantize_equals_autoawq(awq: SimpleNamespace) -> None:
    layer = random_layer(512, 128, 64)
    packed = pack_gemm(layer)
    theirs = awq.dequantize(packed.qweight, packed.qzeros, packed.scales, 4, 64)
    assert torch.equal(theirs.t(), dequantize(layer))


words = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=24)


@settings(deadline=None)
@given(words, st.booleans())
def test_any_word_survives_unpacking(values: list[int], interleaved: bool) -> None:
    original = torch.tensor([values], dtype=torch.int32)
    assert torch.equal(pack(unpack(original, interleaved), interleaved), original)


def test_nibbles_are_where_the_layouts_say() -> None:
    columns = torch.arange(8, dtype=torch.uint8)[None]
    assert pack(columns).item() & 0xFFFFFFFF == 0x76543210
    nibbles = [pack(columns, interleaved=True).item() >> 4 * i & 0xF for i in range(8)]
    assert nibbles == list(GEMM_ORDER)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 20),
    group_size=st.sampled_from([32, 64, 128, 256]),
    outputs=st.integers(1, 6).map(lambda n: 8 * n),
    seed=st.integers(0, 2**31),
)
def test_layouts_round_trip(groups: int, group_size: int, outputs: int, seed: int) -> None:
    layer = random_layer(groups * group_size, outputs, group_size, seed)
    for again in (unpack_gemm(pack_gemm(layer)), unpack_gemv(pack_gemv(layer), group_size)):
        assert torch.equal(again.values, layer.values)
        assert torch.equal(again.zeros, layer.zeros)
        assert torch.equal(again.scales, layer.scales)
    gemm, gemv = pack_gemm(layer), pack_gemv(layer)
    assert_same(gemv_to_gemm(gemm_to_gemv(gemm), group_size), gemm)
    assert_same(gemm_to_gemv(gemv_to_gemm(gemv, group_size)), gemv)
    shape = (groups * group_size, outputs)
    assert layer_shape("gemm", group_size, *(t.shape for t in tensors(gemm))) == shape
    assert layer_shape("gemv", group_size, *(t.shape for t in tensors(gemv))) == shape


def test_group_size_of_minus_one_is_the_whole_row() -> None:
    layer = random_layer(256, 16, 256)
    again = unpack_gemv(pack_gemv(layer), -1)
    assert torch.equal(again.scales, layer.scales)
    assert layer_shape("gemv", -1, *(t.shape for t in tensors(pack_gemv(layer)))) == (256, 16)


def test_scales_keep_their_dtype() -> None:
    layer = random_layer(256, 16, 128)
    layer = QuantizedLinear(layer.values, layer.zeros, layer.scales.bfloat16())
    assert pack_gemm(layer).scales.dtype == pack_gemv(layer).scales.dtype == torch.bfloat16


def test_views_and_other_integers_pack_the_same() -> None:
    values = random_layer(256, 17, 256).values
    assert torch.equal(pack(values[1:, 3:251]), pack(values[1:, 3:251].clone()))
    assert torch.equal(
        pack(values.flatten()[3 : 3 + 64].view(2, 32)), pack(values.flatten()[3 : 3 + 64].int().view(2, 32))
    )


def test_a_row_that_is_no_multiple_of_eight_is_refused() -> None:
    with pytest.raises(FormatError, match="12 values a row"):
        pack(torch.zeros(2, 12, dtype=torch.uint8))


@pytest.mark.parametrize("group_size", [16, 96, 8])
def test_gemv_refuses_unknown_group_sizes(group_size: int) -> None:
    with pytest.raises(FormatError, match=f"no group size {group_size}: use 32, 64 or at least 128"):
        zeros_width(group_size * 8, group_size)


def test_wrong_shapes_are_named() -> None:
    gemm = pack_gemm(random_layer(256, 64, 128))
    with pytest.raises(FormatError, match=r"scales has shape \[1, 64\].*needs \[2, 64\]"):
        layer_shape("gemm", 128, gemm.qweight.shape, gemm.qzeros.shape, (1, 64))
    with pytest.raises(FormatError, match="qzeros has shape"):
        layer_shape("gemm", 128, gemm.qweight.shape, (2, 9), gemm.scales.shape)
    with pytest.raises(FormatError, match=r"64 inputs don't divide.*is its layout really gemv"):
        layer_shape("gemv", 128, gemm.qweight.shape, gemm.qzeros.shape, gemm.scales.shape)
    with pytest.raises(FormatError, match="don't divide into groups of 96"):
        layer_shape("gemm", 96, gemm.qweight.shape, gemm.qzeros.shape, gemm.scales.shape)
    with pytest.raises(FormatError, match="two dimensions"):
        layer_shape("gemm", 128, (256,), gemm.qzeros.shape, gemm.scales.shape)


def tensors(packed: PackedLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return packed.qweight, packed.qzeros, packed.scales


def assert_same(found: PackedLinear, expected: PackedLinear) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
