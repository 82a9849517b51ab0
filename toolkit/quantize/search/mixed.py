"""Which decoder linears stay in 16 bits: by name, or by what quantizing them costs for their size.

How engines are told, and why it is whole units: `toolkit.checkpoint.left_out`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from toolkit.checkpoint.left_out import Linear, describe
from toolkit.console import note, warn
from toolkit.errors import FormatError
from toolkit.quantize.search.sizes import packed_bytes
from toolkit.units import human_bytes

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["choose", "extra_bytes", "skipped", "spend"]


def skipped(regex: str | None, checkpoint: Checkpoint) -> frozenset[Linear]:
    """Return the decoder linears that ``--skip regex`` leaves in 16 bits, always whole units.

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
    layers, family = range(checkpoint.num_layers), checkpoint.family
    matched = {
        (i, name) for i in layers for name in family.linears if pattern.search(checkpoint.layer_prefix(i) + name)
    }
    if not matched:
        raise FormatError(
            f"--skip {regex!r} matches no linear of the decoder (such as {checkpoint.linear_names(0)[-1]}). "
            "The vision tower, the embeddings and lm_head stay in 16 bits anyway."
        )
    units = family.fused.values()
    found = frozenset((i, name) for i in layers for unit in units for name in unit if matched & {(i, n) for n in unit})
    if len(found) == len(family.linears) * checkpoint.num_layers:
        raise FormatError(f"--skip {regex!r} would leave every linear in 16 bits: nothing would be quantized.")
    if added := found - matched:
        said = describe(added, checkpoint.num_layers, family)
        note(f"--skip {regex!r} leaves {said} in 16 bits too: engines run q, k and v as one matrix, and gate and up")
    return found


def choose(
    report: dict[str, Any],
    budget: float,
    checkpoint: Checkpoint,
    group_size: int = 128,
    search: str = "moments",
    elsewhere: int = 0,
) -> frozenset[Linear]:
    """Return the units to leave in 16 bits: those that cost most for their size, within a budget of bytes.

    Greedy: units in falling order of cost saved per extra byte, each taken if it still fits. A unit's cost is the KL
    divergence on answers where it alone is quantized (`toolkit.quantize.cost`), and all of it is taken for saved. A
    report of an earlier version has no such figure; what counts then is the error of the layer's output when only the
    unit is quantized, squared and relative to what the layer adds, which ranks units much worse.

    Args:
        report: the file that ``--layers-report`` wrote, read: ``layers[i].units[name].kl`` and ``.error[search]``.
        budget: extra bytes, relative to the checkpoint with every decoder linear quantized (in the GEMM layout).
        checkpoint: the 16-bit source.
        group_size: that of the quantization.
        search: whose errors count where there is no KL: "rtn", "autoawq" or "moments".
        elsewhere: bytes that the vision tower has less, where it is packed too.

    Raises FormatError for a budget in which no unit or every unit fits, and for a report that is none or is about
    another model, group size or search.
    """
    if not 0 < budget < math.inf:
        raise FormatError(f"--budget {budget:g} is not a share of the size to add: give 0.1 for 10 %.")
    errors = _unit_errors(report, checkpoint, group_size, search)
    units, extra = checkpoint.family.fused, extra_bytes(checkpoint, group_size)
    left_over = budget * (checkpoint.nbytes - checkpoint.num_layers * sum(extra.values()) - elsewhere)
    chosen = spend(errors, extra, left_over)
    ranked = [unit for unit in errors if errors[unit] > 0]
    if ranked and not chosen:
        least = min(extra[fused] for _, fused in ranked)
        raise FormatError(
            f"--budget {budget:g} is {human_bytes(left_over)}, and the smallest unit in 16 bits takes "
            f"{human_bytes(least)} more: give at least {math.ceil(1e4 * budget * least / left_over) / 1e4:g}."
        )
    if len(chosen) == len(errors):
        raise FormatError(f"--budget {budget:g} leaves every linear in 16 bits: nothing would be quantized.")
    return frozenset((layer, name) for layer, fused in chosen for name in units[fused])


def extra_bytes(checkpoint: Checkpoint, group_size: int) -> dict[str, int]:
    """Return how many bytes a layer's units take more in 16 bits than packed, by unit."""
    shapes, family = checkpoint.linear_shapes(), checkpoint.family
    more = {name: _nbytes(checkpoint, name) - packed_bytes(*shapes[name], group_size) for name in family.linears}
    return {unit: sum(more[name] for name in names) for unit, names in family.fused.items()}


def spend(costs: Mapping[tuple[int, str], float], extra: Mapping[str, int], left_over: float) -> list[tuple[int, str]]:
    """Return the (layer, unit) to leave in 16 bits within so many bytes, the dearest for its size first."""
    ranked = sorted((u for u in costs if costs[u] > 0), key=lambda u: costs[u] / extra[u[1]], reverse=True)
    chosen = []
    for unit in ranked:
        if extra[unit[1]] <= left_over:
            left_over -= extra[unit[1]]
            chosen.append(unit)
    return chosen


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    return checkpoint.tensors[f"{checkpoint.layer_prefix(0)}{name}.weight"].nbytes


def _is_cost(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


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
    measured = all(
        isinstance(unit := entry["units"].get(fused), dict) and _is_cost(unit.get("kl"))
        for entry in entries
        for fused in checkpoint.family.fused
    )
    for layer, entry in enumerate(entries):
        for fused in checkpoint.family.fused:
            unit = entry["units"].get(fused)
            if measured:
                found[layer, fused] = float(entry["units"][fused]["kl"])
                continue
            errors = unit.get("error") if isinstance(unit, dict) else None
            value = errors.get(search) if isinstance(errors, dict) else None
            if not _is_cost(value):
                raise FormatError(
                    f"--from-report: the report has no error of {fused} in layer {layer} by the {search} search "
                    f"(it says {value!r}). {_MAKE_ONE}"
                )
            found[layer, fused] = float(value)
    if not measured:
        warn(
            "--from-report: that report does not say what each unit costs in KL, so units are ranked by their layer's "
            f"output error, which tells little. {_MAKE_ONE}"
        )
    return found
