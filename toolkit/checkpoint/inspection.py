"""`qvl inspect`: what a checkpoint is, what it weighs, where it runs and what is wrong with it.

Headers only, so a 70 GB model takes milliseconds; ``deep`` reads the values as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.anatomy import PARTS, part_of
from toolkit.checkpoint.checkpoint import Checkpoint, QuantizationInfo
from toolkit.checkpoint.engines import Engine, engines
from toolkit.checkpoint.layouts import PACK
from toolkit.checkpoint.problems import Problem, find_problems
from toolkit.checkpoint.weights import read_json
from toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Inspection", "Part", "Problem", "inspect_checkpoint"]

_16_BIT = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


@dataclass(frozen=True)
class Part:
    """What one part of the model holds. Zeros and scales of packed weights count as bytes, not as parameters."""

    name: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found; `to_dict` is the ``--json`` output."""

    path: str
    architecture: str
    #: "fp16", "bf16", ..., or the format's title: "AWQ GEMM", "AWQ GEMV", "compressed-tensors".
    format: str
    #: Whose tensor names: "hub" or "transformers 5".
    names: str
    model: dict[str, Any]
    quantization: dict[str, Any] | None
    parts: list[Part]
    files: int
    #: What qvl.json says of how it was made, if there is one.
    made: dict[str, Any] | None
    engines: list[Engine]
    problems: list[Problem]

    @property
    def parameters(self) -> int:
        """Number of weights, packed ones included."""
        return sum(part.parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts)

    @property
    def broken(self) -> bool:
        """Whether a problem is an error."""
        return any(problem.level == "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; sizes in bytes."""
        return {**asdict(self), "total": {"parameters": self.parameters, "nbytes": self.nbytes}}


def inspect_checkpoint(path: Path, deep: bool = False) -> Inspection:
    """Describe the checkpoint in ``path``; with ``deep``, read all scales and weights for NaN, infinity and zero.

    Raises CheckpointError for a directory that can't be opened as a checkpoint at all (see `Checkpoint.open`).
    """
    checkpoint = Checkpoint.open(path)
    problems = find_problems(checkpoint)
    if deep:
        problems += _value_problems(checkpoint)
    manifest, unreadable = _made(checkpoint.path)
    if unreadable:
        problems.append(unreadable)
    info = checkpoint.quantization
    return Inspection(
        path=str(path),
        architecture=str((checkpoint.config.get("architectures") or [checkpoint.family.architecture])[0]),
        format=info.layout.title if info else _float_format(checkpoint),
        names="hub" if checkpoint.visual_prefix == checkpoint.family.hub.visual else "transformers 5",
        model=_model(checkpoint),
        quantization=_quantization(checkpoint, info) if info else None,
        parts=_parts(checkpoint),
        files=len({tensor.file for tensor in checkpoint.tensors.values()}),
        made=manifest,
        engines=engines(checkpoint),
        problems=sorted(problems, key=lambda problem: problem.level),
    )


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    text, vision = checkpoint.text_config, checkpoint.vision
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    found = {key: text[key] for key in (*keys, "vocab_size")}
    found["max_position_embeddings"] = text.get("max_position_embeddings")
    found["tied_lm_head"] = checkpoint.tied_lm_head
    return {**found, "vision_depth": vision.depth, "vision_width": vision.width}


def _float_format(checkpoint: Checkpoint) -> str:
    """Name the dtype most bytes are in."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    dtype = sizes.most_common(1)[0][0]
    return _16_BIT.get(dtype, dtype.lower())


def _quantization(checkpoint: Checkpoint, info: QuantizationInfo) -> dict[str, Any]:
    modules, linears = checkpoint.quantized_modules(), checkpoint.family.linears
    packed = [checkpoint.tensors.get(f"{module}.{part}") for module in modules for part in info.layout.parts]
    nbytes = sum(tensor.nbytes for tensor in packed if tensor)
    weights = sum(checkpoint.tensors[f"{module}.{info.layout.qweight}"].numel * PACK for module in modules)
    kinds = Counter(_kind(checkpoint, module) for module in modules)
    left = Counter(part_of(checkpoint, n) for n in checkpoint.tensors if n.rpartition(".")[0] not in set(modules))
    if any(module.startswith(checkpoint.visual_prefix) for module in modules):
        tower = {f"{checkpoint.visual_prefix}{name}" for name in checkpoint.family.tower.modules(checkpoint.vision)}
        left["vision"] = len(tower - set(modules))
    if checkpoint.tied_lm_head:
        left["lm_head"] += 1
    in_16_bits = {name: sorted(i for i, n in checkpoint.left_linears() if n == name) for name in linears}
    return {
        **asdict(info),
        "modules_to_not_convert": list(info.modules_to_not_convert),
        "bits_per_weight": round(8 * nbytes / weights, 3),
        "quantized": {kind: kinds[kind] for kind in dict.fromkeys((*linears, *sorted(kinds))) if kinds[kind]},
        "left": [part for part in PARTS if left[part] and part != "layers"],
        "left_linears": {name: layers for name, layers in in_16_bits.items() if layers},
    }


def _kind(checkpoint: Checkpoint, module: str) -> str:
    """Return what a packed module counts as: "self_attn.q_proj", "vision attn.qkv", "lm_head"."""
    if module.startswith(checkpoint.layers_prefix):
        return ".".join(module.split(".")[-2:])
    if module.startswith(checkpoint.visual_prefix):
        inside = module.removeprefix(checkpoint.visual_prefix)
        return f"vision {'.'.join(inside.split('.')[2:]) if inside.startswith('blocks.') else inside}"
    return module


def _parts(checkpoint: Checkpoint) -> list[Part]:
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    info = checkpoint.quantization
    parts = info.layout.parts if info else ()
    words = {f"{m}.{info.layout.qweight}" for m in checkpoint.quantized_modules()} if info else set()
    packed = {f"{m}.{p}" for m in checkpoint.quantized_modules() for p in parts}
    for name, tensor in checkpoint.tensors.items():
        part = part_of(checkpoint, name)
        sizes[part] += tensor.nbytes
        if name not in packed:
            parameters[part] += tensor.numel
        elif name in words:
            parameters[part] += tensor.numel * PACK
    return [Part(name, parameters[name], sizes[name]) for name in PARTS if sizes[name]]


def _made(path: Path) -> tuple[dict[str, Any] | None, Problem | None]:
    if not (path / "qvl.json").exists():
        return None, None
    try:
        manifest = read_json(path / "qvl.json")
    except CheckpointError as error:
        return None, Problem("warning", str(error))
    return {key: manifest[key] for key in ("source", "recipe", "conversions") if key in manifest}, None


def _value_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Read every floating tensor: NaN and infinity anywhere, zero and negative values among the scales."""
    from rich.progress import Progress

    from toolkit.checkpoint.values import read_values
    from toolkit.console import err

    info = checkpoint.quantization
    packed = {f"{m}.{info.layout.scales}" for m in checkpoint.quantized_modules()} if info else set()
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("reading values", total=checkpoint.nbytes)
        for found in read_values(checkpoint):
            name, total = found.tensor.name, found.tensor.numel
            if found.not_finite:
                yield Problem("error", f"{name}: {found.not_finite:,} of {total:,} values are NaN or infinite")
            if name in packed:
                yield from _scale_problems(checkpoint, name, checkpoint.get(name))
            progress.advance(task, found.tensor.nbytes)


def _scale_problems(checkpoint: Checkpoint, name: str, scales: Tensor) -> Iterator[Problem]:
    info = checkpoint.quantization
    assert info is not None
    if info.format == "gemv" and info.group_size > 0:  # the rest of a row is padding
        inputs = checkpoint.tensors[name.replace(".scales", ".qweight")].shape[-1] * 8
        scales = scales[:, : inputs // info.group_size]
    elif info.format == "gemv":
        scales = scales[:, :1]
    zeros, negative = int((scales == 0).sum()), int((scales < 0).sum())
    if zeros:
        yield Problem("warning", f"{name}: {zeros:,} of {scales.numel():,} scales are 0, which loses their weights")
    if negative:
        yield Problem("warning", f"{name}: {negative:,} of {scales.numel():,} scales are negative")
