"""Everything that reads or writes weights.

    from toolkit import Recipe, convert, inspect, merge, quantize

Rooms, from high to low: demo (the embedded model), quantize (from a source to a finished checkpoint), formats (layouts
of packed weights), calibration (what the model is shown), sources (where weights come from), checkpoint (a directory,
read and written), models (what a model family is), tasks (questions that are drawn). api holds what is public, verbs
the command line's share. Importing this imports nothing of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.api import convert, inspect, merge
    from toolkit.checkpoint.inspection import Inspection
    from toolkit.errors import QvlError
    from toolkit.quantize import quantize
    from toolkit.quantize.recipe import Recipe
    from toolkit.version import __version__

__all__ = ["Inspection", "QvlError", "Recipe", "__version__", "convert", "inspect", "merge", "quantize"]

#: Where the public names are defined.
_HOMES = {
    "Inspection": "toolkit.checkpoint.inspection",
    "QvlError": "toolkit.errors",
    "Recipe": "toolkit.quantize.recipe",
    "__version__": "toolkit.version",
    "convert": "toolkit.api",
    "inspect": "toolkit.api",
    "merge": "toolkit.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name == "quantize":
        return import_module("toolkit.quantize")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Quantize(ModuleType):
    """The package toolkit.quantize, which is called as its function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.quantize(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self.quantize)


class _Toolkit(ModuleType):
    """Python makes an imported subpackage an attribute of its parent: so ``toolkit.quantize`` is a package, however
    it came to be imported, and must be callable for `from toolkit import quantize` to give what it says."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "quantize" and type(value) is ModuleType:
            value.__class__ = _Quantize
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Toolkit
