"""What the phases of a measurement share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from bench.load.client import Trace
from bench.load.traffic import Traffic
from bench.questions.observe import Observed
from bench.roles import Role
from bench.run.config import BenchConfig
from bench.run.loads import Load
from bench.run.measured import Keep, Measurements, Observer, Stretch
from bench.run.progress import Live
from bench.run.systems import System

__all__ = ["Nowhere", "Running"]


class Nowhere:
    """Keeps nothing."""

    def answer(self, role: Role, question: str, trace: Trace) -> None:
        """Do nothing."""

    def unit(self, role: Role, unit: str, round_: int, stretches: Sequence[tuple[Load, Stretch]]) -> None:
        """Do nothing."""

    def observed(self, who: Observer, observed: Observed) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Running:
    """A measurement that goes on.

    Attributes:
        clients: of each system.
        found: what was measured so far; the phases add to it.
        keep: told of everything that is added.
        traffic: the user's own requests; None: they are made.
    """

    systems: Sequence[System]
    config: BenchConfig
    clients: dict[Role, httpx.AsyncClient]
    found: Measurements
    keep: Keep
    live: Live
    traffic: Traffic | None = None

    def turns(self, step: int) -> Sequence[System]:
        """Return the systems in the order in which they take turns at a step."""
        return self.systems if step % 2 == 0 else self.systems[::-1]
