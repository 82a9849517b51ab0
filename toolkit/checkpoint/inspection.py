"""`qvl inspect`: what a checkpoint is, what it weighs, where it runs and what is wrong with it.

Headers only, so a 70 GB model takes milliseconds; ``deep`` reads the values as well.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.anatomy import PARTS, Expected, expected_tensors, part_of
from toolkit.checkpoint.checkpoint import Checkpoint, QuantizationInfo
from toolkit.checkpoint.engines import Engine, engines
from toolkit.checkpoint.layouts import layer_shape
from toolkit.checkpoint.left_out import vllm_leaves
from toolkit.checkpoint.weights import LFS_MAGIC, read_json
from toolkit.errors import CheckpointError, FormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Inspection", "Part", "Problem", "inspect_checkpoint"]

_PACKED = ("qweight", "qzeros", "scales")
_16_BIT = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


@dataclass(frozen=True)
class Problem:
    """Something wrong: an "error" keeps engines from running the checkpoint (or makes it answer nonsense)."""

    level: str
    message: str


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
    #: "fp16", "bf16", ..., or "AWQ GEMM" / "AWQ GEMV".
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
    problems = [*_tensor_problems(checkpoint), *_quantization_problems(checkpoint), *_file_problems(checkpoint.path)]
    if deep:
        problems += _value_problems(checkpoint)
    manifest, unreadable = _made(checkpoint.path)
    if unreadable:
        problems.append(unreadable)
    info = checkpoint.quantization
    return Inspection(
        path=str(path),
        architecture=str((checkpoint.config.get("architectures") or [checkpoint.family.architecture])[0]),
        format=f"AWQ {info.version.upper()}" if info else _float_format(checkpoint),
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
    packed = [checkpoint.tensors.get(f"{module}.{part}") for module in modules for part in _PACKED]
    nbytes = sum(tensor.nbytes for tensor in packed if tensor)
    weights = sum(checkpoint.tensors[f"{module}.qweight"].numel * 8 for module in modules)
    kinds = Counter(".".join(m.split(".")[-2:]) if m.startswith(checkpoint.layers_prefix) else m for m in modules)
    left = Counter(part_of(checkpoint, n) for n in checkpoint.tensors if n.rpartition(".")[0] not in set(modules))
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


def _parts(checkpoint: Checkpoint) -> list[Part]:
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    packed = {f"{m}.{p}" for m in checkpoint.quantized_modules() for p in _PACKED}
    for name, tensor in checkpoint.tensors.items():
        part = part_of(checkpoint, name)
        sizes[part] += tensor.nbytes
        if name not in packed:
            parameters[part] += tensor.numel
        elif name.endswith(".qweight"):
            parameters[part] += tensor.numel * 8
    return [Part(name, parameters[name], sizes[name]) for name in PARTS if sizes[name]]


def _made(path: Path) -> tuple[dict[str, Any] | None, Problem | None]:
    if not (path / "qvl.json").exists():
        return None, None
    try:
        manifest = read_json(path / "qvl.json")
    except CheckpointError as error:
        return None, Problem("warning", str(error))
    return {key: manifest[key] for key in ("source", "recipe", "conversions") if key in manifest}, None


def _tensor_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Compare the tensors with what the config calls for."""
    missing: dict[str, list[str]] = {}
    known: set[str] = set()
    for expected in expected_tensors(checkpoint):
        module = expected.name.removesuffix(".weight")
        if expected.linear and f"{module}.qweight" in checkpoint.tensors:
            names = [f"{module}.{part}" for part in _PACKED]
        else:
            names = [expected.name]
        known.update(names)
        for name in names:
            if name not in checkpoint.tensors:
                missing.setdefault(_place(checkpoint, name), []).append(name)
        yield from _shape_problems(checkpoint, expected)
    for place, names in missing.items():
        yield Problem("error", f"{place} lacks {_and_more(names)}")
    if checkpoint.tied_lm_head and "lm_head.weight" in checkpoint.tensors:
        known.add("lm_head.weight")
        yield Problem(
            "warning",
            "config.json ties lm_head to the embeddings, so engines ignore lm_head.weight: if it was trained apart, "
            "set tie_word_embeddings to false",
        )
    odd = [name for name in checkpoint.tensors if name not in known and not name.endswith(".inv_freq")]
    odd = [name for name in odd if not name.startswith("lm_head.")]
    if odd:
        yield Problem("warning", f"tensors that no {checkpoint.family.title} of this config has: {_and_more(odd)}")


