"""Which engine runs a checkpoint, on how many GPUs, and what stands in the way.

The rules are those of vLLM 0.32, AutoAWQ 0.2.9 and AutoAWQ's CUDA kernels, read from their sources.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from toolkit.checkpoint.checkpoint import Checkpoint, QuantizationInfo
from toolkit.checkpoint.layouts import PACK
from toolkit.models.family import Unit

__all__ = ["Engine", "cpu_obstacle", "engines", "obstacle", "padding", "tensor_parallel", "vision_is_whole"]

_TP_SIZES = (1, 2, 4, 8)
#: Groups that a checkpoint in 16 bits is padded for: those of `qvl quantize`.
_DEFAULT_GROUP = 128
#: vLLM's marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES, and machete_utils.query_machete_supported_group_sizes for 16 bits.
_MARLIN_GROUPS, _MACHETE_GROUPS = (-1, 32, 64, 128), (-1, 64, 128)
#: Groups that qvl's own kernel takes (`serve.kernels`; docs/kernels.md).
KERNEL_GROUPS = (32, 64, 128)
#: Machete's prepacked block, K x N.
_MACHETE_BLOCK = (64, 128)


@dataclass(frozen=True)
class Engine:
    """Whether and how one engine runs a checkpoint."""

    name: str
    #: "yes", "repack" (after `qvl convert`, which `qvl serve` does by itself) or "no".
    runs: str
    detail: str
    #: Numbers of GPUs that can share the weights (tensor parallel).
    tensor_parallel: list[int] = field(default_factory=list)
    #: Why not on more GPUs.
    limit: str | None = None
    #: What lets more GPUs share the weights, if anything does.
    advice: str | None = None


def engines(checkpoint: Checkpoint) -> list[Engine]:
    """Say for each engine whether it runs this checkpoint, from config and headers alone."""
    return [_vllm_gpu(checkpoint), _vllm_cpu(checkpoint), _autoawq(checkpoint)]


def tensor_parallel(checkpoint: Checkpoint) -> dict[int, str | None]:
    """Return for 1, 2, 4 and 8 GPUs what prevents vLLM from splitting the weights over them; None when it can.

    Heads are split, so they must divide (key-value heads may be repeated instead); row-parallel layers (o_proj,
    down_proj) are split along their K inputs, and no group may straddle GPUs: K must divide by group_size x GPUs.
    Columns are split in words of eight. Linears in 16 bits have neither groups nor words. Where `vision_is_whole`, the
    vision tower needs an option too.
    """
    return {size: obstacle(checkpoint, size) for size in _TP_SIZES}


def padding(checkpoint: Checkpoint, size: int) -> int | None:
    """Return the intermediate size, padded with zeros, from which on ``size`` GPUs can share the weights.

    The smallest multiple of group_size x GPUs that is no less than the checkpoint's own, and equal to it where nothing
    stands in the way. In 16 bits, where groups are still to come, they are taken for 128 wide. None: padding the MLP
    does not help, `obstacle` says what stands in the way.
    """
    info = checkpoint.quantization
    group = info.group_size if info else _DEFAULT_GROUP
    if group == -1:
        return None
    inner, unit = int(checkpoint.text_config["intermediate_size"]), group * size
    padded = -(-inner // unit) * unit
    wider = replace(checkpoint, text_config={**checkpoint.text_config, "intermediate_size": padded})
    return padded if obstacle(wider, size) is None else None


def vision_is_whole(checkpoint: Checkpoint, size: int) -> bool:
    """Whether ``size`` GPUs can't share the vision tower, so that each must hold all of it.

    Because of its heads, or of packed linears whose groups or words can't be split. vLLM does that with
    ``--mm-encoder-tp-mode data``.
    """
    if size == 1 or checkpoint.vision.heads % size:
        return size > 1
    info, packed = checkpoint.quantization, checkpoint.packed_tower()
    if info is None or not packed:
        return False
    tower = checkpoint.family.tower
    rows = {unit.name for unit in (*tower.units, *tower.merger_units) if unit.row_parallel}
    for name, (outputs, inputs) in packed.items():
        group = inputs if info.group_size == -1 else info.group_size
        split = inputs % (group * size) if name.endswith(tuple(rows)) else outputs % (PACK * size)
        if split:
            return True
    return False


def obstacle(checkpoint: Checkpoint, size: int) -> str | None:
    """Return what prevents vLLM from splitting the weights over ``size`` GPUs, None when it can; `tensor_parallel`."""
    if size == 1:
        return None
    text, info = checkpoint.text_config, checkpoint.quantization
    heads, kv_heads = int(text["num_attention_heads"]), int(text["num_key_value_heads"])
    if heads % size:
        return f"{heads} attention heads don't divide by {size}"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} key-value heads neither divide by {size} nor divide it"
    shapes, packed = checkpoint.linear_shapes(), _packed(checkpoint)
    by_inputs = [unit.linears[0] for unit in checkpoint.family.units if unit.row_parallel]
    by_outputs = [unit.linears[0] for unit in checkpoint.family.units if not unit.row_parallel]
    for name in by_inputs:
        inputs = shapes[name][0]
        group = info.group_size if info and name in packed else 1
        if group == -1:
            return "one scale for all inputs of a row can't be split"
        if inputs % (group * size):
            unit = f"{group} x {size}" if group > 1 else f"{size}"
            return f"{name.split('.')[1]}'s {inputs} inputs don't divide by {unit}"
    for name in by_outputs:
        outputs = shapes[name][1]
        words = 8 if name in packed else 1
        if outputs % (words * size):
            return f"{name.split('.')[1]}'s {outputs} outputs don't divide by {words * size}"
    return None


def _vllm_gpu(checkpoint: Checkpoint) -> Engine:
    info, name = checkpoint.quantization, "vLLM on GPUs"
    if info is not None and not info.zero_point:
        return Engine(name, "no", "its AWQ reader expects zero points, and the config says zero_point: false")
    obstacles = tensor_parallel(checkpoint)
    sizes = [size for size, reason in obstacles.items() if reason is None]
    limit = next((f"{size} GPUs: {reason}" for size, reason in obstacles.items() if reason), None)
    split = [size for size in sizes if vision_is_whole(checkpoint, size)]
    option = f"{split[0]} GPUs or more need --mm-encoder-tp-mode data" if split else ""
    runs, how = ("yes", "") if info is None else _gpu_kernels(checkpoint, info)
    return Engine(name, runs, "; ".join(filter(None, (how, option))), sizes, limit, _padding_advice(checkpoint))


def _padding_advice(checkpoint: Checkpoint) -> str | None:
    """Say what padding the MLP is good for: the most GPUs that it lets share the weights, where they can't yet."""
    if checkpoint.quantization is None:
        return None
    for size in reversed(_TP_SIZES):
        padded = padding(checkpoint, size)
        if padded is not None and obstacle(checkpoint, size) is not None:
            inner = checkpoint.text_config["intermediate_size"]
            return f"{size} GPUs can with `qvl convert --pad-tp {size}`: zeros widen the MLP from {inner} to {padded}"
    return None


