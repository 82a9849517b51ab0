"""Compares systems of reports with a reference, figure by figure, and tells whether a condition for failing is met.

What is compared is the candidate of each report with the candidate of the first; changes are relative to the first. A
condition reads

    METRIC[@LOAD] OP CHANGE[UNIT]        accuracy<-1pt   tpot.p50@4>+5%   size_on_disk>0%

METRIC: ``accuracy``, ``accuracy.TASK``, ``ttft|tpot|itl|e2e`` with ``.p50|.p90|.p95|.p99`` (or ``_p50``), one of
`RATES`, `COUNTED` or `DRIFT`, ``joules_per_token``. LOAD: ``4`` in flight, ``2.5/s``, or a load's name; without it a
speed condition is tested under every load both reports have. OP: ``< <= > >=``. UNIT: ``%`` is a relative change
(B - A) / A, ``pt`` a difference in percentage points (shares alone), ``ms`` a difference of a latency.

A condition is judged with the change's 95% interval: ``worse`` when the change meets it and the interval leaves out no
change at all, ``no worse`` when nothing in the interval meets it, else ``can't tell``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report.accuracy import Pair, rows
from bench.report.schema import Estimate, Item, Judgement, Load, Report, Share, SpeedPoint, TaskAccuracy
from bench.roles import Role
from toolkit.errors import BenchError

__all__ = [
    "Change",
    "Comparison",
    "Condition",
    "Figure",
    "Gate",
    "Metric",
    "Row",
    "Side",
    "compare",
    "compare_all",
    "figures",
    "parse_condition",
]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TIMES = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = ("p50", "p90", "p95", "p99")
LATENCIES = tuple(f"{name}_{p}" for name in TIMES for p in PERCENTILES)
RATES = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "goodput_per_s")
ENERGY = "joules_per_token"
SPEED = (*LATENCIES, *RATES, ENERGY)
#: Counted, not sampled: exact.
COUNTED = ("size_on_disk", "memory", "gpu_memory", "weights_memory", "kv_cache")
#: Of the candidate from its report's baseline.
DRIFT = ("mean_kl", "p99_kl", "perplexity_ratio", "top1_agreement", "identical")
KNOWN = ("accuracy", "accuracy.TASK", *SPEED, *COUNTED, *DRIFT)
_CONDITION = re.compile(
    r"\s*(?P<metric>accuracy\.[^<>@=]*[^<>@=\s]|[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\s*(?:@\s*(?P<at>[^<>=@]+?))?\s*(?P<op><=|>=|<|>)\s*"
    r"(?P<change>[+\-−]?\d+(?:\.\d+)?)\s*(?P<unit>%|pt|ms|)\s*"
)


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a system: its name and, for speed, the load's name."""

    name: str
    at: str | None = None

    def __str__(self) -> str:
        return self.name if self.at is None else f"{self.name}@{self.at.removesuffix(' in flight')}"

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a share of right answers."""
        return _is_accuracy(self.name)

    @property
    def is_share(self) -> bool:
        """Whether it is a fraction of 1, whose changes are told in percentage points."""
        return _is_share(self.name)

    @property
    def more_is_better(self) -> bool:
        """Whether a system with more of it is the better one."""
        return self.is_share or self.name in (*RATES, "kv_cache")


def _is_accuracy(name: str) -> bool:
    return name == "accuracy" or name.startswith("accuracy.")


def _is_share(name: str) -> bool:
    return _is_accuracy(name) or name in ("top1_agreement", "identical")


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
    system = report.systems[role]
    memory = system.memory
    sizes = (system.disk_bytes, memory.host_bytes, memory.gpu_bytes, memory.weights_bytes, memory.kv_cache_tokens)
    for name, size in zip(COUNTED, sizes, strict=True):
        if size is not None:
            found[Metric(name)] = Figure(float(size), float(size), float(size))
    return found


def _speed(point: SpeedPoint) -> dict[str, Figure]:
    """Figures of a point: over its rounds where they are known by round, else over all requests."""
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
    return found


def _estimated(part: Share | Estimate) -> Figure:
    return Figure(part.value, part.low, part.high)


# --- changes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """B - A of a share, a fraction of 1; (B - A) / A of anything else. With its 95% interval, if there is one.

    Attributes:
        basis: how the interval was found; empty where there is none.
        p_value: of the paired test, for accuracies.
    """

    value: float
    low: float | None = None
    high: float | None = None
    basis: str = ""
    p_value: float | None = None

    @property
    def beyond_chance(self) -> bool | None:
        """Whether the interval leaves out no change; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return (self.low > 0 or self.high < 0) and (self.p_value is None or self.p_value < 0.05)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of A and of B, and the change from A to B."""

    metric: Metric
    before: Figure
    after: Figure
    change: Change

    @property
    def says(self) -> str:
        """``better``, ``worse``, ``same`` (to the last digit), or ``can't tell``."""
        if self.change.value == 0 and self.change.low == self.change.high == 0:
            return "same"
        if not self.change.beyond_chance:
            return "can't tell"
        return "better" if (self.change.value > 0) == self.metric.more_is_better else "worse"


