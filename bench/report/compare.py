"""Compares two reports, or the two systems of one, and tells whether a condition for failing is met.

What is compared is the candidate of report A with the candidate of report B; changes are B relative to A. A condition
reads

    METRIC[@CONCURRENCY] OP CHANGE[UNIT]        accuracy<-1pt   tpot_p50@4>+5%   size_on_disk>0%

METRIC: ``accuracy``, ``accuracy.TASK``, ``ttft|tpot|itl|e2e`` with ``_p50|_p90|_p99``, ``output_tokens_per_s``,
``requests_per_s``, ``size_on_disk``, ``memory``, ``gpu_memory``, ``weights_memory``. OP: ``< <= > >=``. UNIT: ``%`` is
a relative change (B - A) / A, ``pt`` a difference in percentage points (accuracy alone), ``ms`` a difference of a
latency. Without ``@CONCURRENCY`` a speed condition is met when it is met at any concurrency both reports have.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.report.accuracy import Pair, rows
from bench.report.model import Item, Report, Role, TaskAccuracy
from toolkit.errors import BenchError

__all__ = ["Comparison", "Condition", "Metric", "Side", "compare", "parse_condition", "snapshot"]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
LATENCIES = tuple(f"{name}_{p}" for name in ("ttft", "tpot", "itl", "e2e") for p in ("p50", "p90", "p99"))
RATES = ("output_tokens_per_s", "requests_per_s")
SIZES = ("size_on_disk", "memory", "gpu_memory", "weights_memory")
_CONDITION = re.compile(
    r"\s*(?P<metric>accuracy\.[^<>@=]*[^<>@=\s]|[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\s*(?:@\s*(?P<at>\d+))?\s*(?P<op><=|>=|<|>)\s*"
    r"(?P<change>[+\-−]?\d+(?:\.\d+)?)\s*(?P<unit>%|pt|ms|)\s*"
)


@dataclass(frozen=True, slots=True, order=True)
class Metric:
    """A figure of a system: its name and, for speed, its concurrency."""

    name: str
    at: int | None = None

    def __str__(self) -> str:
        return self.name if self.at is None else f"{self.name}@{self.at}"


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition for failing, as in the module's grammar."""

    text: str
    metric: str
    at: int | None
    op: str
    change: float
    unit: str

    def met(self, before: float, after: float) -> bool:
        """Whether the change from ``before`` to ``after`` (in the metric's own unit; accuracy as a fraction) meets
        it."""
        if self.unit == "%":
            change = (
                100.0 * (after - before) / before
                if before
                else math.copysign(math.inf, after - before)
                if after != before
                else 0.0
            )
        else:
            change = (after - before) * (100.0 if self.unit == "pt" else 1.0)
        # Decimal fractions are not exact in binary: a change of exactly the limit must not count as past it.
        change = round(change, 9)
        return OPERATORS[self.op](change, self.change)


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        BenchError: it does not follow the grammar, names an unknown metric, or would fail two equal reports.
    """
    match = _CONDITION.fullmatch(text)
    if not match:
        raise BenchError(
            f"--fail-if {text!r}: write METRIC OP CHANGE with OP one of < <= > >= and CHANGE ending in %, pt or ms, "
            "e.g. 'accuracy<-1pt' or 'tpot_p50@4>+5%'"
        )
    metric, unit = match["metric"], match["unit"]
    if not metric.startswith("accuracy."):
        metric = metric.lower().replace(".", "_")  # ttft.p50 is ttft_p50
    accuracy = metric == "accuracy" or metric.startswith("accuracy.")
    if not accuracy and metric not in (*LATENCIES, *RATES, *SIZES):
        known = ", ".join(("accuracy", "accuracy.TASK", *LATENCIES, *RATES, *SIZES))
        raise BenchError(f"--fail-if {text!r}: unknown metric {metric!r}; choose one of {known}")
    if accuracy and unit not in ("%", "pt"):
        raise BenchError(
            f"--fail-if {text!r}: an accuracy changes by % (relative) or pt (percentage points); say which"
        )
    if not accuracy and (unit not in ("%", "ms") or (unit == "ms" and metric not in LATENCIES)):
        fitting = "% or ms" if metric in LATENCIES else "%"
        raise BenchError(f"--fail-if {text!r}: a change of {metric} is given in {fitting}")
    at = int(match["at"]) if match["at"] else None
    if at is not None and metric not in (*LATENCIES, *RATES):
        raise BenchError(f"--fail-if {text!r}: {metric} has no concurrency; drop @{at}")
    change = float(match["change"].replace("−", "-"))
    if OPERATORS[match["op"]](0.0, change):
        raise BenchError(
            f"--fail-if {text!r}: two equal reports would fail this; turn the sign or the comparison round"
        )
    return Condition(text.strip(), metric, at, match["op"], change, unit)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared: a system in a report."""

    report: Report
    role: Role

    @property
    def label(self) -> str:
        """The system's name."""
        return self.report.systems[self.role].label


