"""What engines run, on the shapes of the published models: the rules vLLM and AutoAWQ apply when they load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve.kernels.product import GROUP_SIZES
from toolkit.checkpoint import engines as engines_module
from toolkit.checkpoint.checkpoint import Checkpoint, QuantizationInfo, TensorInfo
from toolkit.checkpoint.engines import Engine, cpu_obstacle, engines, tensor_parallel, vision_is_whole
from toolkit.checkpoint.left_out import modules_to_not_convert
from toolkit.models.qwen2_vl import QWEN2_VL

# (hidden, intermediate, heads, key-value heads) of Qwen2-VL's config.json files.
SIZES = {
    "2B": (1536, 8960, 12, 2),
    "7B": (3584, 18944, 28, 4),
    "72B": (8192, 29568, 64, 8),
    "72B padded": (8192, 29696, 64, 8),
}


def checkpoint(size: str, quantization: QuantizationInfo | None = None, vision_heads: int = 16) -> Checkpoint:
    hidden, inner, heads, kv_heads = SIZES[size]
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    text |= {"num_key_value_heads": kv_heads, "num_hidden_layers": 1}
    return Checkpoint(Path(), QWEN2_VL, {}, text, {"num_heads": vision_heads}, {}, quantization, "model.layers.")


def awq(version: str = "gemm", group_size: int = 128, zero_point: bool = True) -> QuantizationInfo:
    return QuantizationInfo(4, group_size, zero_point, version, ("visual",))


def find(name: str, checkpoint: Checkpoint) -> Engine:
    return next(engine for engine in engines(checkpoint) if engine.name.startswith(name))


# 2B: 8960 = 70 x 128; 7B: 18944 = 148 x 128; 72B: 29568 = 231 x 128, padded 29696 = 232 x 128.
@pytest.mark.parametrize(
    ("size", "group_size", "allowed"),
    [
        ("2B", 128, [1, 2]),
        ("2B", 64, [1, 2, 4]),
        ("7B", 128, [1, 2, 4]),
        ("7B", 32, [1, 2, 4]),
        ("72B", 128, [1]),
        ("72B", 64, [1, 2]),
        ("72B padded", 128, [1, 2, 4, 8]),
        ("7B", -1, [1]),
    ],
)
def test_tensor_parallel_sizes_of_awq(size: str, group_size: int, allowed: list[int]) -> None:
    found = tensor_parallel(checkpoint(size, awq(group_size=group_size)))
    assert [gpus for gpus, obstacle in found.items() if obstacle is None] == allowed
    assert find("vLLM on GPUs", checkpoint(size, awq(group_size=group_size))).tensor_parallel == allowed


@pytest.mark.parametrize(("size", "allowed"), [("2B", [1, 2, 4]), ("7B", [1, 2, 4]), ("72B", [1, 2, 4, 8])])
def test_tensor_parallel_sizes_of_16_bit(size: str, allowed: list[int]) -> None:
    assert find("vLLM on GPUs", checkpoint(size)).tensor_parallel == allowed


def test_the_obstacle_is_named() -> None:
    assert tensor_parallel(checkpoint("72B", awq()))[2] == "down_proj's 29568 inputs don't divide by 128 x 2"
    assert tensor_parallel(checkpoint("7B"))[8] == "28 attention heads don't divide by 8"
    assert find("vLLM on GPUs", checkpoint("72B", awq())).limit == (
        "2 GPUs: down_proj's 29568 inputs don't divide by 128 x 2"
    )


def test_a_vision_tower_that_does_not_split() -> None:
    assert not vision_is_whole(checkpoint("7B"), 8)
    odd = checkpoint("7B", vision_heads=5)
    assert vision_is_whole(odd, 2)
    assert "2 GPUs or more need --mm-encoder-tp-mode data" in find("vLLM on GPUs", odd).detail


@pytest.mark.parametrize(
    ("group_size", "kernels"),
    [
        (128, "Marlin; on Hopper vLLM takes Machete, qvl serve its kernel"),
        (64, "Marlin; on Hopper vLLM takes Machete, qvl serve its kernel"),
        (32, "Marlin; on Hopper vLLM takes Humming, qvl serve its kernel"),
        (-1, "Marlin; on Hopper vLLM takes Machete"),
        (256, "slow AWQ kernels (Marlin has no groups of 256)"),
    ],
)
def test_vllms_kernels(group_size: int, kernels: str) -> None:
    engine = find("vLLM on GPUs", checkpoint("7B", awq(group_size=group_size)))
    assert (engine.runs, engine.detail) == ("yes", kernels)


def test_gemv_runs_after_a_repack() -> None:
    found = {engine.name: engine.runs for engine in engines(checkpoint("7B", awq("gemv")))}
    assert found == {"vLLM on GPUs": "repack", "vLLM on CPUs": "repack", "AutoAWQ 0.2.9": "yes"}


@pytest.mark.parametrize(
    ("version", "group_size", "runs"),
    [("gemm", 128, "yes"), ("gemm", 32, "yes"), ("gemm", 16, "no"), ("gemv", 64, "yes"), ("gemv", 32, "no")],
)
def test_autoawqs_kernels(version: str, group_size: int, runs: str) -> None:
    assert find("AutoAWQ", checkpoint("7B", awq(version, group_size))).runs == runs


def test_no_kernel_runs_awq_without_zero_points() -> None:
    found = engines(checkpoint("7B", awq(zero_point=False)))
    assert {engine.runs for engine in found} == {"no"}
    assert all("zero points" in engine.detail for engine in found)


def test_what_is_left_in_16_bits_has_no_groups() -> None:
    left = frozenset({(0, "mlp.down_proj")})
    odd = checkpoint("72B", QuantizationInfo(4, 128, True, "gemm", tuple(modules_to_not_convert(left, 1, QWEN2_VL))))
    name = "model.layers.0.mlp.down_proj.weight"
    odd.tensors[name] = TensorInfo(name, "F16", (8192, 29568), 2 * 8192 * 29568, Path(), 0)
    assert find("vLLM on GPUs", odd).tensor_parallel == [1, 2, 4, 8]  # with down_proj packed: 1
    assert find("AutoAWQ", odd).runs == "yes"
    odd.text_config["num_hidden_layers"] = 2
    assert find("vLLM on GPUs", odd).tensor_parallel == [1]
    assert find("AutoAWQ", odd).runs == "no"
    assert "all layers or in none, not mlp.down_proj in some" in find("AutoAWQ", odd).detail


def test_16_bit_runs_in_vllm() -> None:
    assert [engine.runs for engine in engines(checkpoint("7B"))] == ["yes", "yes", "no"]


def test_a_width_the_cpu_kernel_does_not_take() -> None:
    odd = checkpoint("7B", awq())
    odd.text_config["intermediate_size"] = 18944 + 16
    assert find("vLLM on CPUs", odd).runs == "no"
    assert "18960 inputs" in find("vLLM on CPUs", odd).detail
    assert "not 18960 outputs" in find("AutoAWQ", odd).detail


def test_a_packed_vision_tower_is_split_where_its_groups_are_whole() -> None:
    """Qwen2-VL's tower is 1280 wide: ten groups of 128, which two GPUs share and four can't."""
    bare = checkpoint("7B", awq())
    names = [f"visual.{name}.qweight" for name in QWEN2_VL.tower.modules(bare.vision)]
    packed = replace(bare, tensors={name: TensorInfo(name, "I32", (1,), 4, Path(), 0) for name in names})
    assert [vision_is_whole(packed, size) for size in (1, 2, 4)] == [False, False, True]
    assert not vision_is_whole(bare, 4)
    narrow = replace(packed, quantization=awq(group_size=32))
    assert not vision_is_whole(narrow, 4)
    assert find("AutoAWQ", packed).detail == "it has no 4-bit vision tower"


def test_the_kernels_groups_are_those_that_serve_has_a_kernel_for() -> None:
    assert engines_module.KERNEL_GROUPS == GROUP_SIZES


def test_a_head_in_4_bits_is_for_vllm_alone() -> None:
    """vLLM's CPU kernel takes outputs in 32s: 8 processes would have 18,992 of Qwen2-VL's 151,936 each."""
    info = replace(awq(), lm_head=True)
    packed = checkpoint("7B", info)
    packed.text_config["vocab_size"] = 151936
    assert find("AutoAWQ", packed).detail == "it has no 4-bit output head"
    assert find("vLLM on GPUs", packed).tensor_parallel == [1, 2, 4]
    assert cpu_obstacle(packed, 1) is None
    assert cpu_obstacle(packed, 8) is not None
    packed.text_config["vocab_size"] = 1000
    assert cpu_obstacle(packed, 1) == "its kernel takes multiples of 32, and 1/1 of the output head has 1000 outputs"