def _relative(before: float, after: float) -> float:
    if before:
        return (after - before) / before
    return 0.0 if after == before else math.copysign(math.inf, after - before)


def _change(metric: Metric, a: Side, b: Side, before: Figure, after: Figure, paired: dict[str, TaskAccuracy]) -> Change:
    if metric.is_accuracy:
        row = paired.get(metric.name)
        if row is None:
            return Change(after.value - before.value)
        d = row.difference
        return Change(d.value, d.low, d.high, "paired by question", row.p_adjusted)
    if metric.is_share:
        return _apart(before, after)
    value = _relative(before.value, after.value)
    if metric.name in COUNTED:
        return Change(value, value, value, "counted")
    found = _within(metric, a, b) or _between(before, after) or _through_baseline(metric, a, b)
    return found or Change(value)


def _ratio(report: Report, metric: Metric) -> Figure | None:
    """Candidate / baseline in a report, with its interval; None when it holds none of this metric."""
    name = metric.name.removesuffix("_p50")
    found = next((r for r in report.speed_ratios if (r.metric, r.load) == (name, metric.at)), None)
    return Figure(found.ratio, found.low, found.high) if found else None


def _within(metric: Metric, a: Side, b: Side) -> Change | None:
    """Baseline and candidate of one report, measured in turns."""
    if a.report is not b.report or (a.role, b.role) != ("baseline", "candidate"):
        return None
    ratio = _ratio(a.report, metric)
    if ratio is None or ratio.low is None or ratio.high is None:
        return None
    return Change(ratio.value - 1, ratio.low - 1, ratio.high - 1, "measured in turns")


