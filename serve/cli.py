"""The verbs of serve. Heavy imports live inside the functions."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
