"""The model families that are supported, and which one a config is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.models.family import Family
from toolkit.models.qwen2_vl import QWEN2_VL

__all__ = ["FAMILIES", "family_of"]

FAMILIES = (QWEN2_VL,)


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


def architectures_of(config: Mapping[str, Any]) -> list[Any]:
    """Return config.json's ``architectures`` as a list."""
    found = config.get("architectures") or []
    return found if isinstance(found, list) else [found]
