"""The verbs that read or write weights: quantize, convert, inspect, demo-data, demo-model."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
