"""What a run measures, as plain types: the load a server is under, each stretch of it, the answers, what was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from bench.load.client import Failure, Trace
from bench.load.loops import Block
from bench.machine.server_metrics import ServerPoint
from bench.questions.observe import Observed
from bench.roles import Role
from bench.run.loads import Load

__all__ = ["Keep", "Measurements", "Observer", "Stretch"]

#: Who read the baseline's answers; the baseline does so a second time.
Observer = Literal["baseline", "again", "candidate"]


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
        units: what was measured of a system in a round: the name of a `BenchConfig.units`, to its loads and stretches.
        answers: to the questions, by their ids; those that came.
        observed: of fidelity.
        failures: (system, phase, failure) -> how often: what ended the run. Failed requests that are a result of their
            point stand in its block instead.
        notes: what a reader should know of how it was measured.
        kv_cache_tokens: room in each server's KV cache, where it tells.
    """

    units: dict[tuple[Role, str, int], list[tuple[Load, Stretch]]] = field(default_factory=dict)
    answers: dict[Role, dict[str, Trace]] = field(default_factory=dict)
    observed: dict[Observer, Observed] = field(default_factory=dict)
    failures: Counter[tuple[Role, str, Failure]] = field(default_factory=Counter)
    kv_cache_tokens: dict[Role, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
