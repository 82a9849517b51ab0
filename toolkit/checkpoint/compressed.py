"""The ``quantization_config`` of compressed-tensors, read and written: 4-bit ``pack-quantized`` with zero points.

That is what llm-compressor's ``W4A16_ASYM`` writes and what vLLM's WNA16 scheme runs. It holds AWQ's values, zeros and
scales bit for bit (`toolkit.formats.packing`). All else that compressed-tensors can say is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.checkpoint.quantization import QuantizationInfo
from toolkit.errors import AlreadyQuantized, CheckpointError

__all__ = ["HEAD", "SUPPORTED", "matches", "quantization_config", "read_compressed_tensors"]

#: Ends a refusal of quantized weights.
SUPPORTED = "Only 16-bit, AWQ and compressed-tensors (4 bits, zero points) checkpoints are supported."
_FORMAT = "pack-quantized"
#: A target, or an entry of ``ignore``, that is the output head by its name in transformers and in vLLM.
HEAD = r"re:.*lm_head"


def read_compressed_tensors(path: Path, raw: dict[str, Any]) -> QuantizationInfo:
    """Read a ``quantization_config`` whose method is compressed-tensors.

    Raises AlreadyQuantized for what is valid and not supported, CheckpointError for what is no config at all.
    """
    where = f"{path / 'config.json'}: quantization_config"
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where} has no config_groups. The file is damaged or incomplete: download it again.")
    if len(groups) > 1:
        raise AlreadyQuantized(f"{path} holds weights of {len(groups)} compressed-tensors schemes. {SUPPORTED}")
    group = next(iter(groups.values()))
    weights, targets, ignore = group.get("weights"), group.get("targets"), raw.get("ignore") or []
    if not isinstance(weights, dict) or not isinstance(targets, list) or not isinstance(ignore, list):
        raise CheckpointError(
            f"{where} says not which weights it is about. It is damaged or incomplete: download it again."
        )
    odd = next(_unsupported(raw, group, weights), None)
    if odd is not None:
        raise AlreadyQuantized(f"{path} holds compressed-tensors weights {odd}. {SUPPORTED}")
    others = [str(target) for target in targets if target != "Linear"]
    if "Linear" not in targets or not all(matches(target, "lm_head") for target in others):
        raise AlreadyQuantized(
            f"{path} holds compressed-tensors weights of {', '.join(map(str, targets))}, not of all Linear but some "
            f"to ignore. {SUPPORTED}"
        )
    ignored = tuple(str(entry) for entry in ignore)
    return QuantizationInfo(
        bits=4,
        group_size=-1 if weights.get("strategy") == "channel" else int(weights["group_size"]),
        zero_point=True,
        format="compressed-tensors",
        modules_to_not_convert=ignored,
        lm_head=bool(others) and not any(matches(entry, "lm_head") for entry in ignored),
    )


def _unsupported(raw: dict[str, Any], group: dict[str, Any], weights: dict[str, Any]) -> Iterator[str]:
    """Yield what these weights are and AWQ's are not, in words that go after "weights"."""
    form = group.get("format") or raw.get("format")
    if form != _FORMAT:
        yield f"in the format {form}"
    if weights.get("num_bits", 8) != 4 or str(weights.get("type", "int")).lower() != "int":
        yield f"of {weights.get('num_bits', 8)} bits ({weights.get('type', 'int')})"
    if weights.get("symmetric", True):
        yield "without zero points (symmetric, as GPTQ's)"
    order = weights.get("actorder")
    if order is True or str(order).lower() in ("group", "dynamic"):
        yield "in the order of their activations (actorder)"
    strategy, size = weights.get("strategy", "group" if weights.get("group_size") else None), weights.get("group_size")
    if strategy not in ("group", "channel"):
        yield f"with one scale a {strategy or 'tensor'}"
    elif strategy == "group" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        yield f"in groups of {size!r}"
    if weights.get("dynamic"):
        yield "that are quantized at run time (dynamic)"
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            yield f"with quantized activations ({key})"
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if raw.get(key):
            yield f"with a {key}"


def matches(entry: str, name: str) -> bool:
    """Whether an entry of ``targets`` or ``ignore`` means the module ``name``: equal, or behind "re:" a regular
    expression that fits the name's start. One that is no expression fits nothing.
    """
    if not entry.startswith("re:"):
        return entry == name
    try:
        return re.match(entry.removeprefix("re:"), name) is not None
    except re.error:
        return False


def quantization_config(group_size: int, ignore: list[str], lm_head: bool = False) -> dict[str, Any]:
    """Return the ``quantization_config`` of 4-bit weights with zero points.

    Args:
        group_size: inputs that share a scale; -1 is the whole row.
        ignore: see `toolkit.checkpoint.left_out.ignored`.
        lm_head: whether the output head is packed too.
    """
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {
        "targets": ["Linear", HEAD] if lm_head else ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": _FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
