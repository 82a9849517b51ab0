"""Checkpoints with a known fault, to see whether a benchmark finds it: faults as a broken quantizer would leave them.

    python -m bench.studies faulty-checkpoints scales   AWQ OUT --layer 2 --by 0.05
    python -m bench.studies faulty-checkpoints unfolded AWQ OUT --source FP16 [--layer 2]
    python -m bench.studies faulty-checkpoints rounded  AWQ OUT --source FP16

``scales``: every scale of one layer is off by 5%, up or down. ``unfolded``: AWQ multiplied a layer's weights by scales
and the norms before them were not divided by these. ``rounded`` is no fault but what AWQ has to beat: the same linears
rounded to nearest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.studies.settings import FaultSettings
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.errors import BenchError, CheckpointError, FormatError, QvlError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["folded_scales", "perturb_scales", "round_linears", "run", "unfold"]

#: The norms that AWQ's scales are folded into, and what reads them: q/k/v and gate/up.
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
#: That can be written.
FAULTS = ("scales", "unfolded", "rounded")
#: Of a packed linear.
PARTS = ("qweight", "qzeros", "scales")


def perturb_scales(awq: Path, out: Path, layer: int, by: float = 0.05, *, seed: int = 0, force: bool = False) -> Path:
    """Write ``awq`` to ``out`` with each group's scale in decoder layer ``layer`` times 1 + by or 1 - by, at random.

    Raises CheckpointError for a layer or a checkpoint that is not there.
    """
    import torch

    checkpoint = _quantized(awq)
    prefix = _layer(checkpoint, layer)
    random = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        if not (name.startswith(prefix) and name.endswith(".scales")):
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=random) * 2 - 1
        return (tensor.float() * (1.0 + by * signs)).to(tensor.dtype)

    return _write(checkpoint, out, change, force)


def folded_scales(awq: Path, source: Path, layer: int) -> list[Tensor]:
    """Return what AWQ divided each of the layer's `NORMS` by [K]: the source's weight / the checkpoint's.

    Raises CheckpointError when the two do not belong together.
    """
    checkpoint, original = _quantized(awq), Checkpoint.open(source)
    names = [(_layer(checkpoint, layer) + norm, _layer(original, layer) + norm) for norm in NORMS]
    return [original.get(theirs).float() / checkpoint.get(ours).float() for ours, theirs in names]


def unfold(awq: Path, out: Path, source: Path, layer: int | None = None, *, force: bool = False) -> int:
    """Write ``awq`` to ``out`` with a decoder layer's `NORMS` as they are in the 16-bit ``source``; return the layer.

    Args:
        layer: None takes the one whose scales are farthest from 1 (root mean square of their logarithm).

    Raises CheckpointError when the checkpoints do not belong together, or nothing was folded into the layer's norms.
    """
    checkpoint, original = _quantized(awq), Checkpoint.open(source)
    sizes = {}
    for index in range(checkpoint.num_layers) if layer is None else [layer]:
        scales = folded_scales(awq, source, index)
        sizes[index] = max(float(scale.abs().log().square().mean().sqrt()) for scale in scales)
    chosen = max(sizes, key=lambda index: sizes[index])
    if not sizes[chosen] > 1e-3:
        raise CheckpointError(f"{awq}: nothing was folded into the norms of layer {chosen}, the most scaled.")
    ours, theirs = checkpoint.layer_prefix(chosen), original.layer_prefix(chosen)
    norms = {ours + norm: theirs + norm for norm in NORMS}

    def change(name: str, tensor: Tensor) -> Tensor:
        return original.get(norms[name]).to(tensor.dtype) if name in norms else tensor

    _write(checkpoint, out, change, force)
    return chosen


def round_linears(awq: Path, out: Path, source: Path, *, force: bool = False) -> Path:
    """Write ``source`` to ``out`` in ``awq``'s layout and group size, its linears rounded to nearest, nothing scaled.

    Raises FormatError for a layout other than gemm, CheckpointError when the two do not belong together.
    """
    from toolkit.formats.packing import pack_gemm
    from toolkit.quantize.search.grid import round_to_grid

    checkpoint, original = _quantized(awq), Checkpoint.open(source)
    info = checkpoint.quantization
    if info is None or info.format != "gemm":
        raise FormatError(f"{awq} is not in the gemm layout: convert it first.")

    def theirs(name: str) -> str:
        """The source's name of a tensor of the checkpoint."""
        for index in range(checkpoint.num_layers):
            if name.startswith(prefix := checkpoint.layer_prefix(index)):
                return original.layer_prefix(index) + name.removeprefix(prefix)
        return name

    def change(name: str, tensor: Tensor) -> Tensor:
        module, _, part = name.rpartition(".")
        if part not in PARTS:
            return original.get(theirs(name)).to(tensor.dtype)
        packed = pack_gemm(round_to_grid(original.get(theirs(f"{module}.weight")), info.group_size))
        return getattr(packed, part).to(tensor.dtype)  # type: ignore[no-any-return]

    return _write(checkpoint, out, change, force)


def _quantized(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantization is None:
        raise CheckpointError(f"{path} holds 16-bit weights: give an AWQ checkpoint.")
    return checkpoint


def _layer(checkpoint: Checkpoint, layer: int) -> str:
    if not 0 <= layer < checkpoint.num_layers:
        raise CheckpointError(f"{checkpoint.path} has layers 0 to {checkpoint.num_layers - 1}, not {layer}.")
    return checkpoint.layer_prefix(layer)


def _write(checkpoint: Checkpoint, out: Path, change: Callable[[str, Tensor], Tensor], force: bool) -> Path:
    """Write the checkpoint, each tensor as ``change`` (name, tensor) returns it."""
    with CheckpointWriter(out, force, source=checkpoint.path, expected_bytes=checkpoint.nbytes) as writer:
        for name in checkpoint.tensors:
            tensor = checkpoint.get(name)
            changed = change(name, tensor)
            if changed.shape != tensor.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is {tuple(tensor.shape)}, and {tuple(changed.shape)} in the source: "
                    "they are not of one model."
                )
            writer.add(name, changed.contiguous())
        writer.set_config(checkpoint.config)
        writer.copy_side_files(checkpoint.path)
    return out


def run(fault: str, awq: Path, out: Path, settings: FaultSettings) -> None:
    """Write a checkpoint with a fault. Exits with 1 where it can't be written.

    Args:
        fault: ``scales``, ``unfolded`` or ``rounded``.
        awq: the checkpoint it is made of.
        out: directory to write.

    Raises:
        BenchError: no such fault, or it needs a source.
    """
    if fault not in FAULTS:
        raise BenchError(f"{fault!r} is no fault: choose among {', '.join(FAULTS)}")
    if fault != "scales" and settings.source is None:
        raise BenchError(f"{fault} needs --source")
    try:
        if fault == "scales":
            perturb_scales(awq, out, settings.layer or 0, settings.by, seed=settings.seed)
        elif settings.source is not None and fault == "unfolded":
            print(f"layer {unfold(awq, out, settings.source, settings.layer)}")
        elif settings.source is not None:
            round_linears(awq, out, settings.source)
    except QvlError as error:
        sys.exit(str(error))
