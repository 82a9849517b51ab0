"""AWQ checkpoints, GEMM and GEMV, of any Qwen2-VL. ``quantize`` is the one entry.

recipe: what is asked. run: the whole, from a source to a finished directory. plan: what it will need, held against the
machine. worker: one device's share of the layers; events: what shares say. journal: finished layers on the disk, for a
run that goes on. report, model_card, progress: what is said about it. stream/: samples through a model that is never
in memory whole. search/: scales, clips and rounding of one layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, get_args, get_origin

from toolkit.quantize.recipe import Recipe, RunOptions

__all__ = ["Recipe", "RunOptions", "quantize"]

P = ParamSpec("P")


class _Keywords(Recipe, RunOptions):
    """All that `quantize` takes by keyword."""

    recipe: Recipe | None = None


def _takes(
    keywords: Callable[P, object],
) -> Callable[[Callable[..., Path]], Callable[Concatenate[str, Path | str, P], Path]]:
    """Give a function the keywords of a settings model, for type checkers and for `help`."""

    def taking(function: Callable[..., Path]) -> Callable[Concatenate[str, Path | str, P], Path]:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = [p.replace(annotation=_bare(p.annotation)) for p in inspect.signature(keywords).parameters.values()]
        function.__signature__ = own.replace(parameters=[*named, *fields])  # type: ignore[attr-defined]
        return function

    return taking


def _bare(annotation: Any) -> Any:
    """Return a field's type without what the command line knows of it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


@_takes(_Keywords)
def quantize(model: str, out: Path | str, **keywords: Any) -> Path:
    """Quantize a Qwen2-VL to AWQ.

    A run that is stopped, even by ``kill -9``, keeps its finished layers; the same call goes on from there.

        quantize("demo", "demo-awq", recipe=Recipe(samples=32), force=True)
        quantize("demo", "demo-awq", samples=32, force=True)

    Args:
        model: directory, hub id or ``demo``.
        out: directory to write; appears when it is complete.
        keywords: ``recipe``, or in its place the settings of a `Recipe`; and those of `RunOptions`.

    Returns:
        ``out``.

    Raises:
        QvlError: its children say what was wrong with the source, the settings, the samples or the machine.
    """
    from toolkit.quantize.run import run

    recipe = keywords.pop("recipe", None)
    options = RunOptions(**{name: keywords.pop(name) for name in RunOptions.model_fields if name in keywords})
    if recipe is None:
        recipe = Recipe(**keywords)
    elif keywords:
        raise TypeError(f"a recipe was given, and {', '.join(keywords)} beside it: say it in the recipe")
    return run(model, Path(out), recipe, options)
