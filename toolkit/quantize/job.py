"""A run's pieces, handed from step to step: what is settled before the search, and what the search gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.quantize.plan import Plan
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.samples import Calibration
from toolkit.quantize.shares import Outcome
from toolkit.quantize.source import Source

__all__ = ["Job", "Made"]


@dataclass(frozen=True)
class Job:
    """All that is settled before the first layer.

    ``report``: file for the layers' report, if one is wanted. ``verdict``: whether to measure what it all costs.
    """

    source: Source
    recipe: Recipe
    devices: list[str]
    calibration: Calibration
    plan: Plan
    report: Path | None
    verdict: bool = False


@dataclass(frozen=True)
class Made:
    """What the layers' search gave.

    ``hash``: of the source's weights, an adapter merged. ``config``: the config.json that goes with them. ``balance``:
    of each layer, what a vision token counts, where that was measured. ``outcome``: what the shares said of layers that
    an earlier run had not finished. ``cost``: what was measured of the finished layers (`toolkit.quantize.verdict`).
    ``distillation``: what came of that (`toolkit.quantize.distillation.stage`); None where it was not asked for.
    """

    hash: str
    config: dict[str, Any]
    balance: Sequence[float] | None
    outcome: Outcome
    cost: dict[str, Any]
    distillation: dict[str, Any] | None = None
