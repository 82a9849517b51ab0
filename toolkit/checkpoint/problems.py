"""What keeps engines from running a checkpoint that can be opened, or makes them answer nonsense: one list for all.

`qvl inspect` shows it; `qvl quantize`, `merge` and `serve` refuse to begin where it holds an error. Headers and small
files alone are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from toolkit.checkpoint.anatomy import Expected, expected_tensors, part_of
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.layouts import layer_shape
from toolkit.checkpoint.left_out import vllm_ignores, vllm_leaves
from toolkit.checkpoint.quantization import QuantizationInfo
from toolkit.checkpoint.side_files import side_problems
from toolkit.console import warn
from toolkit.errors import CheckpointError, FormatError

__all__ = ["Problem", "find_problems", "refuse_broken"]

_FLOATS = ("F16", "BF16", "F32")
#: Activations of the MLP that vLLM has for this architecture.
_ACTIVATION = "silu"


@dataclass(frozen=True)
class Problem:
    """Something wrong: an "error" keeps engines from running the checkpoint (or makes it answer nonsense)."""

    level: str
    message: str


def find_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Return all that is wrong with a checkpoint, from its config, headers and side files; errors come first."""
    found = [
        *_config_problems(checkpoint),
        *_tensor_problems(checkpoint),
        *_quantization_problems(checkpoint),
        *(Problem(level, message) for level, message in side_problems(checkpoint)),
    ]
    return sorted(found, key=lambda problem: problem.level)


