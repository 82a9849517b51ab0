"""Service level objectives as they are written on a command line; `bench.load.metrics.goodput` holds requests against
them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolkit.errors import BenchError

__all__ = ["METRICS", "Slo", "parse_slos"]

#: What an objective can be set for.
METRICS = ("ttft", "tpot", "itl", "e2e")
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective: ``metric`` of a request is at most ``limit_s`` seconds."""

    metric: str
    limit_s: float

    def __str__(self) -> str:
        limit = f"{self.limit_s:g}s" if self.limit_s >= 1 else f"{1000 * self.limit_s:g}ms"
        return f"{self.metric}={limit}"


def parse_slos(text: str) -> tuple[Slo, ...]:
    """Read ``ttft=200ms,tpot=30ms``.

    Raises:
        BenchError: an unknown metric, one named twice, or a limit without its unit.
    """
    slos: dict[str, Slo] = {}
    for part in text.split(","):
        metric, _, limit = (piece.strip().lower() for piece in part.partition("="))
        if metric not in METRICS:
            known = ", ".join(METRICS)
            raise BenchError(
                f"objective {part.strip()!r}: {metric!r} is none of {known}; write e.g. ttft=200ms,tpot=30ms"
            )
        if metric in slos:
            raise BenchError(f"objective {part.strip()!r}: {metric} has one already ({slos[metric]})")
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", limit)
        if not found or float(found[1]) <= 0:
            raise BenchError(
                f"objective {part.strip()!r}: {limit!r} is not a time above 0 with its unit; write e.g. {metric}=200ms"
            )
        slos[metric] = Slo(metric, float(found[1]) * UNITS[found[2]])
    return tuple(slos.values())