def snapshot(side: Side) -> dict[Metric, float]:
    """Return every figure of a system that was measured: accuracy as fractions, latencies in ms, sizes in bytes."""
    report, role = side.report, side.role
    found: dict[Metric, float] = {}
    if report.accuracy:
        for row in report.accuracy.tasks:
            found[Metric(f"accuracy.{row.task}")] = getattr(row, role).value
        found[Metric("accuracy")] = getattr(report.accuracy.overall, role).value
    for point in report.speed:
        if point.role != role:
            continue
        for name in ("ttft", "tpot", "itl", "e2e"):
            distribution = getattr(point, f"{name}_ms")
            for p in ("p50", "p90", "p99"):
                if distribution is not None:
                    found[Metric(f"{name}_{p}", point.concurrency)] = getattr(distribution, p)
        if point.output_tokens_per_s is not None:
            found[Metric("output_tokens_per_s", point.concurrency)] = point.output_tokens_per_s
        found[Metric("requests_per_s", point.concurrency)] = point.requests_per_s
    system = report.systems[role]
    sizes = (system.disk_bytes, system.memory.host_bytes, system.memory.gpu_bytes, system.memory.weights_bytes)
    found |= {Metric(name): float(size) for name, size in zip(SIZES, sizes, strict=True) if size is not None}
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """B relative to A.

    Attributes:
        rows: metric, its value in A and in B; those both have.
        accuracy: over all items, paired, when both answered the same questions; A is its baseline, B its candidate,
            and its verdict goes by B's margin.
        tasks: the same for each task.
        differences: in what was measured or on what; empty when the two can be compared without a doubt.
        regressions: a line for each condition that is met.
    """

    a: Side
    b: Side
    rows: list[tuple[Metric, float, float]]
    accuracy: TaskAccuracy | None
    tasks: list[TaskAccuracy]
    differences: list[str]
    regressions: list[str]


def _items(side: Side) -> dict[str, Item]:
    accuracy = side.report.accuracy
    return {item.id: item for item in accuracy.items} if accuracy else {}


def _pairs(a: Side, b: Side) -> list[Pair]:
    """Pair the scores of two systems that answered the same questions; none when they did not."""
    before, after = _items(a), _items(b)
    if before.keys() != after.keys():
        return []
    # A report of schema version 1 knows no clusters; then the other's count.
    known = min((before, after), key=lambda items: len({item.cluster for item in items.values()}))
    return [
        Pair(
            task=item.task,
            metric=item.metric,
            cluster=known[item.id].cluster,
            before=getattr(item, a.role).score,
            after=getattr(after[item.id], b.role).score,
        )
        for item in before.values()
    ]


def _differences(a: Report, b: Report) -> tuple[list[str], list[str], list[str]]:
    """What differs in the questions, in the load, and in the machine."""
    accuracy, speed, machine = [], [], []
    if a.accuracy and b.accuracy:
        if a.workload.questions_sha256 != b.workload.questions_sha256:
            accuracy.append(f"other questions ({a.workload.questions} and {b.workload.questions})")
        if a.workload.answer_tokens != b.workload.answer_tokens:
            accuracy.append(f"answers of up to {a.workload.answer_tokens} and {b.workload.answer_tokens} tokens")
    if a.speed and b.speed:
        if a.workload.output_tokens != b.workload.output_tokens:
            speed.append(f"{a.workload.output_tokens} and {b.workload.output_tokens} output tokens")
        if a.workload.image_sizes != b.workload.image_sizes:
            speed.append(f"pictures of {', '.join(a.workload.image_sizes)} and {', '.join(b.workload.image_sizes)}")
        if (a.environment.cpu, a.environment.gpus) != (b.environment.cpu, b.environment.gpus):
            shown = ["; ".join(r.environment.gpus) or r.environment.cpu for r in (a, b)]
            machine.append(f"measured on {shown[0]} and on {shown[1]}")
    return accuracy, speed, machine


def compare(a: Side, b: Side, conditions: Sequence[Condition] = (), *, anyway: bool = False) -> Comparison:
    """Compare B with A and test the conditions.

    Args:
        anyway: test conditions although what was asked, or the machine, differs.

    Raises:
        BenchError: a report is marked failed, a condition names a figure that one of them lacks, or conditions are
            given for measurements that can't be compared.
    """
    for side in (a, b):
        if side.report.status == "failed":
            raise BenchError(
                f"the report of {side.label} is marked failed and has no figures: {side.report.verdict.sentence}"
            )
    before, after = snapshot(a), snapshot(b)
    shared = [metric for metric in before if metric in after]
    questions, load, machine = _differences(a.report, b.report) if a.report is not b.report else ([], [], [])
    regressions = []
    for condition in conditions:
        tested = [m for m in shared if m.name == condition.metric and condition.at in (None, m.at)]
        if not tested:
            both = sorted({str(metric) for metric in shared}) or ["nothing"]
            raise BenchError(
                f"--fail-if {condition.text!r}: not measured for both {a.label} and {b.label}; "
                f"both have {', '.join(both)}"
            )
        blocking = []
        if condition.metric.startswith("accuracy"):
            blocking = questions
        elif condition.metric in (*LATENCIES, *RATES):
            blocking = load + machine
        if blocking and not anyway:
            raise BenchError(
                f"--fail-if {condition.text!r}: the reports can't be compared in this: {'; '.join(blocking)}. "
                "Measure again alike, or pass --anyway"
            )
        regressions += [
            f"{condition.text}: {metric} went from {before[metric]:.6g} to {after[metric]:.6g}"
            for metric in tested
            if condition.met(before[metric], after[metric])
        ]
    overall: TaskAccuracy | None = None
    by_task: list[TaskAccuracy] = []
    pairs = [] if questions else _pairs(a, b)
    if pairs:
        overall, by_task = rows(pairs, seed=a.report.workload.seed, margin=b.report.verdict.margin)
    return Comparison(
        a=a,
        b=b,
        rows=[(metric, before[metric], after[metric]) for metric in shared],
        accuracy=overall,
        tasks=by_task,
        differences=questions + load + machine,
        regressions=regressions,
    )