def refuse_broken(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with an error; print its warnings.

    Raises:
        CheckpointError: the first error, and how many more there are.
    """
    found = find_problems(checkpoint)
    errors = [problem.message for problem in found if problem.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: `qvl inspect {checkpoint.path}`)" if errors[1:] else ""
        raise CheckpointError(f"{checkpoint.path}: {errors[0]}{more}")
    for problem in found:
        warn(f"{checkpoint.path}: {problem.message}")


def _config_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Look for settings that engines refuse, or read differently from each other."""
    text, vision = checkpoint.text_config, checkpoint.vision
    heads, kv_heads = int(text["num_attention_heads"]), int(text["num_key_value_heads"])
    width = not text.get("head_dim") and not checkpoint.family.head and int(text["hidden_size"]) % heads
    if width or heads % kv_heads:
        what = f"{kv_heads} key-value heads" if heads % kv_heads else f"hidden_size {text['hidden_size']}"
        yield Problem("error", f"config.json: {what} and {heads} attention heads don't divide")
    if vision.width % vision.heads:
        yield Problem("error", f"config.json: vision width {vision.width} does not divide by its {vision.heads} heads")
    activation = text.get("hidden_act", _ACTIVATION)
    if activation != _ACTIVATION:
        yield Problem("error", f"config.json: hidden_act is {activation!r}, and vLLM runs this model with silu only")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    head = checkpoint.family.widths(text)["head"]
    if not isinstance(sections, list) or not all(isinstance(size, int) for size in sections):
        yield Problem(
            "error",
            "config.json: rope_scaling has no mrope_section, without which vLLM counts positions in one dimension and "
            'transformers in three: add {"type": "mrope", "mrope_section": [16, 24, 24]} (for heads of 128)',
        )
    elif len(sections) != 3 or 2 * sum(sections) != head:
        yield Problem("error", f"config.json: mrope_section {sections} is not three numbers that sum to {head // 2}")


def _tensor_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Compare the tensors with what the config calls for."""
    missing: dict[str, list[str]] = {}
    known: set[str] = set()
    for expected in expected_tensors(checkpoint):
        module = expected.name.removesuffix(".weight")
        info = checkpoint.quantization
        if info is not None and expected.linear and checkpoint.is_packed(module):
            names = [f"{module}.{part}" for part in info.layout.parts]
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
    odd = [name for name in odd if not (checkpoint.tied_lm_head and name.startswith("lm_head."))]
    if odd:
        yield Problem(
            "error",
            f"tensors that no {checkpoint.family.title} of this config has (vLLM stops at them, and drops biases): "
            f"{_and_more(odd)}",
        )


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
    if tensor is not None and tensor.dtype not in _FLOATS:
        yield Problem("error", f"{tensor.name} is stored as {tensor.dtype}, not in a 16 or 32 bit float")
    module = expected.name.removesuffix(".weight")
    info = checkpoint.quantization  # Checkpoint.open has refused packed weights without a config
    parts = [f"{module}.{part}" for part in info.layout.packed] if info and expected.linear else []
    if info is None or not parts or any(part not in checkpoint.tensors for part in parts):
        return
    try:
        qweight, qzeros, scales = (checkpoint.tensors[part].shape for part in parts)
        inputs, outputs = layer_shape(info.format, info.group_size, qweight, qzeros, scales)
    except FormatError as error:
        yield Problem("error", f"{module}: {error}")
        return
    if (outputs, inputs) != expected.shape:
        yield Problem(
            "error",
            f"{module} packs {outputs} x {inputs} weights, and the config calls for "
            f"{expected.shape[0]} x {expected.shape[1]} (is its layout really {info.format}?)",
        )


def _quantization_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Compare the packed modules with what the quantization config says is packed: engines believe the config."""
    info = checkpoint.quantization
    if info is None:
        return
    modules = set(checkpoint.quantized_modules())
    if not info.zero_point:
        yield Problem("error", "the config says zero_point: false, which neither vLLM's nor AutoAWQ's AWQ kernels run")
    yield from _left_problems(checkpoint, info)
    head = any(m.startswith("lm_head") for m in modules)
    if head != info.lm_head:
        says = "lm_head: true" if info.lm_head else "nothing of it"
        yield Problem("error", f"lm_head is {'' if head else 'not '}packed, and quantization_config says {says}")


def _left_problems(checkpoint: Checkpoint, info: QuantizationInfo) -> Iterator[Problem]:
    """Compare what is in 16 bits with what vLLM takes for it; without a list, AWQ goes by the tensors."""
    left, modules = checkpoint.left_linears(), set(checkpoint.quantized_modules())
    family, vllm, patterns = checkpoint.family, checkpoint.family.vllm, info.modules_to_not_convert
    awq = info.layout.method == "awq"
    key, leaves = ("modules_to_not_convert", vllm_leaves) if awq else ("ignore", vllm_ignores)
    by_list = bool(patterns) or not awq
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
            elif by_list:
                try:
                    is_left = leaves(f"{vllm.layers}{index}.{fused}", patterns, family)
                except FormatError as error:
                    yield Problem("error", str(error))
                    continue
                listed += packed if is_left else []
                unlisted += [] if is_left else plain
    if "lm_head" in modules and by_list and leaves(vllm.head, patterns, family):
        listed.append("lm_head")
    tower_listed, tower_unlisted = _tower_listed(checkpoint, lambda module: leaves(module, patterns, family))
    listed += tower_listed if by_list else []
    if listed:
        yield Problem("error", f"packed, but listed in {key}: {_and_more(listed)}")
    if unlisted:
        yield Problem("error", f"in 16 bits, but not listed in {key}: {_and_more(unlisted)}")
    if not by_list:
        return
    if tower_unlisted and checkpoint.packed_tower():
        yield Problem("error", f"in 16 bits, but not listed in {key}: {_and_more(tower_unlisted)}")
    elif tower_unlisted:
        yield Problem("error", f"the vision tower is in 16 bits, and {key} does not list visual")


def _tower_listed(checkpoint: Checkpoint, leaves: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Return which of the vision tower's linears are packed but listed, and which are in 16 bits but not."""
    family, packed, prefix = checkpoint.family, checkpoint.packed_tower(), checkpoint.visual_prefix
    listed, unlisted = [], []
    for name in family.tower.modules(checkpoint.vision):
        is_left = leaves(family.vllm.visual + name)
        if is_left and name in packed:
            listed.append(prefix + name)
        elif not is_left and name not in packed:
            unlisted.append(prefix + name)
    return listed, unlisted
