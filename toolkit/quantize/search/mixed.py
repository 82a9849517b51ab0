"""AWQ checkpoints that leave some decoder linears in 16 bits: which, by name or by what they cost, and how engines
are told.

Engines run q, k and v as one matrix, and gate and up as one, so what is left is always a whole `FUSED` unit. They learn
of it from ``quantization_config.modules_to_not_convert``, and each reads that list in its own way:

- vLLM 0.25 to 0.32 (``auto_awq.py``, ``quant_utils.is_layer_skipped``): an entry counts where it is a substring of the
  module's name in vLLM, ``language_model.model.layers.3.mlp.gate_up_proj`` or ``visual.blocks.0.attn.qkv``. Entries
  that begin like a checkpoint's names (``model.layers.``) are renamed first. A fused module is left when its own name
  matches or all its parts' names do; when only some do, vLLM does not start.
- SGLang (``awq.py``): a substring of the fused module's name; the parts' names mean nothing to it.
- transformers 5 (``should_convert_module``): a regular expression that matches from the name's start, or the name's
  end, ``model.language_model.layers.3.mlp.up_proj``. So ``layers.3.`` says nothing, and ``visual`` alone leaves
  no module of the vision tower.
- AutoAWQ 0.2.9 (``exclude_layers_to_not_quantize``): a substring of the name inside the layer, ``mlp.down_proj``: it
  can leave a linear in all layers or in none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import LINEARS
from toolkit.console import note
from toolkit.errors import FormatError
from toolkit.units import human_bytes

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = [
    "FUSED",
    "UNITS",
    "Linear",
    "choose",
    "describe",
    "modules_to_not_convert",
    "skipped",
    "vllm_leaves",
]

#: A decoder linear: the layer's index and one of `LINEARS`.
Linear = tuple[int, str]

#: The modules of a decoder layer as engines run them, and the linears that each consists of.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
#: What is quantized or left together.
UNITS = tuple(FUSED.values())

#: How vLLM's Qwen2-VL renames entries that begin like the names in a checkpoint; the first that fits.
_RENAMES = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}


def skipped(regex: str | None, checkpoint: Checkpoint) -> frozenset[Linear]:
    """Return the decoder linears that ``--skip regex`` leaves in 16 bits, always whole `UNITS`.

    ``regex`` is searched (`re.search`) in the full module names of the checkpoint, such as
    ``model.layers.0.mlp.down_proj``. A note says what was added to make units whole. None leaves nothing.

    Raises FormatError for what is no regular expression, matches no decoder linear, or all of them.
    """
    if regex is None:
        return frozenset()
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise FormatError(f"--skip {regex!r} is not a regular expression: {error}.") from error
    layers = range(checkpoint.num_layers)
    matched = {(i, name) for i in layers for name in LINEARS if pattern.search(checkpoint.layer_prefix(i) + name)}
    if not matched:
        raise FormatError(
            f"--skip {regex!r} matches no linear of the decoder (such as {checkpoint.linear_names(0)[-1]}). "
            "The vision tower, the embeddings and lm_head stay in 16 bits anyway."
        )
    found = frozenset((i, name) for i in layers for unit in UNITS for name in unit if matched & {(i, n) for n in unit})
    if len(found) == len(LINEARS) * checkpoint.num_layers:
        raise FormatError(f"--skip {regex!r} would leave every linear in 16 bits: nothing would be quantized.")
    if added := found - matched:
        note(
            f"--skip {regex!r} leaves {describe(added, checkpoint.num_layers)} in 16 bits too: engines run q, k and v "
            "as one matrix, and gate and up"
        )
    return found


def modules_to_not_convert(left: frozenset[Linear], layers: int) -> list[str]:
    """Return the list for ``quantization_config`` that makes engines leave ``left`` and the vision tower in 16 bits.

    Exact for vLLM, SGLang and transformers; for AutoAWQ where every unit is left in all layers or in none. Layers
    are never abbreviated, see the module's docstring.

    Args:
        left: whole units, as `skipped` and `choose` return them.
        layers: number of decoder layers.
    """
    entries = ["visual", "model.visual"]
    for fused, parts in FUSED.items():
        where = sorted({layer for layer, name in left if name in parts})
        prefixes = [""] if len(where) == layers else [f"layers.{layer}." for layer in where]
        entries += [prefix + name for prefix in prefixes for name in dict.fromkeys((*parts, fused))]
    return entries


def vllm_leaves(module: str, patterns: Sequence[str]) -> bool:
    """Whether vLLM leaves ``module`` in 16 bits: the rule of its ``is_layer_skipped``, on renamed entries.

    Args:
        module: the name inside vLLM: "language_model.model.layers.3.self_attn.qkv_proj", "visual.merger.mlp.0", ...
        patterns: ``modules_to_not_convert`` as it is in config.json.

    Raises FormatError when the list has some parts of a fused module and not the others.
    """
    renamed = [_in_vllm(pattern) for pattern in patterns]

    def listed(name: str) -> bool:
        return any(pattern in name for pattern in renamed)

    parts = next((parts for fused, parts in FUSED.items() if len(parts) > 1 and module.endswith(f".{fused}")), None)
    if parts is None or listed(module):
        return listed(module)
    stem = ".".join(module.split(".")[:-2])
    verdicts = {part: listed(f"{stem}.{part}") for part in parts}
    if len(set(verdicts.values())) > 1:
        raise FormatError(
            f"modules_to_not_convert has {', '.join(p for p in parts if verdicts[p])} of {stem} and not "
            f"{', '.join(p for p in parts if not verdicts[p])}: vLLM runs them as one matrix and does not start"
        )
    return all(verdicts.values())


def _in_vllm(pattern: str) -> str:
    old = next((old for old in _RENAMES if pattern.startswith(old)), "")
    return _RENAMES.get(old, "") + pattern.removeprefix(old)


def choose(
    report: dict[str, Any], budget: float, checkpoint: Checkpoint, group_size: int = 128, search: str = "moments"
) -> frozenset[Linear]:
    """Return the units to leave in 16 bits: those that hurt most for their size, within a budget of bytes.

    Greedy: units in falling order of error saved per extra byte, each taken if it still fits. A unit's error is that of
    its layer's output when only the unit is quantized, squared and relative to what the layer adds; it is saved whole.

    Args:
        report: the file that ``--layers-report`` wrote, read: ``layers[i].units[fused name].error[search]``.
        budget: extra bytes, relative to the checkpoint with every decoder linear quantized (in the GEMM layout).
        checkpoint: the 16-bit source.
        group_size: that of the quantization.
        search: whose errors count: "rtn", "autoawq" or "moments".

    Raises FormatError for a budget in which no unit or every unit fits, and for a report that is none or is about
    another model, group size or search.
    """
    if not 0 < budget < math.inf:
        raise FormatError(f"--budget {budget:g} is not a share of the size to add: give 0.1 for 10 %.")
    errors = _unit_errors(report, checkpoint, group_size, search)
    sizes = {name: (_nbytes(checkpoint, name), _packed_nbytes(checkpoint, name, group_size)) for name in LINEARS}
    extra = {fused: sum(sizes[name][0] - sizes[name][1] for name in parts) for fused, parts in FUSED.items()}
    saved = checkpoint.num_layers * sum(plain - packed for plain, packed in sizes.values())
    left_over = budget * (checkpoint.nbytes - saved)
    ranked = sorted((u for u in errors if errors[u] > 0), key=lambda u: errors[u] / extra[u[1]], reverse=True)
    chosen = []
    for layer, fused in ranked:
        if extra[fused] <= left_over:
            left_over -= extra[fused]
            chosen.append((layer, fused))
    if ranked and not chosen:
        least = min(extra[fused] for _, fused in ranked)
        raise FormatError(
            f"--budget {budget:g} is {human_bytes(left_over)}, and the smallest unit in 16 bits takes "
            f"{human_bytes(least)} more: give at least {math.ceil(1e4 * budget * least / left_over) / 1e4:g}."
        )
    if len(chosen) == len(errors):
        raise FormatError(f"--budget {budget:g} leaves every linear in 16 bits: nothing would be quantized.")
    return frozenset((layer, name) for layer, fused in chosen for name in FUSED[fused])


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    return checkpoint.tensors[f"{checkpoint.layer_prefix(0)}{name}.weight"].nbytes


def _packed_nbytes(checkpoint: Checkpoint, name: str, group_size: int) -> int:
    """Bytes of qweight, qzeros and fp16 scales in the GEMM layout."""
    inputs, outputs = checkpoint.linear_shapes()[name]
    groups = 1 if group_size == -1 else inputs // group_size
    return outputs * inputs // 2 + outputs * groups // 2 + 2 * outputs * groups


_MAKE_ONE = "Make one of this model with qvl quantize --layers-report FILE."


def _unit_errors(
    report: dict[str, Any], checkpoint: Checkpoint, group_size: int, search: str
) -> dict[tuple[int, str], float]:
    """Return the error of each (layer, fused name), having checked that the report is about this quantization."""
    entries = report.get("layers")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("units"), dict) for e in entries
    ):
        raise FormatError(f"--from-report: that file is not a report on layers (layers[].units). {_MAKE_ONE}")
    if [entry.get("layer") for entry in entries] != list(range(checkpoint.num_layers)):
        raise FormatError(
            f"--from-report: the report is about {len(entries)} layers, and {checkpoint.path} has "
            f"{checkpoint.num_layers}. {_MAKE_ONE}"
        )
    if report.get("group_size", group_size) != group_size:
        raise FormatError(
            f"--from-report: the report is about --group-size {report['group_size']}, not {group_size}. {_MAKE_ONE}"
        )
    found = {}
    for layer, entry in enumerate(entries):
        for fused in FUSED:
            unit = entry["units"].get(fused)
            errors = unit.get("error") if isinstance(unit, dict) else None
            value = errors.get(search) if isinstance(errors, dict) else None
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise FormatError(
                    f"--from-report: the report has no error of {fused} in layer {layer} by the {search} search "
                    f"(it says {value!r}). {_MAKE_ONE}"
                )
            found[layer, fused] = float(value)
    return found


def describe(linears: Iterable[Linear], layers: int) -> str:
    """Say which linears these are: "layers 0, 3-5; mlp.down_proj of layer 7; self_attn.o_proj of every layer"."""
    linears = set(linears)
    whole = [layer for layer in range(layers) if all((layer, name) in linears for name in LINEARS)]
    places: dict[tuple[int, ...], list[str]] = {}
    for name in LINEARS:
        where = tuple(layer for layer in range(layers) if (layer, name) in linears and layer not in whole)
        if where:
            places.setdefault(where, []).append(name)
    said = [_ranges(whole, layers)] if whole else []
    return "; ".join([*said, *(f"{', '.join(names)} of {_ranges(where, layers)}" for where, names in places.items())])


def _ranges(where: Sequence[int], layers: int) -> str:
    if len(where) == layers:
        return "every layer"
    runs: list[list[int]] = []
    for layer in where:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' * (len(where) > 1)} {shown}"
