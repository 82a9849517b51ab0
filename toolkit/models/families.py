"""The model families that are supported, and which one a config, or a directory's weights, are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from toolkit.errors import FormatError
from toolkit.models.family import Family, Size
from toolkit.models.qwen2_5_vl import QWEN2_5_VL
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.models.qwen3_vl import QWEN3_VL

__all__ = [
    "FAMILIES",
    "LISTED",
    "SIZES",
    "TITLES",
    "architectures_of",
    "family_of",
    "family_of_weights",
    "size_named",
    "why_not",
]

FAMILIES = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)
#: "Qwen2-VL, Qwen2.5-VL or ..."
TITLES = " or ".join(filter(None, (", ".join(family.title for family in FAMILIES[:-1]), FAMILIES[-1].title)))
#: Every published size, as commands name it: "qwen2.5-vl-3b"; those of Qwen2-VL without the family as well.
SIZES = MappingProxyType(
    {name: (QWEN2_VL, size) for name, size in QWEN2_VL.sizes.items()}
    | {f"{family.title.lower()}-{name}": (family, size) for family in FAMILIES for name, size in family.sizes.items()}
)
#: Their names, each size once.
LISTED = ", ".join(name for name in SIZES if not name.startswith("qwen2-vl-"))
#: Kinds of model that are near to those that are supported, and what they would take.
_NEAR = {
    "qwen3_vl_moe": "each expert would need scales of its own, from the tokens that its router sends there, and the "
    "router would stay in 16 bits",
    "qwen2_5_omni": "it hears and speaks: its thinker alone is a Qwen2.5-VL, under other names",
    "qwen2": "it has no vision tower",
    "qwen3": "it has no vision tower",
}
_LAYER = re.compile(r"^(?:.*\.)?layers\.0\.(.+)$")
_BLOCK = re.compile(r"^(?:.*\.)?visual\.blocks\.0\.(.+)$")


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config.json is of; None: no supported one.

    ``model_type`` and ``architectures`` must both be the family's, where they are given; one of them must be.
    """
    model_type, architectures = config.get("model_type"), architectures_of(config)
    for family in FAMILIES:
        right_type = model_type == family.model_type or (model_type is None and family.architecture in architectures)
        if right_type and (not architectures or family.architecture in architectures):
            return family
    return None


def why_not(config: Mapping[str, Any]) -> str:
    """Say what a config.json without a family is of, and what would be needed: "is ..." and a period."""
    model_type, architectures = config.get("model_type"), architectures_of(config)
    what = ", ".join(str(name) for name in architectures) or "no architecture"
    said = f"is not a {TITLES}: its config.json says {what} (model_type {model_type})"
    other = next((family for family in FAMILIES if family.architecture in architectures), None)
    named = next((family for family in FAMILIES if family.model_type == model_type), None)
    if other is not None and named is not None:
        return f"{said}, a {other.title} and a {named.title} at once: copy the config.json that belongs to the weights."
    near = _NEAR.get(str(model_type))
    if near is not None:
        return f"{said}, which is not supported: {near}."
    known = ", ".join(f"{family.architecture} (model_type {family.model_type})" for family in FAMILIES)
    return f"{said}. What is supported: {known}."


def architectures_of(config: Mapping[str, Any]) -> list[Any]:
    """Return config.json's ``architectures`` as a list."""
    found = config.get("architectures") or []
    return found if isinstance(found, list) else [found]


def family_of_weights(names: Iterable[str]) -> Family | None:
    """Return the only family whose first decoder layer and first vision block have just these modules; None: none.

    Args:
        names: of a checkpoint's tensors, in 16 bits or packed.
    """
    listed = list(names)
    layer, block = (
        {match[1].rpartition(".")[0] for name in listed if (match := pattern.match(name))}
        for pattern in (_LAYER, _BLOCK)
    )
    layer -= {"self_attn.rotary_emb"}
    found = [
        family
        for family in FAMILIES
        if {*family.linears, *family.norms} == layer and {*family.tower.linears, *family.tower.norms} == block
    ]
    return found[0] if len(found) == 1 else None


def size_named(name: str) -> tuple[Family, Size]:
    """Return a published size by its name in `SIZES`. Raises FormatError for another name."""
    if name not in SIZES:
        raise FormatError(f"unknown shape {name!r}: choose {LISTED}, or give a directory.")
    return SIZES[name]
