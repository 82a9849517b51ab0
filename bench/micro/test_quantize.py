"""The search for all layers of the embedded model on this machine: ours and AutoAWQ's, 48 chats, from disk to disk.

`qvl-run.json` has the steps; the time told here is a whole `quantize`, imports left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.quantize import quantize

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize(
    "settings",
    [{}, {"rounding": "nearest"}, {"search": "autoawq"}],
    ids=["moments, compensated", "moments, nearest", "AutoAWQ's search"],
)
def test_embedded_model(benchmark: BenchmarkFixture, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Quantize the embedded model; seconds of the layers alone are in the extra info."""
    quantize("demo", tmp_path / "warm-up", samples=2, **settings)
    benchmark.pedantic(quantize, args=("demo", tmp_path / "out"), kwargs={"samples": 48, **settings}, rounds=1)  # type: ignore[no-untyped-call]
    layers = json.loads((tmp_path / "out" / "qvl-run.json").read_text())["layers"]
    benchmark.extra_info["seconds of the layers"] = round(sum(layer["seconds"]["total"] for layer in layers), 2)