def _mover(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """b - a of two independent estimates (value, low, high) with its interval, recovered from theirs: MOVER, Zou &
    Donner, Statistics in Medicine 27 (2008) 1693."""
    value = b[0] - a[0]
    return value, value - math.hypot(b[0] - b[1], a[2] - a[0]), value + math.hypot(b[2] - b[0], a[0] - a[1])


def _between(before: Figure, after: Figure, basis: str = "both reports' intervals") -> Change | None:
    """The relative change between two figures that each have an interval: on the logarithm, where ratios add up."""
    ends = [end for figure in (before, after) for end in (figure.value, figure.low, figure.high)]
    if not all(ends) or None in ends or min(end for end in ends if end is not None) <= 0:
        return None
    logs = [math.log(end) for end in ends if end is not None]
    value, low, high = _mover((logs[0], logs[1], logs[2]), (logs[3], logs[4], logs[5]))
    return Change(math.expm1(value), math.expm1(low), math.expm1(high), basis)


def _apart(before: Figure, after: Figure) -> Change:
    """The difference of two shares."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Change(after.value - before.value)
    one, two = (before.value, before.low, before.high), (after.value, after.low, after.high)
    return Change(*_mover(one, two), "both reports' intervals")


def _through_baseline(metric: Metric, a: Side, b: Side) -> Change | None:
    """Candidates of two reports that measured the same baseline: (B / baseline) / (A / baseline), in which what the
    machine did on either day is left out."""
    if (a.role, b.role) != ("candidate", "candidate") or not _same_baseline(a.report, b.report):
        return None
    one, two = _ratio(a.report, metric), _ratio(b.report, metric)
    return _between(one, two, "against the same baseline") if one and two else None


def _same_baseline(a: Report, b: Report) -> bool:
    one, two = a.systems["baseline"], b.systems["baseline"]
    keys = ("label", "quantization", "disk_bytes", "server_version", "serve_arguments")
    return all(getattr(one, key) == getattr(two, key) for key in keys)


# --- conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition for failing, as in the module's grammar."""

    text: str
    metric: str
    at: str | None
    op: str
    change: float
    unit: str

    def met(self, before: float, change: float) -> bool:
        """Whether a change (as in `Change`) from ``before`` (in the metric's own unit) meets it."""
        if self.unit == "ms":
            shown = change * before
        elif self.unit == "%" and _is_share(self.metric):
            shown = 100.0 * change / before if before else math.copysign(math.inf, change) if change else 0.0
        else:
            shown = 100.0 * change
        # Decimal fractions are not exact in binary: a change of exactly the limit must not count as past it.
        return OPERATORS[self.op](round(shown, 9), self.change)

    def judge(self, row: Row) -> Judgement:
        """Judge a change with its interval; without one nothing is told but that a change of 0 is none."""
        change = row.change
        if change.low is None or change.high is None:
            return "can't tell"
        if not any(self.met(row.before.value, value) for value in (change.low, change.value, change.high)):
            return "no worse"
        if self.met(row.before.value, change.value) and change.beyond_chance:
            return "worse"
        return "can't tell"


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        BenchError: it does not follow the grammar, names an unknown metric, or would fail two equal reports.
    """
    match = _CONDITION.fullmatch(text)
    if not match:
        raise BenchError(
            f"--fail-if {text!r}: write METRIC OP CHANGE with OP one of < <= > >= and CHANGE ending in %, pt or ms, "
            "e.g. 'accuracy<-1pt' or 'tpot.p50@4>+5%'"
        )
    metric, unit = match["metric"], match["unit"]
    if not metric.startswith("accuracy."):
        metric = metric.lower().replace(".", "_")  # ttft.p50 is ttft_p50
    share = _is_share(metric)
    if not share and metric not in KNOWN:
        raise BenchError(f"--fail-if {text!r}: unknown metric {metric!r}; choose one of {', '.join(KNOWN)}")
    if share and unit not in ("%", "pt"):
        raise BenchError(f"--fail-if {text!r}: {metric} changes by % (relative) or pt (percentage points); say which")
    if not share and (unit not in ("%", "ms") or (unit == "ms" and metric not in LATENCIES)):
        fitting = "% or ms" if metric in LATENCIES else "%"
        raise BenchError(f"--fail-if {text!r}: a change of {metric} is given in {fitting}")
    at = _load(match["at"]) if match["at"] else None
    if at is not None and metric not in SPEED:
        raise BenchError(f"--fail-if {text!r}: {metric} is not measured under a load; drop @{match['at']}")
    change = float(match["change"].replace("−", "-"))
    if OPERATORS[match["op"]](0.0, change):
        raise BenchError(
            f"--fail-if {text!r}: two equal reports would fail this; turn the sign or the comparison round"
        )
    return Condition(text.strip(), metric, at, match["op"], change, unit)


def _load(text: str) -> str:
    """The name of a load: ``4`` is ``4 in flight``, ``2.5/s`` is ``2.5 requests/s``."""
    text = text.strip()
    if text.isdecimal():
        return Load.in_flight(int(text)).name
    rate = re.fullmatch(r"(\d+(?:\.\d+)?)\s*/s", text)
    return Load.at_rate(float(rate[1]), "poisson").name if rate else text


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition, judged on one figure."""

    condition: Condition
    row: Row
    judgement: Judgement


# --- comparisons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """B relative to A.

    Attributes:
        rows: the figures both have.
        accuracy: over all items, paired, when both answered the same questions; A is its baseline, B its candidate,
            and its verdict goes by B's margin.
        tasks: the same for each task.
        flips: questions that went from right to wrong or back: (item in A, item in B).
        differences: in what was asked or on what it ran: why the two can't be compared.
        notes: what else a reader should know: other software, an incomplete report, a baseline that changed too.
        gates: each condition on each figure it names.
    """

    a: Side
    b: Side
    rows: list[Row]
    accuracy: TaskAccuracy | None
    tasks: list[TaskAccuracy]
    flips: list[tuple[Item, Item]]
    differences: list[str]
    notes: list[str]
    gates: list[Gate] = field(default_factory=list)

    @property
    def regressions(self) -> list[str]:
        """A line for each condition that is met beyond chance."""
        return [self._line(gate) for gate in self.gates if gate.judgement == "worse"]

    @property
    def undecided(self) -> list[str]:
        """A line for each condition that may or may not be met."""
        return [self._line(gate) for gate in self.gates if gate.judgement == "can't tell"]

    @property
    def losses(self) -> list[str]:
        """A line for each loss of accuracy that is ``worse`` than the margin allows, whatever the conditions."""
        rows = [*self.tasks, *([self.accuracy] if self.accuracy else [])]
        return [
            f"{self.b.label}: accuracy ({row.task}) is worse beyond chance" for row in rows if row.verdict == "worse"
        ]

    def _line(self, gate: Gate) -> str:
        change = gate.row.change
        scale, unit = 100.0, " points" if gate.row.metric.is_share else "%"
        shown = f"{scale * change.value:+.1f}{unit}"
        if change.low is None or change.high is None:
            shown += ", no interval"
        elif change.low != change.high:
            shown += f", 95% interval {scale * change.low:+.1f} to {scale * change.high:+.1f}"
        moved = f"went from {gate.row.before.value:.6g} to {gate.row.after.value:.6g} ({shown})"
        return f"{gate.condition.text}: {gate.row.metric} {moved}"


def compare_all(
    sides: Sequence[Side], conditions: Sequence[Condition] = (), *, anyway: bool = False
) -> list[Comparison]:
    """Compare each side with the first; see `compare`."""
    return [compare(sides[0], side, conditions, anyway=anyway) for side in sides[1:]]


def compare(a: Side, b: Side, conditions: Sequence[Condition] = (), *, anyway: bool = False) -> Comparison:
    """Compare B with A and judge the conditions.

    Args:
        anyway: compare although what was asked, or the machine, differs.

    Raises:
        BenchError: a report is marked failed, a condition names a figure that one of them lacks, or what was asked or
            the machine differs.
    """
    for side in (a, b):
        if side.report.status == "failed":
            raise BenchError(
                f"the report of {side.label} is marked failed and has no figures: {side.report.verdict.sentence}"
            )
    questions, others = ([], []) if a.report is b.report else _differences(a.report, b.report)
    differences = questions + others
    if differences and not anyway:
        raise BenchError(
            f"{a.label} and {b.label} can't be compared: {'; '.join(differences)}. "
            "Measure again alike, or pass --anyway"
        )
    overall: TaskAccuracy | None = None
    by_task: list[TaskAccuracy] = []
    pairs = [] if questions else _pairs(a, b)
    if pairs:
        overall, by_task = rows(
            [pair for pair, _ in pairs], seed=a.report.workload.seed, margin=b.report.verdict.margin
        )
    paired = {f"accuracy.{row.task}": row for row in by_task} | ({"accuracy": overall} if overall else {})
    before, after = figures(a), figures(b)
    shared = [
        Row(metric, before[metric], after[metric], _change(metric, a, b, before[metric], after[metric], paired))
        for metric in before
        if metric in after and metric.name not in _incomparable(a.report, b.report)
    ]
    gates = []
    for condition in conditions:
        tested = [r for r in shared if r.metric.name == condition.metric and condition.at in (None, r.metric.at)]
        if not tested:
            both = sorted({str(row.metric) for row in shared}) or ["nothing"]
            invalid = [p for side in (a, b) for p in side.report.speed if p.role == side.role and p.invalid]
            left_out = f" ({len(invalid)} invalid points are left out: they measured the client)" if invalid else ""
            raise BenchError(
                f"--fail-if {condition.text!r}: not measured for both {a.label} and {b.label}{left_out}; "
                f"both have {', '.join(both)}"
            )
        gates += [Gate(condition, row, condition.judge(row)) for row in tested]
    flipped = [items for pair, items in pairs if (pair.before >= 0.5) != (pair.after >= 0.5)]
    return Comparison(
        a=a,
        b=b,
        rows=shared,
        accuracy=overall,
        tasks=by_task,
        flips=flipped,
        differences=differences,
        notes=[] if a.report is b.report else _notes(a, b, before, after),
        gates=gates,
    )


def _items(side: Side) -> dict[str, Item]:
    accuracy = side.report.accuracy
    return {item.id: item for item in accuracy.items} if accuracy else {}


def _pairs(a: Side, b: Side) -> list[tuple[Pair, tuple[Item, Item]]]:
    """Pair the scores of two systems that answered the same questions; none when they did not."""
    before, after = _items(a), _items(b)
    if before.keys() != after.keys():
        return []
    # A report of schema version 1 knows no clusters; then the other's count.
    known = min((before, after), key=lambda items: len({item.cluster for item in items.values()}))
    return [
        (
            Pair(
                task=item.task,
                metric=item.metric,
                cluster=known[item.id].cluster,
                before=getattr(item, a.role).score,
                after=getattr(after[item.id], b.role).score,
            ),
            (item, after[item.id]),
        )
        for item in before.values()
    ]


# --- what differs -----------------------------------------------------------------------------------------------------

#: Of the workload, what decides about answers; and what may differ without making figures incomparable: how much was
#: measured, how long was waited, how it was called. Everything else decides about speed.
ASKED = ("questions_sha256", "answer_tokens")
HARMLESS = (
    "tasks_source",
    "questions",
    "question_concurrency",
    "concurrencies",
    "requests",
    "rates",
    "sweep",
    "sweep_concurrency",
    "rounds",
    "duration_s",
    "preset",
    "slos",
    "timeout_s",
    "seed",
)


def _differences(a: Report, b: Report) -> tuple[list[str], list[str]]:
    """What differs in the questions; in the load and the machine."""
    questions, others = [], []
    one, two = a.workload.model_dump(), b.workload.model_dump()
    if a.accuracy and b.accuracy:
        if a.workload.questions_sha256 != b.workload.questions_sha256:
            questions.append(f"other questions ({a.workload.questions} and {b.workload.questions})")
        if a.workload.answer_tokens != b.workload.answer_tokens:
            questions.append(f"answers of up to {a.workload.answer_tokens} and {b.workload.answer_tokens} tokens")
    if a.speed and b.speed:
        # What one of them does not say (an older schema) is not known to differ; `_notes` names it.
        others += [
            f"{_words(key)} {_shown(one[key])} and {_shown(two[key])}"
            for key in one
            if key not in (*ASKED, *HARMLESS) and one[key] != two[key] and None not in (one[key], two[key])
        ]
    machines = [[*map(_hardware, report.environment.gpus), report.environment.cpu] for report in (a, b)]
    if machines[0] != machines[1]:
        others.append(f"measured on {'; '.join(machines[0])} and on {'; '.join(machines[1])}")
    return questions, others


def _incomparable(a: Report, b: Report) -> tuple[str, ...]:
    """Metrics that are defined by what differs between the reports."""
    names: tuple[str, ...] = () if a.workload.slos == b.workload.slos else ("goodput_per_s",)
    if a.fidelity and b.fidelity:
        one, two = ((f.items_sha256, f.top_k, f.answer_tokens) for f in (a.fidelity, b.fidelity))
        if one != two or not _same_baseline(a, b):
            names += DRIFT
    return names


def _hardware(gpu: str) -> str:
    """A GPU's name and memory, without its driver, which is software."""
    return ", ".join(gpu.split(", ")[:2])


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{_words(key)} {_shown(part)}" for key, part in value.items())
    return str(value)


def _notes(a: Side, b: Side, before: dict[Metric, Figure], after: dict[Metric, Figure]) -> list[str]:
    notes = []
    for side in (a, b):
        if side.report.status == "partial":
            missing = f" ({'; '.join(side.report.unfinished)})" if side.report.unfinished else ""
            notes.append(f"the report of {side.label} is partial: it holds what was measured until then{missing}")
        invalid = [p.load.name for p in side.report.speed if p.role == side.role and p.invalid]
        if invalid:
            notes.append(f"left out, for they measured the client: {side.label}, {', '.join(invalid)}")
    one, two = a.report.workload.model_dump(), b.report.workload.model_dump()
    if a.report.speed and b.report.speed:
        unknown = [key for key in one if (one[key] is None) != (two[key] is None) and key not in (*ASKED, *HARMLESS)]
        if unknown:
            notes.append(f"one of the reports does not say: {', '.join(map(_words, unknown))}")
    for what, old, new in (
        ("versions", a.report.environment.versions, b.report.environment.versions),
        ("systems", {"platform": a.report.environment.platform}, {"platform": b.report.environment.platform}),
    ):
        changed = [f"{name} {old[name]} and {new[name]}" for name in old if name in new and old[name] != new[name]]
        if changed:
            notes.append(f"other {what}: {'; '.join(changed)}")
    commits = [side.report.environment.commit for side in (a, b)]
    if commits[0] != commits[1]:
        notes.append(f"measured by other commits of qvl: {commits[0] or 'unknown'} and {commits[1] or 'unknown'}")
    if "mean_kl" in _incomparable(a.report, b.report):
        notes.append("fidelity is not compared: other prompts, settings or baselines")
    arguments = [" ".join(side.report.systems[side.role].serve_arguments) or "none" for side in (a, b)]
    if arguments[0] != arguments[1]:
        notes.append(f"other arguments of the server: {arguments[0]}; {arguments[1]}")
    drivers = [[gpu.split(", ")[-1] for gpu in side.report.environment.gpus] for side in (a, b)]
    if drivers[0] != drivers[1] and all(drivers):
        notes.append(f"other GPU drivers: {', '.join(drivers[0])} and {', '.join(drivers[1])}")
    for only, rest, name in ((before, after, a.label), (after, before, b.label)):
        points = sorted({m.at for m in only if m.at is not None} - {m.at for m in rest if m.at is not None})
        if points:
            notes.append(f"measured for {name} alone: {', '.join(points)}")
    if (a.report.accuracy is None) != (b.report.accuracy is None):
        notes.append(f"accuracy was measured for {(a if a.report.accuracy else b).label} alone")
    drift = _drift(a, b)
    return notes + ([drift] if drift else [])


def _drift(a: Side, b: Side) -> str | None:
    """How far the same baseline moved between two reports: what the machine did, not the candidate."""
    if (a.role, b.role) != ("candidate", "candidate") or not _same_baseline(a.report, b.report):
        return None
    before, after = figures(Side(a.report, "baseline")), figures(Side(b.report, "baseline"))
    moved = {
        metric: _relative(before[metric].value, after[metric].value)
        for metric in before
        if metric in after and metric.name in ("ttft_p50", "tpot_p50", "output_tokens_per_s")
    }
    if not moved:
        return None
    worst = max(moved, key=lambda metric: abs(moved[metric]))
    if abs(moved[worst]) < 0.02:
        return None
    return (
        f"the baseline, the same in both, moved as well: {worst} by {100 * moved[worst]:+.1f}%; changes of that size "
        "are the machine's"
    )
