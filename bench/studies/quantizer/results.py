"""results.json: what was measured, part by part; parts measured at different times come together here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import BenchError
from toolkit.files import write_whole

__all__ = ["later_layers", "line", "merge", "read"]

SCHEMA = 1
_NAME = "results.json"


def read(out: Path) -> dict[str, Any]:
    """Return the parts measured so far, by name; none if there is no results.json.

    Raises:
        BenchError: it is not JSON or of another schema.
    """
    path = out / _NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchError(f"{path} is not JSON ({error}): move it away and measure again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BenchError(f"{path} is not of schema {SCHEMA}: move it away and measure again")
    parts: dict[str, Any] = found["parts"]
    return parts


def merge(out: Path, part: str, found: dict[str, Any]) -> dict[str, Any]:
    """Put one part's results in the place of its older ones, leave the others, and return them all."""
    parts = {**read(out), part: found}
    write_whole(out / _NAME, json.dumps({"schema": SCHEMA, "parts": parts}, indent=1) + "\n")
    return parts


def later_layers(run: dict[str, Any], step: str = "total") -> float:
    """Return the median over all layers but the first, which warms up, of a step's seconds; of one layer, its own."""
    layers = run["layers"][1:] or run["layers"]
    return float(statistics.median(layer["seconds"].get(step, 0.0) for layer in layers))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Fit y = a + b x, least squares of the relative deviations; return a, b and the largest relative deviation."""
    import numpy as np

    x, y = np.asarray(points, dtype=np.float64).T
    (b, a) = np.polyfit(x, y, 1, w=1.0 / y)
    return float(a), float(b), float(np.abs((a + b * x) / y - 1.0).max())
