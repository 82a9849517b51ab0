"""From answers to what a report says of accuracy: scores, a row with a verdict for each task, the flips' images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.judge import stats, verdict
from bench.load.client import Trace
from bench.questions import scoring, tasks
from bench.questions.tasks import Question
from bench.report.schema import Accuracy, Answer, Difference, Item, Share, TaskAccuracy
from bench.report.thumbnails import BUDGET, thumbnails
from bench.roles import ROLES, Role

__all__ = ["ALL", "DEFINITIONS", "Pair", "answers", "pair", "rows"]

ALL = "all"

DEFINITIONS = {
    "accuracy": (
        "Accuracy = mean score of a task's questions; over all tasks, mean over all questions. Interval: Wilson for "
        "right/wrong scores, expanded-percentile bootstrap for graded ones. A failed request is never a wrong answer: "
        "it fails the run."
    ),
    "flip": "Lost = right in the baseline, wrong in the candidate; won = the other way. Right: scores of 0.5 or more.",
    "difference": (
        "Difference = candidate - baseline on the same questions. Interval for right/wrong scores: Tango's score "
        "interval (1998) on the counts divided by the design effect (Rao & Scott 1992, Obuchowski 1998). For graded "
        "scores: expanded-percentile bootstrap over clusters, never narrower than Tango's interval generalised to "
        "scores from -1 to 1."
    ),
    "cluster": (
        "Cluster = questions on the same image or document, which succeed and fail together. Design effect = how "
        "much that widens the variance: n questions tell as much as n / design effect independent ones; 1 when each "
        "stands alone."
    ),
    "p_value": (
        "p = exact sign-flip test by cluster, two-sided: how often lost and won would be this lopsided if each cluster "
        "might as well have gone the other way. Where every question stands alone it is the exact McNemar test; its "
        "normal approximation is Durkalski's (2003). Adjusted for the number of tasks by Holm (1979)."
    ),
    "recovery": (
        "Recovery = candidate's mean score / baseline's. Interval: bootstrap over clusters, never narrower than what "
        "the difference leaves open."
    ),
    "verdict": (
        "No worse = the 95% interval of the difference lies above -margin, also when it lies wholly between -margin "
        "and 0. Worse = not so, the interval lies below 0, and p is below 5%. Can't tell = anything else; the number "
        "of questions needed is that which would settle it with 80% power, flipping as often as observed."
    ),
    "smallest_detectable": (
        "Smallest detectable = smallest true difference that McNemar's test on so many questions (divided by the "
        "design effect), flipping as often as observed, shows with 80% power at 5% (Connor 1987)."
    ),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One item's scores in the two systems that are compared, 0 to 1."""

    task: str
    metric: str
    cluster: str
    before: float
    after: float


def pair(item: Item) -> Pair:
    """What is compared of an item of one report."""
    return Pair(item.task, item.metric, item.cluster, item.baseline.score, item.candidate.score)


def rows(pairs: Sequence[Pair], *, seed: int, margin: float) -> tuple[TaskAccuracy, list[TaskAccuracy]]:
    """Compare and judge; return the row over all items and one row a task, in order of first appearance."""
    by_task: dict[str, list[Pair]] = {}
    for one in pairs:
        by_task.setdefault(one.task, []).append(one)
    found = {task: _compare(group, seed) for task, group in by_task.items()}
    judged = verdict.judge_tasks(found, margin)
    whole = _compare(pairs, seed)
    return (
        _row(ALL, pairs, whole, verdict.judge(whole, margin)),
        [_row(task, group, found[task], judged[task]) for task, group in by_task.items()],
    )


def _compare(pairs: Sequence[Pair], seed: int) -> verdict.Comparison:
    return verdict.compare(
        [one.before for one in pairs],
        [one.after for one in pairs],
        seed=seed,
        clusters=[one.cluster for one in pairs],
    )


def _row(task: str, pairs: Sequence[Pair], found: verdict.Comparison, judged: verdict.Verdict) -> TaskAccuracy:
    return TaskAccuracy(
        task=task,
        metric=" + ".join(sorted({one.metric for one in pairs})),
        n=found.n,
        clusters=found.clusters,
        baseline=_share(found.baseline),
        candidate=_share(found.candidate),
        difference=Difference(
            value=found.difference.value,
            low=found.difference.low,
            high=found.difference.high,
            method=found.method,
            p_value=found.p_value,
            lost=found.flips.lost,
            won=found.flips.won,
            design_effect=found.design_effect,
            smallest_detectable=found.smallest_detectable,
        ),
        recovery=_share(found.recovery) if found.recovery else None,
        verdict=judged.judgement,
        p_adjusted=judged.p_value,
        items_needed=judged.items_needed,
    )


def _share(interval: stats.Interval) -> Share:
    return Share(value=interval.value, low=interval.low, high=interval.high)


def answers(
    questions: Sequence[Question],
    traces: Mapping[Role, Mapping[str, Trace]],
    *,
    seed: int,
    margin: float,
    by: scoring.Scoring = "paper",
) -> tuple[Accuracy, list[str]]:
    """Score all answers; return what they say and what a reader should know about it.

    Args:
        questions: at least one; their images may be read once more.
        traces: each system's answer by the question's id.
        by: whose rules they are scored by.
    """
    items = [
        Item(
            id=question.id,
            task=question.task,
            question=question.question,
            answers=list(question.answers),
            metric=question.metric,
            choices=list(question.choices),
            cluster=question.cluster_id,
            images=[image.sha256 for image in question.images],
            baseline=_answer(question, traces["baseline"][question.id], by),
            candidate=_answer(question, traces["candidate"][question.id], by),
        )
        for question in questions
    ]
    overall, by_task = rows([pair(item) for item in items], seed=seed, margin=margin)
    small = thumbnails([p for q, item in zip(questions, items, strict=True) if item.flip for p in q.images])
    found = Accuracy(
        overall=overall,
        tasks=by_task,
        items=items,
        thumbnails=small.urls,
        cut_answers={role: sum(getattr(item, role).finish_reason == "length" for item in items) for role in ROLES},
    )
    doubts = []
    if small.left_out:
        doubts.append(
            f"{small.left_out} images of answers that flipped are not shown: a report keeps {BUDGET // 2**20} MiB of "
            "them, scaled down"
        )
    if small.unreadable:
        doubts.append(f"{small.unreadable} images of answers that flipped were gone when the report was written")
    return found, doubts


def _answer(question: Question, trace: Trace, by: scoring.Scoring) -> Answer:
    grade: scoring.Grade = tasks.grade(question, trace.text, by)
    return Answer(text=trace.text, score=grade.score, note=grade.note, finish_reason=trace.finish_reason)
