"""Decoder linears that a quantized checkpoint leaves in 16 bits: how engines are told, and what they make of it.

Engines run q, k and v as one matrix, and gate and up as one, so what is left is always a whole unit of the family.
Of an AWQ checkpoint they learn it from ``quantization_config.modules_to_not_convert``, and each reads that list in its
own way:

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

compressed-tensors has one rule for all, ``ignore``: an entry is a module's name, or behind "re:" an expression that
fits the name's start. vLLM 0.32 (``find_matching_patterns``) asks it of its own names, of a fused module's and then its
parts'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from toolkit.checkpoint.compressed import HEAD, matches
from toolkit.checkpoint.layouts import PACK
from toolkit.errors import FormatError
from toolkit.models.family import Family

__all__ = ["Linear", "describe", "ignored", "modules_to_not_convert", "tower_packs", "vllm_ignores", "vllm_leaves"]

#: A decoder linear: the layer's index and its name inside the layer.
Linear = tuple[int, str]


def tower_packs(inputs: int, outputs: int, group_size: int) -> bool:
    """Whether a linear of the vision tower [N, K] fits groups and words; what does not stays in 16 bits."""
    group = inputs if group_size == -1 else group_size
    return inputs % group == 0 and inputs % PACK == 0 and outputs % PACK == 0


def modules_to_not_convert(
    left: frozenset[Linear], layers: int, family: Family, tower: Iterable[str] | None = None
) -> list[str]:
    """Return the list for ``quantization_config`` that makes engines leave ``left`` and the vision tower in 16 bits.

    Exact for vLLM, SGLang and transformers; for AutoAWQ where every unit is left in all layers or in none. Layers
    are never abbreviated, see the module's docstring.

    Args:
        left: whole units.
        layers: number of decoder layers.
        family: of the model.
        tower: linears of the vision tower that are in 16 bits, by their names behind `Names.visual`; None: all are.
    """
    entries = ["visual", "model.visual"]
    if tower is not None:
        # never empty: without a list vLLM makes its own of all tensors that are not packed
        entries = [f"{prefix}{name}" for name in ("patch_embed", *tower) for prefix in ("visual.", "model.visual.")]
    for fused, parts in family.fused.items():
        where = sorted({layer for layer, name in left if name in parts})
        prefixes = [""] if len(where) == layers else [f"layers.{layer}." for layer in where]
        entries += [prefix + name for prefix in prefixes for name in dict.fromkeys((*parts, fused))]
    return entries


def ignored(
    left: frozenset[Linear], layers: int, family: Family, lm_head: bool = False, tower: Iterable[str] | None = None
) -> list[str]:
    """Return compressed-tensors' ``ignore`` for ``left``, the vision tower and, unless ``lm_head`` is packed, the head.

    Expressions that fit names in transformers and in vLLM; arguments as for `modules_to_not_convert`.
    """
    visual = re.escape(family.hub.visual)
    entries = [f"re:.*{visual}.*"]
    if tower is not None:
        entries = [f"re:.*{visual}{re.escape(name)}$" for name in tower]
    entries += [] if lm_head else [HEAD]
    for fused, parts in family.fused.items():
        where = sorted({layer for layer, name in left if name in parts})
        if where:
            numbers = r"\d+" if len(where) == layers else "|".join(map(str, where))
            names = "|".join(re.escape(name) for name in dict.fromkeys((*parts, fused)))
            entries.append(rf"re:.*layers\.({numbers})\.({names})$")
    return entries


def vllm_ignores(module: str, entries: Sequence[str], family: Family) -> bool:
    """Whether vLLM leaves ``module`` of a compressed-tensors checkpoint in 16 bits: `vllm_leaves` for ``ignore``."""
    renamed = [entry if entry.startswith("re:") or "." not in entry else family.in_vllm(entry) for entry in entries]
    return _leaves(module, lambda name: any(matches(entry, name) for entry in renamed), family, "ignore")


def vllm_leaves(module: str, patterns: Sequence[str], family: Family) -> bool:
    """Whether vLLM leaves ``module`` in 16 bits: the rule of its ``is_layer_skipped``, on renamed entries.

    Args:
        module: the name inside vLLM: "language_model.model.layers.3.self_attn.qkv_proj", "visual.merger.mlp.0", ...
        patterns: ``modules_to_not_convert`` as it is in config.json.
        family: of the model.

    Raises FormatError when the list has some parts of a fused module and not the others.
    """
    renamed = [family.in_vllm(pattern) for pattern in patterns]
    return _leaves(module, lambda name: any(pattern in name for pattern in renamed), family, "modules_to_not_convert")


def _leaves(module: str, listed: Callable[[str], bool], family: Family, where: str) -> bool:
    """Ask of a module's own name, and of a fused one's parts then."""
    several = ((fused, parts) for fused, parts in family.fused.items() if len(parts) > 1)
    parts = next((parts for fused, parts in several if module.endswith(f".{fused}")), None)
    if parts is None or listed(module):
        return listed(module)
    stem = ".".join(module.split(".")[:-2])
    verdicts = {part: listed(f"{stem}.{part}") for part in parts}
    if len(set(verdicts.values())) > 1:
        raise FormatError(
            f"{where} has {', '.join(p for p in parts if verdicts[p])} of {stem} and not "
            f"{', '.join(p for p in parts if not verdicts[p])}: vLLM runs them as one matrix and does not start"
        )
    return all(verdicts.values())


def describe(left: Iterable[Linear], layers: int, family: Family) -> str:
    """Say which linears these are: "layers 0, 3-5; mlp.down_proj of layer 7; self_attn.o_proj of every layer"."""
    left, linears = set(left), family.linears
    whole = [layer for layer in range(layers) if all((layer, name) in left for name in linears)]
    places: dict[tuple[int, ...], list[str]] = {}
    for name in linears:
        where = tuple(layer for layer in range(layers) if (layer, name) in left and layer not in whole)
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