def _and_more(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _place(checkpoint: Checkpoint, name: str) -> str:
    if name.startswith(checkpoint.layers_prefix):
        return f"layer {name.removeprefix(checkpoint.layers_prefix).partition('.')[0]}"
    return f"the {part_of(checkpoint, name)} part"


def _shape_problems(checkpoint: Checkpoint, expected: Expected) -> Iterator[Problem]:
    tensor = checkpoint.tensors.get(expected.name)
    if tensor is not None and tensor.shape != expected.shape:
        yield Problem(
            "error", f"{tensor.name} is {list(tensor.shape)}, and the config calls for {list(expected.shape)}"
        )
    if tensor is not None and tensor.dtype not in _16_BIT:
        yield Problem("error", f"{tensor.name} is stored as {tensor.dtype}, not in a 16 or 32 bit float")
    module = expected.name.removesuffix(".weight")
    if not expected.linear or any(f"{module}.{part}" not in checkpoint.tensors for part in _PACKED):
        return
    info = checkpoint.quantization
    assert info is not None  # Checkpoint.open has refused packed weights without a config
    try:
        qweight, qzeros, scales = (checkpoint.tensors[f"{module}.{part}"].shape for part in _PACKED)
        inputs, outputs = layer_shape(info.version, info.group_size, qweight, qzeros, scales)
    except FormatError as error:
        yield Problem("error", f"{module}: {error}")
        return
    if (outputs, inputs) != expected.shape:
        yield Problem(
            "error",
            f"{module} packs {outputs} x {inputs} weights, and the config calls for "
            f"{expected.shape[0]} x {expected.shape[1]} (is its layout really {info.version}?)",
        )


def _quantization_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Compare the packed modules with what the quantization config says is packed: engines believe the config."""
    info = checkpoint.quantization
    if info is None:
        return
    modules = set(checkpoint.quantized_modules())
    if not info.zero_point:
        yield Problem("error", "the config says zero_point: false, which neither vLLM's nor AutoAWQ's AWQ kernels run")
    yield from _left_problems(checkpoint, info.modules_to_not_convert)
    head = any(m.startswith("lm_head") for m in modules)
    if head != info.lm_head:
        says = "lm_head: true" if info.lm_head else "nothing of it"
        yield Problem("error", f"lm_head is {'' if head else 'not '}packed, and quantization_config says {says}")


def _left_problems(checkpoint: Checkpoint, patterns: tuple[str, ...]) -> Iterator[Problem]:
    """Compare what is in 16 bits with what vLLM takes for it; without a list, it goes by the tensors."""
    left, modules = checkpoint.left_linears(), set(checkpoint.quantized_modules())
    family, vllm = checkpoint.family, checkpoint.family.vllm
    listed, unlisted = [], []
    for index in range(checkpoint.num_layers):
        prefix = checkpoint.layer_prefix(index)
        for fused, parts in family.fused.items():
            plain = [prefix + part for part in parts if (index, part) in left]
            packed = [prefix + part for part in parts if prefix + part in modules]
            if plain and packed:
                yield Problem(
                    "error", f"{packed[0]} is packed and {plain[0]} is not, and engines run them as one matrix"
                )
            elif patterns:
                try:
                    leaves = vllm_leaves(f"{vllm.layers}{index}.{fused}", patterns, family)
                except FormatError as error:
                    yield Problem("error", str(error))
                    continue
                listed += packed if leaves else []
                unlisted += [] if leaves else plain
    if "lm_head" in modules and patterns and vllm_leaves(vllm.head, patterns, family):
        listed.append("lm_head")
    if listed:
        yield Problem("error", f"packed, but listed in modules_to_not_convert: {_and_more(listed)}")
    if unlisted:
        yield Problem("error", f"in 16 bits, but not listed in modules_to_not_convert: {_and_more(unlisted)}")
    vision = [
        e.name for e in expected_tensors(checkpoint) if part_of(checkpoint, e.name) == "vision" and len(e.shape) == 2
    ]
    tower = [f"{vllm.visual}{name.removeprefix(checkpoint.visual_prefix).removesuffix('.weight')}" for name in vision]
    if patterns and not all(vllm_leaves(module, patterns, family) for module in tower):
        yield Problem("error", "the vision tower is in 16 bits, and modules_to_not_convert does not list visual")


def _file_problems(path: Path) -> Iterator[Problem]:
    """Look for the files a server needs beside the weights, and whether they are what they seem."""
    have = {p.name for p in path.iterdir()}
    for name in sorted(have):
        file = path / name
        if not file.is_file() or file.suffix not in (".json", ".txt", ".jinja"):
            continue
        with file.open("rb") as stream:
            start = stream.read(len(LFS_MAGIC))
        if start == LFS_MAGIC:
            yield Problem("error", f"{name} is a Git-LFS pointer, not the file: run `git lfs pull`")
            continue
        if file.suffix == ".json" and start.startswith(codecs.BOM_UTF8):
            yield Problem(
                "error", f"{name} begins with a byte order mark, at which transformers and vLLM stop: save it without"
            )
        if file.suffix == ".json":
            try:
                read_json(file)
            except CheckpointError as error:
                yield Problem("error", str(error))
    if "tokenizer.json" not in have and not {"vocab.json", "merges.txt"} <= have:
        yield Problem("error", "no tokenizer: tokenizer.json (or vocab.json with merges.txt) is missing")
    if "tokenizer_config.json" not in have:
        yield Problem("error", "no tokenizer_config.json: special tokens and the tokenizer's class are unknown")
    if not have & {"preprocessor_config.json", "processor_config.json"}:
        yield Problem("error", "no image processor: preprocessor_config.json (or processor_config.json) is missing")
    if not have & {"chat_template.json", "chat_template.jinja"} and not _template_in_tokenizer(path):
        yield Problem(
            "error", "no chat template: chat_template.json, chat_template.jinja or one in tokenizer_config.json"
        )
    if "generation_config.json" not in have:
        yield Problem("warning", "no generation_config.json: engines fall back on config.json's end-of-text token")


def _template_in_tokenizer(path: Path) -> bool:
    try:
        return bool(read_json(path / "tokenizer_config.json").get("chat_template"))
    except CheckpointError:
        return False


def _value_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Read every floating tensor: NaN and infinity anywhere, zero and negative values among the scales."""
    from rich.progress import Progress

    from toolkit.checkpoint.values import read_values
    from toolkit.console import err

    packed = {f"{m}.scales" for m in checkpoint.quantized_modules()}
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
    if info.version == "gemv" and info.group_size > 0:  # the rest of a row is padding
        inputs = checkpoint.tensors[name.replace(".scales", ".qweight")].shape[-1] * 8
        scales = scales[:, : inputs // info.group_size]
    elif info.version == "gemv":
        scales = scales[:, :1]
    zeros, negative = int((scales == 0).sum()), int((scales < 0).sum())
    if zeros:
        yield Problem("warning", f"{name}: {zeros:,} of {scales.numel():,} scales are 0, which loses their weights")
    if negative:
        yield Problem("warning", f"{name}: {negative:,} of {scales.numel():,} scales are negative")
