"""What a run measures, as plain types: the load a server is under, each stretch of it, the answers, what was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from bench.load.client import Failure, Trace
from bench.load.loops import Block
from bench.machine.server_metrics import ServerPoint
from bench.questions.observe import Observed
from bench.roles import Role

__all__ = ["PART", "SWEEP", "Keep", "Load", "LoadKind", "Measurements", "Observer", "Stretch"]

LoadKind = Literal["closed", "open", "single", "saturation", "rate"]
#: Who read the baseline's answers; the baseline does so a second time.
Observer = Literal["baseline", "again", "candidate"]
#: The unit of a round that is a sweep.
SWEEP = "sweep"
#: Of every part of a report: unknown keys are refused, so that a typo can't pass as a missing value.
PART = ConfigDict(extra="forbid", frozen=True)


class Load(BaseModel):
    """What a server is under while a point is measured.

    Attributes:
        kind: ``closed``: so many requests are kept in flight. ``open``: so many are due each second, however many are
            in flight. Of a sweep: ``single`` (one at a time), ``saturation`` (as many in flight as fill the server) and
            ``rate`` (an open loop at a share of what this server saturated at).
        name: what it is called in tables, messages and `SpeedRatio`; unique in a report.
        concurrency: of a closed loop.
        rate_per_s: of ``open``, requests due each second.
        arrivals: of ``open`` and ``rate``.
        share: of ``rate``, of the requests a second at saturation.
    """

    model_config = PART

    kind: LoadKind
    name: str
    concurrency: int | None = None
    rate_per_s: float | None = None
    arrivals: Literal["poisson", "constant"] | None = None
    share: float | None = None

    @classmethod
    def in_flight(cls, concurrency: int) -> Load:
        """Return a closed loop."""
        return cls(kind="closed", name=f"{concurrency} in flight", concurrency=concurrency)

    @classmethod
    def at_rate(cls, rate_per_s: float, arrivals: Literal["poisson", "constant"]) -> Load:
        """Return an open loop."""
        return cls(kind="open", name=f"{rate_per_s:g} requests/s", rate_per_s=rate_per_s, arrivals=arrivals)


@dataclass(frozen=True, slots=True)
class Stretch:
    """One system under one load in one round.

    Attributes:
        offered_per_s: requests due each second, in an open loop.
        server: what the server counted meanwhile.
        joules: what its GPUs took meanwhile.
    """

    block: Block
    offered_per_s: float | None = None
    server: ServerPoint | None = None
    joules: float | None = None


@dataclass(slots=True)
class Measurements:
    """Raw results. `measure` adds to them what they lack.

    Attributes:
        units: what was measured of a system in a round: the name of a `Plan.units`, to its loads and stretches.
        answers: to the questions, by their ids; those that came.
        observed: of fidelity.
        failures: (system, phase, failure) -> how often: what ended the run. Failed requests that are a result of their
            point stand in its block instead.
        kv_cache_tokens: room in each server's KV cache, where it tells.
    """

    units: dict[tuple[Role, str, int], list[tuple[Load, Stretch]]] = field(default_factory=dict)
    answers: dict[Role, dict[str, Trace]] = field(default_factory=dict)
    observed: dict[Observer, Observed] = field(default_factory=dict)
    failures: Counter[tuple[Role, str, Failure]] = field(default_factory=Counter)
    kv_cache_tokens: dict[Role, int] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.units or self.observed or any(self.answers.values()))

    def stretches(self) -> dict[tuple[Role, Load], dict[int, Stretch]]:
        """Return every round of each system under each load."""
        found: dict[tuple[Role, Load], dict[int, Stretch]] = {}
        for (role, _, round_), stretches in self.units.items():
            for load, stretch in stretches:
                found.setdefault((role, load), {})[round_] = stretch
        return found

    def fail(self, role: Role, phase: str, traces: Sequence[Trace]) -> None:
        """Record the failures among ``traces``: they end the run."""
        for trace in traces:
            if trace.failure:
                self.failures[role, phase, trace.failure] += 1


class Keep(Protocol):
    """Where what was measured is kept as it comes, so that an interrupted run can go on."""

    def answer(self, role: Role, question: str, trace: Trace) -> None:
        """Keep an answer to a question."""

    def unit(self, role: Role, unit: str, round_: int, stretches: Sequence[tuple[Load, Stretch]]) -> None:
        """Keep a unit of a round."""

    def observed(self, who: Observer, observed: Observed) -> None:
        """Keep a pass of fidelity."""
