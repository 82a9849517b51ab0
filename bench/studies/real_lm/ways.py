"""Ways of quantizing by name: ``best+g64+noclip`` is the best effort with groups of 64 and without clips."""

from __future__ import annotations

import re
from typing import Any

from toolkit.errors import FormatError

__all__ = ["NEAREST", "recipe_of"]

#: Rounds to nearest: no run, no samples.
NEAREST = "rtn"
_BASES: dict[str, dict[str, Any]] = {
    NEAREST: {},
    "autoawq": {"search": "autoawq"},
    "nearest": {"rounding": "nearest"},
    "fast": {},
    "best": {"effort": "best"},
}
_CHANGES = {"noclip": {"clip": False}}
_NUMBERS = {"g": "group_size", "n": "samples"}


def recipe_of(way: str) -> dict[str, Any]:
    """Return what `toolkit.quantize.Recipe` is to be given, but for samples' file and seed.

    Raises:
        FormatError: the name is of no way.
    """
    base, *changes = way.split("+")
    found = dict(_BASES.get(base, {}))
    for change in changes:
        number = re.fullmatch(r"([gn])(\d+)", change)
        found |= {_NUMBERS[number[1]]: int(number[2])} if number else _CHANGES.get(change, {})
        if not number and change not in _CHANGES:
            base = ""
    if base not in _BASES:
        raise FormatError(
            f"unknown way {way!r}: {', '.join(_BASES)}, and behind a plus {', '.join(_CHANGES)}, gSIZE, nSAMPLES"
        )
    return found
