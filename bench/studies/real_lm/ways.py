"""Ways of quantizing by name: ``best+g64+noclip`` is the best effort with groups of 64 and without clips.

``peer=DIR`` is an AWQ checkpoint that something else made.

What ``best`` is made of can be changed, a piece at a time, as no option of `qvl quantize` does: ``best+nodescent``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from toolkit.errors import FormatError

__all__ = ["NEAREST", "changed", "recipe_of"]

#: Rounds to nearest: no run, no samples.
NEAREST = "rtn"
_BASES: dict[str, dict[str, Any]] = {
    NEAREST: {},
    "autoawq": {"search": "autoawq"},
    "nearest": {"rounding": "nearest"},
    "fast": {},
    "best": {"effort": "best"},
}
_CHANGES: dict[str, dict[str, Any]] = {
    "noclip": {"clip": False},
    "noscale": {"scaling": "none"},
    "head": {"lm_head": True},
    "distill": {"distill": True},
    "nodistill": {"distill": False},
}
#: What is put in place of names in `toolkit.quantize.search.chained`.
_PIECES: dict[str, dict[str, Any]] = {
    "residual": {"RESIDUAL": True},
    "noasymmetry": {"asymmetric_target": lambda weight, moments, factor: weight},
    "nodescent": {"_ROUNDS": 0, "_SWEEPS": 0},
    "norefit": {"_ROUNDS": 0, "_SWEEPS": 6},
    "moredescent": {"_ROUNDS": 5, "_SWEEPS": 3},
}
_NUMBERS = {"g": "group_size", "n": "samples"}


def recipe_of(way: str) -> dict[str, Any]:
    """Return what `toolkit.quantize.Recipe` is to be given, but for samples' file and seed.

    Raises:
        FormatError: the name is of no way.
    """
    if "=" in way:
        return {}
    base, *changes = way.split("+")
    found = dict(_BASES.get(base, {}))
    if base == "best":
        changes = [change for change in changes if change not in _PIECES]
    for change in changes:
        number = re.fullmatch(r"([gn])(\d+)", change)
        found.update({_NUMBERS[number[1]]: int(number[2])} if number else _CHANGES.get(change, {}))
        if not number and change not in _CHANGES:
            base = ""
    if base not in _BASES:
        raise FormatError(
            f"unknown way {way!r}: {', '.join(_BASES)}, and behind a plus {', '.join(_CHANGES)}, gSIZE, nSAMPLES; "
            f"behind best {', '.join(_PIECES)} too"
        )
    return found


@contextlib.contextmanager
def changed(way: str) -> Iterator[None]:
    """Change, in the block, what the best effort is made of as the way's name says."""
    with contextlib.ExitStack() as stack:
        for change in way.split("+")[1:]:
            for name, value in _PIECES.get(change, {}).items():
                stack.enter_context(mock.patch(f"toolkit.quantize.search.chained.{name}", value))
        yield
