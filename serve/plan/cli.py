"""`qvl plan`: which model and format a card holds, with which context, images and concurrency. Needs no GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.plan.load import Load
from toolkit.options import settings_as_options

if TYPE_CHECKING:
    from rich.table import Table

    from serve.plan.capacity import Capacity

__all__ = ["register"]

_GIB = 1 << 30
#: Calibration that quantizing is planned for: chats, and tokens of each.
_CHATS, _TOKENS = 128, 500


def register(app: typer.Typer) -> None:
    """Add this module's verb to ``app``."""
    app.command(rich_help_panel="Server")(plan)


@settings_as_options
def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Sizes (2b, qwen2.5-vl-7b, ...) or directories; if not given, 2b, 7b and 72b."
        ),
    ] = None,
    gpu_memory: Annotated[
        str, typer.Option(metavar="GIB", help="Memory of the card in GiB, or several: 16,24.")
    ] = "16,24,48,80",
    *,
    load: Load,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (sizes in bytes).")] = False,
) -> None:
    """Show what fits a card: model, format, context, concurrency, to serve and to quantize.

    An estimate from shapes: docs/tuning.md says which parts of it are measured.
    """
    import json

    from toolkit.console import out

    rows = [
        row
        for card in _cards(gpu_memory)
        for model in models or ["2b", "7b", "72b"]
        for row in _rows(model, card, load)
    ]
    if as_json:
        typer.echo(json.dumps([{**found.as_dict(), "quantize": work} for found, work in rows], indent=1))
    else:
        out.print(_table(rows))


def _cards(text: str) -> list[int]:
    """Read sizes in GiB. Raises ResourceError for what is none."""
    from toolkit.errors import ResourceError

    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(math.isfinite(size) and size >= 1 for size in sizes):
        raise ResourceError(f"--gpu-memory {text}: give GiB, such as 16 or 16,24,80.")
    return [int(size * _GIB) for size in sizes]


def _rows(model: str, card: int, load: Load) -> list[tuple[Capacity, dict[str, Any] | None]]:
    """Return the formats of a model on a card, each with what making it takes; None where it is made already."""
    from serve.plan.capacity import capacity, shape
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.errors import CheckpointError, FormatError
    from toolkit.models.families import LISTED, SIZES
    from toolkit.sources.directory import resolve

    if model in SIZES and not Path(model).exists():
        plain, packed = shape(model, False), shape(model, True)
        return [
            (capacity(plain, card, load, model), None),
            (capacity(packed, card, load, model), _quantizing(plain, card)),
        ]
    try:
        checkpoint = Checkpoint.open(resolve(model))
    except CheckpointError as error:
        if "/" in model or Path(model).exists():
            raise
        raise FormatError(f"{model} is neither one of {LISTED} nor a directory.") from error
    work = None if checkpoint.quantization else _quantizing(checkpoint, card)
    return [(capacity(checkpoint, card, load, model), work)]


def _quantizing(checkpoint: Any, card: int) -> dict[str, Any]:
    from toolkit.quantize.plan import device_bytes
    from toolkit.quantize.recipe import Recipe

    device, host = device_bytes(checkpoint, Recipe(), _CHATS * _TOKENS, _TOKENS)
    return {"gpu_bytes": device, "host_bytes": host, "fits": device <= card}


def _table(rows: list[tuple[Capacity, dict[str, Any] | None]]) -> Table:
    from toolkit.tables import table

    columns = ("card", "model", "format", "weights", "beside", "tokens", "context", "at once", "image", "to make")
    figures = [at for at, name in enumerate(columns) if name not in ("model", "format", "to make")]
    shown = table(columns, figures, ruled=True)
    shown.padding = (0, 0)  # 80 columns are enough
    last = None
    for found, work in rows:
        if last not in (None, found.card):
            shown.add_section()
        last = found.card
        made = ""
        if work is not None:
            need = f"{work['gpu_bytes'] / 1e9:.0f} + {work['host_bytes'] / 1e9:.0f}"
            made = need if work["fits"] else f"[red]{need}[/red]"
        beside = found.need.activations + found.need.overhead
        cells = [f"{found.card / _GIB:g}", found.model, found.format]
        cells += [f"{found.need.weights / _GIB:.1f}", f"{beside / _GIB:.1f}"]
        if found.fits:
            side = math.isqrt(found.image_pixels)
            fits = [f"{found.kv_tokens:,}", f"{found.context:,}", f"{found.concurrency:,}", f"{side}²"]
        else:
            fits = ["[red]no[/red]", "", "", ""]
        shown.add_row(*cells, *fits, made)
    shown.caption = (
        "card, weights, what is beside them: GiB. tokens: of the KV cache; at once: sequences of the whole context. "
        "image: side in pixels that is read unscaled. to make: GB of GPU + host memory to quantize. "
        "An estimate: docs/tuning.md says how near"
    )
    shown.caption_justify = "left"
    return shown
