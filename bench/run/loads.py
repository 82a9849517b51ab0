"""What a server is under while it is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from bench.load.workload import Arrivals

__all__ = ["PART", "SWEEP", "WAVES", "Load", "LoadKind"]

LoadKind = Literal["closed", "open", "replay", "single", "saturation", "rate"]
#: Requests of a round for each that is in flight, at least: with fewer, the point is a burst.
WAVES = 3
#: The unit of a round that is a sweep.
SWEEP = "sweep"
#: Of every part of a report: unknown keys are refused, so that a typo can't pass as a missing value.
PART = ConfigDict(extra="forbid", frozen=True)


class Load(BaseModel):
    """What a server is under while a point is measured.

    Attributes:
        kind: ``closed``: so many requests are kept in flight. ``open``: so many are due each second, however many are
            in flight. ``replay``: each is due when it came in a recorded trace. Of a sweep: ``single`` (one at a time),
            ``saturation`` (as many in flight as fill the server) and ``rate`` (an open loop at a share of what this
            server saturated at).
        name: what it is called in tables, messages and `SpeedRatio`; unique in a report.
        concurrency: of a closed loop.
        rate_per_s: of ``open``, requests due each second.
        arrivals: of ``open`` and ``rate``.
        share: of ``rate``, of the requests a second at saturation.
        speed: of ``replay``, so many times as fast as in the trace.
    """

    model_config = PART

    kind: LoadKind
    name: str
    concurrency: int | None = None
    rate_per_s: float | None = None
    arrivals: Arrivals | None = None
    share: float | None = None
    speed: float | None = None

    @property
    def has_rate(self) -> bool:
        """Whether requests are due at moments that were set before, and not when others have ended; rates of a sweep
        aside, which are another for each server."""
        return self.kind in ("open", "replay")

    @classmethod
    def in_flight(cls, concurrency: int) -> Load:
        """Return a closed loop."""
        return cls(kind="closed", name=f"{concurrency} in flight", concurrency=concurrency)

    @classmethod
    def at_rate(cls, rate_per_s: float, arrivals: Arrivals) -> Load:
        """Return an open loop."""
        return cls(kind="open", name=f"{rate_per_s:g} requests/s", rate_per_s=rate_per_s, arrivals=arrivals)

    @classmethod
    def replayed(cls, speed: float) -> Load:
        """Return the replay of a trace."""
        return cls(kind="replay", name=f"replay {speed:g}x", speed=speed)
