"""What a quantization will need, from shapes and token counts alone, held against what the machine has."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import FormatError, ResourceError

if TYPE_CHECKING:
    import torch

    from toolkit.checkpoint import Checkpoint

__all__ = ["BITS", "FORMATS", "GROUP_SIZES", "Plan", "check_settings", "make_plan"]

FORMATS = ("gemm", "gemv")
BITS = (4,)
#: Group sizes that AutoAWQ's formats and vLLM's kernels know; -1 is the whole row.
GROUP_SIZES = (32, 64, 128, -1)
#: int32 words hold eight values along the outputs (GEMM) or the inputs (GEMV).
_PACK = 8
_FLOAT = 4
#: What Python, torch and transformers take before any tensor: measured, CPU 0.7 GB, with CUDA 2.5 GB.
_BASE_HOST = {"cpu": 0.9e9, "cuda": 3.0e9}
#: CUDA context, cuBLAS workspaces and the allocator's rounding.
_BASE_DEVICE = 1.0e9


@dataclass(frozen=True)
class Plan:
    """Bytes that a run will need, and where the layers' inputs wait.

    ``disk``: the output. ``host``: peak resident memory. ``device``: peak memory of the GPU (0 on a CPU, where
    everything is host memory). ``store_on_device``: layer inputs stay on the GPU; else they wait in host memory.
    """

    disk: int
    host: int
    device: int
    store_on_device: bool

    def check(self, out: Path, device: torch.device) -> list[str]:
        """Hold the plan against the machine.

        Returns one line a resource, with both figures.

        Raises:
            ResourceError: something will not fit; the message has the figures and what to change.
        """
        import psutil

        parent = next(p for p in out.absolute().parents if p.exists())
        rows = [
            ("disk", self.disk, shutil.disk_usage(parent).free, f"free space at {parent} or choose another --out"),
            ("host memory", self.host, _available_host(psutil.virtual_memory().available), "use fewer --samples"),
        ]
        if device.type == "cuda":
            import torch

            free, _ = torch.cuda.mem_get_info(device)
            rows.append(("GPU memory", self.device, free, "use fewer --samples, or free memory on the GPU"))
        lines = [f"{what}: needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB free" for what, need, have, _ in rows]
        short = [(line, hint) for line, (_, need, have, hint) in zip(lines, rows, strict=True) if need > have]
        if short:
            raise ResourceError("\n".join(f"not enough {line}: {hint}" for line, hint in short))
        return lines


def check_settings(checkpoint: Checkpoint, fmt: str, bits: int, group_size: int) -> None:
    """Refuse what AutoAWQ's formats, vLLM's kernels or the model's shapes do not allow.

    Raises:
        FormatError: names the setting, and for a group size the layer that it does not divide and sizes that work.
    """
    if fmt not in FORMATS:
        raise FormatError(f"unknown format {fmt!r}: choose gemm (what vLLM runs) or gemv")
    if bits not in BITS:
        raise FormatError(f"{bits} bits: AutoAWQ's formats hold 4-bit values only, use --bits 4")
    shapes = checkpoint.linear_shapes()

    def fits(size: int) -> bool:
        return all(k % (k if size == -1 else size) == 0 for k, _ in shapes.values())

    works = [str(size) for size in GROUP_SIZES if fits(size)]
    if group_size not in GROUP_SIZES:
        raise FormatError(f"group size {group_size} is not one that engines have kernels for: use {', '.join(works)}")
    if not fits(group_size):
        name, (inputs, _) = next((n, s) for n, s in shapes.items() if s[0] % group_size)
        raise FormatError(
            f"group size {group_size} does not divide the {inputs} inputs of {checkpoint.layer_prefix(0)}{name}: "
            f"use {', '.join(works)}"
        )
    for name, (inputs, outputs) in shapes.items():
        if outputs % _PACK or inputs % _PACK:
            raise FormatError(
                f"{checkpoint.layer_prefix(0)}{name} is {inputs} x {outputs}: AWQ packs {_PACK} values to a word, "
                f"so both must be multiples of {_PACK}"
            )


def make_plan(
    checkpoint: Checkpoint, group_size: int, tokens: int, sample_bytes: int, device: torch.device, longest: int
) -> Plan:
    """Work out what a run needs.

    Args:
        checkpoint: the source.
        group_size: of the output.
        tokens: in all calibration samples together.
        sample_bytes: of the prepared samples (pixels, mostly).
        device: where layers are searched.
        longest: tokens of the longest sample.
    """
    text = checkpoint.text_config
    hidden, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    shapes = checkpoint.linear_shapes()
    layers = checkpoint.num_layers
    linear_params = sum(k * n for k, n in shapes.values())
    packed = sum(_packed_bytes(k, n, group_size) for k, n in shapes.values())
    source_linear = layers * sum(
        checkpoint.tensors[f"{checkpoint.layer_prefix(0)}{name}.weight"].nbytes for name in shapes
    )
    disk = checkpoint.nbytes - source_linear + layers * packed + 30_000_000  # tokenizer and config files

    layer = linear_params * _FLOAT
    hidden_states = tokens * hidden * _FLOAT
    features = 3 * hidden_states + tokens * inner * _FLOAT
    rope = 2 * tokens * (hidden // int(text["num_attention_heads"])) * _FLOAT
    # what waits: hidden states in and out, the layer's inputs; the widest module's true and candidate output
    waiting = 2 * hidden_states + features + rope + 3 * hidden_states
    # what works: the layer, the copies that the search restores it from, candidates, one chunk or the clip's errors
    widest = 2 * hidden * inner * _FLOAT
    clip = 4 * hidden * inner * _FLOAT  # down_proj's candidate, its error and the products
    chunk = 3 * min(tokens, 16384) * inner * _FLOAT
    working = layer + 3 * widest + max(clip, chunk)
    shell = (checkpoint.nbytes - source_linear) // 2 * _FLOAT + layer
    attention = 6 * longest * hidden * _FLOAT
    pack_host = min(4 * 2**30, disk)  # the writer's shard

    kind = device.type
    base_host = int(_BASE_HOST.get(kind, 3.0e9))
    if kind == "cpu":
        host = base_host + sample_bytes + max(shell + hidden_states, waiting + working + attention) + pack_host
        return Plan(disk, int(host), 0, False)
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    on_device = int(_BASE_DEVICE + max(shell + hidden_states, waiting + working + attention))
    off_device = int(_BASE_DEVICE + max(shell, working + attention))
    host = base_host + sample_bytes + pack_host
    if on_device <= free:
        return Plan(disk, int(host), on_device, True)
    return Plan(disk, int(host + waiting), off_device, False)


def _packed_bytes(inputs: int, outputs: int, group_size: int) -> int:
    """Bytes of qweight, qzeros and scales of one linear, GEMM layout (GEMV pads a little more)."""
    groups = inputs // (inputs if group_size == -1 else group_size)
    return inputs * outputs // 2 + groups * outputs // 2 + 2 * groups * outputs


def _available_host(available: int, group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return free host memory in bytes, bounded by the control group's limit where one is set (containers).

    Files in the page cache count as used there, but give way when memory is asked for.
    """
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is no limit: a ValueError
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(available, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, ValueError, KeyError):
        return available
