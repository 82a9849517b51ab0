"""Accuracy by task, and the answers that changed between right and wrong."""

from __future__ import annotations

from dataclasses import dataclass

from bench.questions.scoring import RIGHT
from bench.report import words
from bench.report.schema import Answer, Item, Report, TaskAccuracy
from bench.report.view.cells import NOTHING, Cell, difference, share
from bench.roles import ROLES

__all__ = ["AccuracyRow", "Flip", "Flips", "Said", "accuracy_row", "accuracy_rows", "flips"]


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """Both systems in one task, or in all of them together.

    Attributes:
        needs: how many questions would settle the verdict; empty where it is settled.
        n: questions.
        clusters: groups of questions that share an image; None where every question stands alone.
        total: whether it is the row of all tasks.
    """

    task: str
    metric: str
    verdict: str
    needs: str
    n: int
    clusters: int | None
    baseline: Cell
    candidate: Cell
    difference: Cell
    recovery: Cell
    lost: int
    won: int
    p: str
    total: bool


def accuracy_row(row: TaskAccuracy, total: bool = False) -> AccuracyRow:
    """Return the row of a task, or with ``total`` that of all together."""
    return AccuracyRow(
        task=row.task,
        metric=row.metric,
        verdict=row.verdict,
        needs=words.questions(row.items_needed) if row.items_needed else "",
        n=row.n,
        clusters=row.clusters if row.clusters < row.n else None,
        baseline=share(row.baseline),
        candidate=share(row.candidate),
        difference=difference(row.difference),
        recovery=share(row.recovery) if row.recovery else Cell(NOTHING),
        lost=row.difference.lost,
        won=row.difference.won,
        p=words.p_value(row.p_adjusted),
        total=total,
    )


def accuracy_rows(report: Report) -> list[AccuracyRow]:
    """Return a row a task, all of them together last; none where accuracy was not measured."""
    found = report.accuracy
    return [*map(accuracy_row, found.tasks), accuracy_row(found.overall, total=True)] if found else []


@dataclass(frozen=True, slots=True)
class Said:
    """What a system answered.

    Attributes:
        remarks: whether it is right, its score where that is neither 0 nor 1, and what else is to know of it.
        brief: the answer with what is to know of it but its score.
        long: whether it is too long to stand on a page whole.
    """

    system: str
    text: str
    remarks: str
    brief: str
    long: bool


#: Characters of an answer that a page shows whole.
_LONG = 240


def _said(given: Answer, system: str) -> Said:
    remarks = "right" if given.score >= RIGHT else "wrong"
    if given.score not in (0.0, 1.0):
        remarks += f", score {given.score:.2f}"
    if given.note:
        remarks += f"; {given.note}"
    if given.finish_reason == "length":
        remarks += "; cut at the token limit"
    return Said(system, given.text.strip() or "(empty)", remarks, words.answer(given), len(given.text) > _LONG)


@dataclass(frozen=True, slots=True)
class Flip:
    """A question whose answer went from right to wrong (``lost``) or back (``won``).

    Attributes:
        right: the right answer.
        images: data URLs of its images, those that the report holds.
        missing: which of them it does not hold, in words.
        said: what both systems answered, the baseline first.
    """

    id: str
    task: str
    flip: str
    question: str
    right: str
    images: list[str]
    missing: str
    said: list[Said]


@dataclass(frozen=True, slots=True)
class Flips:
    """The answers of one task that flipped."""

    task: str
    lost: list[Flip]
    won: list[Flip]


def flips(report: Report) -> list[Flip]:
    """Return the answers that flipped, in the order they were asked."""
    return [_flip(item, report) for item in report.accuracy.flipped] if report.accuracy else []


def _flip(item: Item, report: Report) -> Flip:
    thumbnails = report.accuracy.thumbnails if report.accuracy else {}
    images = [url for sha in item.images if (url := thumbnails.get(sha))]
    missing = ""
    if len(item.images) > len(images):
        missing = f"{'its image is' if len(item.images) == 1 else 'some of its images are'} not kept"
    return Flip(
        id=item.id,
        task=item.task,
        flip=item.flip or "",
        question=item.question,
        right=words.golds(item),
        images=images,
        missing=missing,
        said=[_said(getattr(item, role), report.systems[role].label) for role in ROLES],
    )
