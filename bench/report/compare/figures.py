"""The figures of a system in a report that can be compared, by name and load."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report.schema import Estimate, Report, Share, SpeedPoint
from bench.roles import Role

__all__ = [
    "COUNTED",
    "DRIFT",
    "ENERGY",
    "KNOWN",
    "LATENCIES",
    "RATES",
    "SPEED",
    "THROUGHPUT",
    "Figure",
    "Metric",
    "Side",
    "figures",
    "is_accuracy",
    "is_share",
]

TIMES = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = ("p50", "p90", "p95", "p99")
LATENCIES = tuple(f"{name}_{p}" for name in TIMES for p in PERCENTILES)
THROUGHPUT = (
    "steady_output_tokens_per_s",
    "steady_requests_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "requests_per_s",
)
RATES = (*THROUGHPUT, "goodput_per_s")
ENERGY = "joules_per_token"
SPEED = (*LATENCIES, *RATES, ENERGY)
#: Counted, not sampled: exact.
COUNTED = ("size_on_disk", "memory", "gpu_memory", "weights_memory", "kv_cache")
#: Of the candidate from its report's baseline.
DRIFT = ("mean_kl", "trimmed_kl", "geometric_kl", "p99_kl", "perplexity_ratio", "top1_agreement", "identical")
KNOWN = ("accuracy", "accuracy.TASK", *SPEED, *COUNTED, *DRIFT)


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a system: its name and, for speed, the load's name and the shape of the requests, empty for all."""

    name: str
    at: str | None = None
    shape: str = ""

    def __str__(self) -> str:
        of = f" ({self.shape})" if self.shape else ""
        return self.name if self.at is None else f"{self.name}@{self.at.removesuffix(' in flight')}{of}"

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a share of right answers."""
        return is_accuracy(self.name)

    @property
    def is_share(self) -> bool:
        """Whether it is a fraction of 1, whose changes are told in percentage points."""
        return is_share(self.name)

    @property
    def more_is_better(self) -> bool:
        """Whether a system with more of it is the better one."""
        return self.is_share or self.name in (*RATES, "kv_cache")


def is_accuracy(name: str) -> bool:
    """Whether a metric of that name is a share of right answers."""
    return name == "accuracy" or name.startswith("accuracy.")


def is_share(name: str) -> bool:
    """Whether a metric of that name is a fraction of 1."""
    return is_accuracy(name) or name in ("top1_agreement", "identical")


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95% interval; None where the report holds none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One of those that are compared: a system in a report.

    Attributes:
        name: what to call it; the system's label when empty.
    """

    report: Report
    role: Role
    name: str = ""

    @property
    def label(self) -> str:
        """The system's name."""
        return self.name or self.report.systems[self.role].label


def figures(side: Side) -> dict[Metric, Figure]:
    """Return every figure of a system that was measured: shares as fractions, latencies in ms, sizes in bytes, KL in
    nats. Points that are invalid have none, and neither has a sweep's rate, which is each server's own."""
    report, role = side.report, side.role
    found: dict[Metric, Figure] = {}
    if report.accuracy:
        for row in [*report.accuracy.tasks, report.accuracy.overall]:
            name = "accuracy" if row is report.accuracy.overall else f"accuracy.{row.task}"
            found[Metric(name)] = _estimated(getattr(row, role))
    if report.fidelity and role == "candidate":
        for name in DRIFT:
            if (share := getattr(report.fidelity.candidate, name)) is not None:
                found[Metric(name)] = _estimated(share)
    for point in report.speed:
        if point.role == role and point.invalid is None and point.load.kind != "rate":
            found |= {Metric(name, point.load.name): figure for name, figure in _speed(point).items()}
            for shape, estimates in point.by_shape.items():
                found |= {
                    Metric(f"{name}_p50", point.load.name, shape): _estimated(each) for name, each in estimates.items()
                }
    system = report.systems[role]
    memory = system.memory
    sizes = (system.disk_bytes, memory.host_bytes, memory.gpu_bytes, memory.weights_bytes, memory.kv_cache_tokens)
    for name, size in zip(COUNTED, sizes, strict=True):
        if size is not None:
            found[Metric(name)] = Figure(float(size), float(size), float(size))
    return found


def _speed(point: SpeedPoint) -> dict[str, Figure]:
    """Figures of a point: over its rounds where they are known by round, else over all requests. Throughput under a
    rate that is kept is that rate."""
    found: dict[str, Figure] = {}
    for name in TIMES:
        distribution = getattr(point, f"{name}_ms")
        for p in PERCENTILES if distribution is not None else ():
            if (value := getattr(distribution, p)) is not None:
                found[f"{name}_{p}"] = Figure(value)
    rates = {name: getattr(point, name, None) for name in RATES}
    rates["goodput_per_s"] = point.goodput.per_s if point.goodput else None
    rates[ENERGY] = point.energy_j_per_token
    found |= {name: Figure(value) for name, value in rates.items() if value is not None}
    for name, estimate in point.by_round.items():
        found[f"{name}_p50" if name in TIMES else name] = _estimated(estimate)
    if point.kept:
        scale = (point.offered_per_s or 0.0) / point.requests_per_s if point.requests_per_s else 0.0
        pooled = {name: getattr(point, name) for name in THROUGHPUT if name in found}
        found |= {name: Figure(scale * value) for name, value in pooled.items() if value is not None}
    return found


def _estimated(part: Share | Estimate) -> Figure:
    return Figure(part.value, part.low, part.high)