def _gpu_kernels(checkpoint: Checkpoint, info: QuantizationInfo) -> tuple[str, str]:
    """Return how vLLM runs packed weights on NVIDIA GPUs: the verdict and the kernels.

    compressed-tensors' WNA16 scheme chooses among the kernels that AWQ's reader does.
    """
    if info.format == "gemv":
        return "repack", "reads GEMM only; qvl serve repacks by itself"
    if info.group_size not in _MARLIN_GROUPS:
        others = "slow AWQ kernels" if info.layout.method == "awq" else "Humming"
        return "yes", f"{others} (Marlin has no groups of {info.group_size})"
    shapes = [*_fused_shapes(checkpoint), *((k, n) for n, k in checkpoint.packed_tower().values())]
    blocks = all(k % _MACHETE_BLOCK[0] == 0 and n % _MACHETE_BLOCK[1] == 0 for k, n in shapes)
    own = "Machete" if blocks and info.group_size in _MACHETE_GROUPS else "Humming"
    ours = ", qvl serve its kernel" if info.group_size in KERNEL_GROUPS else ""
    return "yes", f"Marlin; on Hopper vLLM takes {own}{ours}"


def _vllm_cpu(checkpoint: Checkpoint) -> Engine:
    info, name = checkpoint.quantization, "vLLM on CPUs"
    sizes = [
        size for size in _TP_SIZES if obstacle(checkpoint, size) is None and cpu_obstacle(checkpoint, size) is None
    ]
    if info is None:
        return Engine(name, "yes", "", sizes)
    if not info.zero_point:
        return Engine(name, "no", "its AWQ reader expects zero points, and the config says zero_point: false")
    if (odd := cpu_obstacle(checkpoint, 1)) is not None:
        return Engine(name, "no", odd)
    if info.format == "gemv":
        return Engine(name, "repack", "reads GEMM only; qvl serve repacks by itself", sizes)
    return Engine(name, "yes", "CPUWNA16 kernel", sizes)


