"""``python -m bench.studies quantizer``: runs the parts one after the other, keeps what each found, writes the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from bench.studies.quantizer.settings import PARTS, Settings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command to ``app``."""
    app.command("quantizer")(quantizer)


def quantizer(
    out: Annotated[Path, typer.Option(help="Directory of results.json and README.md; models go to OUT/work.")] = Path(
        "out/quantizer"
    ),
    parts: Annotated[str, typer.Option(help=f"Parts to measure now, of {', '.join(PARTS)}; others are kept.")] = (
        "speed,full,wide,cost,quality"
    ),
    stock_python: Annotated[
        str | None,
        typer.Option(
            help="Command of a Python that has AutoAWQ 0.2.9 and transformers 4.51.3; stock's side runs on it."
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Directory with a Qwen2 tokenizer.json.")] = None,
    layers: Annotated[int, typer.Option(help="Decoder layers of the models that layers are timed on.")] = 3,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The embedded model and little data: shows that it runs, measures nothing.")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="Only write README.md and plots from results.json.")] = False,
) -> None:
    """Measure the quantizer beside stock AutoAWQ: time, memory, quality."""
    from bench.studies.quantizer import results
    from bench.studies.quantizer.page import render as write_page
    from toolkit.console import err, fail
    from toolkit.console import out as stdout
    from toolkit.errors import BenchError

    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise BenchError(f"unknown part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    found = results.read(out)
    failed = []
    if not render:
        settings = Settings(str(out), stock_python, str(tokenizer) if tokenizer else None, layers, tiny)
        file = settings.save()
        began = time.monotonic()
        for part in chosen:
            err.print(f"\n[bold]{part}[/bold] [dim]({time.monotonic() - began:.0f} s)[/dim]")
            if subprocess.call([sys.executable, "-m", "bench.studies.quantizer.work", part, str(file)]):
                fail(f"{part} was not measured")
                failed.append(part)
                continue
            measured = settings.work / f"{part}.json"
            found = results.merge(out, part, json.loads(measured.read_text(encoding="utf-8")))
            write_page(found, out)
    if not found:
        raise BenchError(f"there are no results in {out}: measure some part first")
    stdout.print(str(write_page(found, out)), highlight=False)
    if failed:
        raise typer.Exit(1)
