"""Compares systems of reports with a reference, figure by figure, and tells whether a condition for failing is met.

What is compared is the candidate of each report with the candidate of the first; changes are relative to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.questions.scoring import RIGHT
from bench.report.accuracy import Pair, rows
from bench.report.compare.changes import KEPT, THROUGH, Row, change
from bench.report.compare.conditions import Condition, Gate
from bench.report.compare.differences import differences as differences_of
from bench.report.compare.differences import incomparable
from bench.report.compare.differences import notes as notes_of
from bench.report.compare.figures import SPEED, Side, figures
from bench.report.schema import Item, TaskAccuracy
from toolkit.errors import BenchError, UnmeasuredError

__all__ = ["Comparison", "compare", "compare_all"]


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
        unmeasured: a line for each condition that names what could not be measured.
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
    unmeasured: list[str] = field(default_factory=list)

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
        shown += f", {change.basis}" if change.basis in (THROUGH, KEPT) else ""
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
        UnmeasuredError: a report is marked failed.
        BenchError: a condition names a figure that one of them lacks, or what was asked or the machine differs.
    """
    for side in (a, b):
        if side.report.status == "failed":
            raise UnmeasuredError(
                f"the report of {side.label} is marked failed and has no figures: {side.report.verdict.sentence}"
            )
    questions, others = ([], []) if a.report is b.report else differences_of(a.report, b.report)
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
    unmeasured = _unmeasured(a, b, conditions)
    shared = [
        Row(metric, before[metric], after[metric], change(metric, a, b, before[metric], after[metric], paired))
        for metric in before
        if metric in after and metric.name not in incomparable(a.report, b.report)
    ]
    return Comparison(
        a=a,
        b=b,
        rows=shared,
        accuracy=overall,
        tasks=by_task,
        flips=[items for pair, items in pairs if (pair.before >= RIGHT) != (pair.after >= RIGHT)],
        differences=differences,
        notes=[] if a.report is b.report else notes_of(a, b, before, after),
        gates=_gates(a, b, shared, [c for c in conditions if c.text not in unmeasured]),
        unmeasured=list(unmeasured.values()),
    )


def _unmeasured(a: Side, b: Side, conditions: Sequence[Condition]) -> dict[str, str]:
    """A line by the text of each condition that names an invalid point."""
    found = {}
    for side in (a, b):
        for point in side.report.speed:
            if point.role != side.role or not point.invalid:
                continue
            for condition in conditions:
                if condition.metric in SPEED and condition.at in (None, point.load.name):
                    found[condition.text] = (
                        f"{condition.text}: could not be measured: {side.label}, {point.load.name}: {point.invalid}"
                    )
    return found


def _gates(a: Side, b: Side, shared: Sequence[Row], conditions: Sequence[Condition]) -> list[Gate]:
    """Judge each condition on each row that it names; raises BenchError where there is none."""
    gates = []
    for condition in conditions:
        tested = [r for r in shared if r.metric.name == condition.metric and condition.at in (None, r.metric.at)]
        if not tested:
            both = sorted({str(row.metric) for row in shared}) or ["nothing"]
            raise BenchError(
                f"--fail-if {condition.text!r}: not measured for both {a.label} and {b.label}; "
                f"both have {', '.join(both)}"
            )
        gates += [Gate(condition, row, condition.judge(row)) for row in tested]
    return gates


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