def _autoawq(checkpoint: Checkpoint) -> Engine:
    info, name = checkpoint.quantization, "AutoAWQ 0.2.9"
    if not checkpoint.family.autoawq:
        return Engine(name, "no", f"it is older than {checkpoint.family.title}")
    if info is None:
        return Engine(name, "no", "it runs quantized weights only")
    if info.layout.method != "awq":
        return Engine(name, "no", f"it does not read {info.layout.title}: `qvl convert --to gemm`")
    if not info.zero_point:
        return Engine(name, "no", "its kernels expect zero points, and the config says zero_point: false")
    if checkpoint.packed_tower():
        return Engine(name, "no", "it has no 4-bit vision tower")
    if info.lm_head:
        return Engine(name, "no", "it has no 4-bit output head")
    left = Counter(name for _, name in checkpoint.left_linears())
    for linear in checkpoint.family.linears:
        listed = any(pattern in linear for pattern in info.modules_to_not_convert)
        if left[linear] != (checkpoint.num_layers if listed else 0):
            return Engine(name, "no", f"it leaves a linear in 16 bits in all layers or in none, not {linear} in some")
    size = info.group_size
    if info.format == "gemv":
        if size not in (64, 128):
            return Engine(name, "no", f"its GEMV kernel takes groups of 64 or 128, not {size}")
        return Engine(name, "yes", "GEMV kernel, for one request at a time")
    shapes = checkpoint.linear_shapes()
    odd = next((shapes[linear][1] for linear in _packed(checkpoint) if shapes[linear][1] % 64), None)
    if odd is not None or (size != -1 and size % 32):
        reason = f"not {odd} outputs" if odd else f"not groups of {size}"
        return Engine(name, "no", f"its GEMM kernel takes outputs in 64s and groups in 32s, {reason}")
    return Engine(name, "yes", "GEMM kernel")


def cpu_obstacle(checkpoint: Checkpoint, size: int) -> str | None:
    """Return what keeps vLLM's CPU kernel from the packed weights when ``size`` processes split them; None: nothing."""
    for (inputs, outputs), unit in zip(_fused_shapes(checkpoint), _fused_units(checkpoint), strict=True):
        k, n = (inputs // size, outputs) if unit.row_parallel else (inputs, outputs // size)
        if k % 32 or n % 32:
            whose = "a layer has" if size == 1 else f"1/{size} of a layer has"
            return f"its kernel takes multiples of 32, and {whose} {k} inputs, {n} outputs"
    if checkpoint.quantization is not None and checkpoint.quantization.lm_head:
        rows = int(checkpoint.text_config["vocab_size"])
        if rows % (32 * size):
            return f"its kernel takes multiples of 32, and 1/{size} of the output head has {rows / size:g} outputs"
    for name, (outputs, inputs) in checkpoint.packed_tower().items():
        if outputs % 32 or inputs % 32:
            whose = f"the vision tower's {name} has"
            return f"its kernel takes multiples of 32, and {whose} {inputs} inputs, {outputs} outputs"
    return None


def _fused_shapes(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Return (K, N) of the packed modules of a layer as vLLM runs them: q, k, v in one, gate and up in one."""
    shapes = checkpoint.linear_shapes()
    units = [unit.linears for unit in _fused_units(checkpoint)]
    return [(shapes[linears[0]][0], sum(shapes[name][1] for name in linears)) for linears in units]


def _fused_units(checkpoint: Checkpoint) -> list[Unit]:
    packed = _packed(checkpoint)
    return [unit for unit in checkpoint.family.units if unit.linears[0] in packed]


def _packed(checkpoint: Checkpoint) -> list[str]:
    """Return which of the family's linears are packed in any layer."""
    if checkpoint.quantization is None:
        return []
    left = Counter(name for _, name in checkpoint.left_linears())
    return [name for name in checkpoint.family.linears if left[name] < checkpoint.num_layers]
