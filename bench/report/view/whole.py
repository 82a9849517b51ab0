"""A whole report as its reader sees it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import words
from bench.report.schema import Report
from bench.report.view.accuracy import AccuracyRow, Flip, Flips, accuracy_rows, flips
from bench.report.view.cards import Card, cards
from bench.report.view.fidelity import Drifted, drifted, fidelity_text
from bench.report.view.judged import Judged, judged, name
from bench.report.view.sizes import Size, sizes
from bench.report.view.speed import Counted, Ratios, SpeedRow, counted, ratios, speed_row
from bench.report.view.workload import workload_text
from bench.roles import ROLES

__all__ = ["HEADINGS", "Verdict", "View", "view"]

#: Of the sections that every format has.
HEADINGS = {
    "failures": "Failed requests",
    "accuracy": "Accuracy",
    "flips": "Answers that changed between right and wrong",
    "fidelity": "Fidelity",
    "speed": "Speed",
}


@dataclass(frozen=True, slots=True)
class View:
    """A whole report.

    Attributes:
        title: what is compared with what, by names, formats and kernels.
        judged: accuracy, speed and memory, each by itself.
        labels: of the systems, the baseline's first.
        created: date and time, UTC, to the minute.
        duration: seconds of the whole run, without a unit.
        machine: its GPUs, its CPU where it has none.
        cards: the numbers that matter most; none for a failed run.
        failures: system, phase, kind, count and message of each.
        accuracy: a row a task, all of them together last.
        margin: what verdicts on accuracy are against.
        drift: name of each measure of fidelity, and its value for the candidate and for the baseline asked again.
        fidelity: what was asked for it, in a sentence; empty where it was not measured.
        workload: what was asked, in a few sentences.
    """

    title: str
    labels: tuple[str, str]
    created: str
    duration: str
    machine: str
    verdict: Verdict
    judged: list[Judged]
    cards: list[Card]
    failures: list[list[str]]
    accuracy: list[AccuracyRow]
    margin: str
    flips: list[Flip]
    drift: list[tuple[str, list[str]]]
    fidelity: str
    drifted: list[Drifted]
    speed: list[SpeedRow]
    ratios: Ratios
    counted: Counted
    sizes: list[Size]
    workload: str

    @property
    def loads(self) -> list[list[SpeedRow]]:
        """The rows of `speed` by load, the baseline's first."""
        found: dict[str, list[SpeedRow]] = {}
        for row in self.speed:
            found.setdefault(row.load, []).append(row)
        return [sorted(rows, key=lambda row: ROLES.index(row.role)) for rows in found.values()]

    @property
    def flips_by_task(self) -> list[Flips]:
        """The answers that flipped by task, in the report's order; tasks without any are left out."""
        found = []
        for task in (row.task for row in self.accuracy if not row.total):
            here = [flip for flip in self.flips if flip.task == task]
            if here:
                found.append(Flips(task, [f for f in here if f.flip == "lost"], [f for f in here if f.flip == "won"]))
        return found


def view(report: Report) -> View:
    """Return what a reader sees of a report."""
    base, cand = (report.systems[role].label for role in ROLES)
    return View(
        title=" against ".join(name(report.systems[role]) for role in reversed(ROLES)),
        labels=(base, cand),
        created=f"{report.created:%Y-%m-%d %H:%M}",
        duration=f"{report.duration_s:.0f}",
        machine="; ".join(report.environment.gpus) or report.environment.cpu,
        verdict=_verdict(report),
        judged=judged(report),
        cards=[] if report.status == "failed" else cards(report),
        failures=[[f.role, f.phase, f.kind, str(f.count), f.message] for f in report.failures],
        accuracy=accuracy_rows(report),
        margin=words.limit(report.verdict.margin),
        flips=flips(report),
        drift=words.drift_rows(report.fidelity) if report.fidelity else [],
        fidelity=fidelity_text(report),
        drifted=drifted(report),
        speed=[speed_row(point, report) for point in report.speed],
        ratios=ratios(report),
        counted=counted(report),
        sizes=sizes(report),
        workload=workload_text(report),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer.

    Attributes:
        word: ``no worse``, ``worse`` or ``can't tell``; empty where accuracy was not measured.
        status: the same, or ``failed`` or ``partial``: key of what a badge says.
        worse_tasks: those that are worse, of several.
        sentence: what a reader should take away.
        speed: the same of speed; empty where it has no ratio.
    """

    word: str
    status: str
    worse_tasks: list[str]
    sentence: str
    speed: str


def _verdict(report: Report) -> Verdict:
    tasks = report.accuracy.tasks if report.accuracy else []
    word = report.verdict.accuracy or ""
    return Verdict(
        word=word,
        status=word if report.status == "ok" else report.status,
        worse_tasks=[row.task for row in tasks if row.verdict == "worse"] if len(tasks) > 1 else [],
        sentence=report.verdict.sentence,
        speed=report.verdict.speed or "",
    )
