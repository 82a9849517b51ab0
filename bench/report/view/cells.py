"""Figures with their intervals, as text."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import words
from bench.report.schema import Difference, Share

__all__ = ["NOTHING", "Cell", "difference", "share"]

#: Where there is no figure.
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and its 95% interval, which is empty where there is none to show."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


def share(part: Share) -> Cell:
    """A share in percent."""
    return Cell(words.percent(part.value), words.interval(part))


def difference(part: Difference) -> Cell:
    """A difference in points."""
    return Cell(words.points(part.value), words.interval(part))
