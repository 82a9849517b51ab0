"""``python -m bench.chaos NAME``: one command a way to break a server."""

from __future__ import annotations

from typing import Annotated

import typer

from bench.chaos.settings import FaultsSettings, SoakSettings
from toolkit.console import command_group
from toolkit.options import settings_as_options

__all__ = ["app"]

app = command_group("python -m bench.chaos", "What happens to a server when something breaks, or nobody behaves.")


@app.command()
@settings_as_options
def faults(settings: FaultsSettings) -> None:
    """Show what clients see when something under a server breaks, and how long until it answers again."""
    from bench.chaos.faults import run

    run(settings)


@app.command("gpu-memory")
def gpu_memory(device: Annotated[str, typer.Argument(help="cuda, cuda:1, ...; cpu to try it out.")]) -> None:
    """Take what memory of a device is left or becomes free, until the standard input ends."""
    from bench.chaos.gpu_memory import run

    run(device)


@app.command()
@settings_as_options
def soak(settings: SoakSettings) -> None:
    """Send good, bad and hostile requests for a long time; exits 1 when something was wrong."""
    from bench.chaos.soak import run

    raise typer.Exit(run(settings))
