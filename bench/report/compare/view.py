"""A comparison as people read it: the rows, cells and sentences that the terminal, markdown and HTML share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.judge.stats import holm
from bench.questions.scoring import RIGHT
from bench.report import words
from bench.report.compare.changes import Row
from bench.report.compare.comparison import Comparison
from bench.report.compare.figures import COUNTED, LATENCIES, Figure, Metric
from bench.report.schema import Item
from bench.report.view.accuracy import AccuracyRow, accuracy_row

__all__ = [
    "Column",
    "Flip",
    "Line",
    "accuracy",
    "change",
    "claimed",
    "columns",
    "differences",
    "figure",
    "flips",
    "headline",
    "leading",
    "leading_lines",
    "lines",
    "name",
    "notes",
    "split",
    "tested",
    "verdict",
]

NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "steady_output_tokens_per_s": "output tokens/s",
    "steady_requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s, to the last",
    "total_tokens_per_s": "all tokens/s",
    "requests_per_s": "requests/s, to the last",
    "goodput_per_s": "goodput/s",
    "joules_per_token": "J/token",
    "kv_cache": "KV cache",
    "mean_kl": "mean KL",
    "trimmed_kl": "trimmed KL",
    "geometric_kl": "geometric KL",
    "p99_kl": "p99 KL",
    "perplexity_ratio": "perplexity ratio",
    "top1_agreement": "top-1 agreement",
    "identical": "same answers",
    "size_on_disk": "size on disk",
    "memory": "host memory",
    "gpu_memory": "GPU memory",
    "weights_memory": "weights in memory",
}
#: Figures of speed that a headline names; the others are in the table.
TOLD = 4
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Column:
    """One of the systems: its letter, its name, and where it comes from."""

    letter: str
    label: str
    measured: str


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of all systems: the reference's, and the row of each other that has it too."""

    metric: Metric
    name: str
    before: Figure
    rows: list[Row | None]


def columns(found: Sequence[Comparison]) -> list[Column]:
    """The reference and the others, in order."""
    sides = [found[0].a, *(comparison.b for comparison in found)]
    return [
        Column(
            LETTERS[index % len(LETTERS)],
            side.label,
            f"{side.report.systems[side.role].label}, {side.report.created:%Y-%m-%d %H:%M} UTC",
        )
        for index, side in enumerate(sides)
    ]


def lines(found: Sequence[Comparison], *, every: bool = False) -> list[Line]:
    """All figures that the reference and at least one other have; without ``every`` of the percentiles p50 alone."""
    known: dict[Metric, Figure] = {row.metric: row.before for comparison in found for row in comparison.rows}
    by = [{row.metric: row for row in comparison.rows} for comparison in found]
    return [
        Line(metric, name(metric), before, [rows.get(metric) for rows in by])
        for metric, before in known.items()
        if every or not metric.name.endswith(("_p90", "_p95", "_p99"))
    ]


def name(metric: Metric) -> str:
    """What a figure is called."""
    if metric.is_accuracy:
        return f"accuracy, {metric.name.partition('.')[2] or 'all'}"
    of, percentile = metric.name, ""
    if of in LATENCIES:
        of, percentile = of.split("_")
    shown = f"{NAMES[of]} {percentile}".rstrip()
    shown = shown if metric.at is None else f"{shown}, {metric.at}"
    return f"{shown}, {metric.shape}" if metric.shape else shown


def figure(metric: Metric, value: float) -> str:
    """A figure with its unit."""
    if metric.is_share:
        return words.percent(value)
    if metric.name == "kv_cache":
        return f"{value:,.0f} tokens"
    if metric.name in COUNTED:
        return words.gib(round(value))
    if metric.name in ("mean_kl", "trimmed_kl", "geometric_kl", "p99_kl"):
        return f"{value:.2g}"
    return words.number(value) + (" ms" if metric.name in LATENCIES else "")


def change(row: Row) -> tuple[str, str]:
    """A change and its 95% interval, ``+12%`` and ``+8.1 … +16``; empty where there is no interval."""
    found = row.change
    if row.metric.is_share:
        value, ends = f"{words.points(found.value)} pt", [found.low, found.high]
        shown = [words.points(end) for end in ends if end is not None]
    else:
        value = words.change(1.0, 1.0 + found.value) if found.value else "0%"
        shown = [words.change(1.0, 1.0 + end) for end in (found.low, found.high) if end is not None]
    if len(shown) < 2 or found.low == found.high:
        return value, ""
    return value, " … ".join(shown)


def verdict(row: Row) -> tuple[str, str]:
    """A sign and a word for what a change says of B: the word carries the meaning, the sign repeats it."""
    if row.change.low is None:
        return "·", "no interval"
    return {"better": ("▲", "better"), "worse": ("▼", "worse"), "same": ("=", "same")}.get(
        row.says, ("○", "can’t tell")
    )


def headline(found: Comparison) -> tuple[str, str]:
    """The verdict on B, ``worse``, ``no worse``, ``can't tell`` or empty, and a sentence."""
    a, b = found.a.label, found.b.label
    parts = []
    judged = ""
    if found.accuracy:
        row = found.accuracy
        judged = row.verdict
        parts.append(
            f"{b} scores {words.percent(row.candidate.value)}, {a} {words.percent(row.baseline.value)}, on "
            f"{row.n} questions ({words.points(row.difference.value)} points, 95% interval "
            f"{words.interval(row.difference)}): {row.verdict}."
        )
        if row.items_needed:
            parts.append(f"About {words.questions(row.items_needed)} questions like these would tell.")
        worse = [task.task for task in found.tasks if task.verdict == "worse"]
        if worse and len(found.tasks) > 1:
            parts.append(f"Worse by {'itself' if len(worse) == 1 else 'themselves'}: {', '.join(worse)}.")
    else:
        parts.append(f"No questions were answered by both {b} and {a}.")
    speed = tested(found)
    told = [f"{name(row.metric)} {change(row)[0]}" for row in speed if claimed(row, speed)]
    if told:
        among = f" among {len(speed)} figures of speed" if len(speed) > 1 else ""
        rest = f" and {len(told) - TOLD} more" if len(told) > TOLD else ""
        parts.append(f"Beyond chance{among}: {', '.join(told[:TOLD])}{rest}.")
    elif speed:
        parts.append("No difference in speed is beyond chance, or the reports hold no intervals.")
    if found.regressions:
        judged = "worse"
    return judged, " ".join(parts)


def tested(found: Comparison) -> list[Row]:
    """The figures of speed that a headline may be about: TTFT, TPOT and throughput under each load."""
    names = {row.metric.name for row in found.rows}
    rate = "steady_output_tokens_per_s" if "steady_output_tokens_per_s" in names else "output_tokens_per_s"
    return [row for row in found.rows if row.metric.name in ("ttft_p50", "tpot_p50", rate) and not row.metric.shape]


def claimed(row: Row, among: Sequence[Row]) -> bool:
    """Whether a change of speed is beyond chance although so many were tested (Holm)."""
    known = [each for each in among if each.change.p_value is not None]
    adjusted = dict(zip(map(id, known), holm([each.change.p_value or 0.0 for each in known]), strict=True))
    return row.says in ("better", "worse") and adjusted.get(id(row), 0.0) < 0.05


#: What stands at the top of a comparison: name of the metric, and whether its last load counts, not its first.
_FIRST = (
    (("accuracy",), False),
    (("tpot_p50", "e2e_p50"), False),
    (("ttft_p50",), False),
    (("steady_output_tokens_per_s", "output_tokens_per_s", "requests_per_s"), True),
    (("weights_memory", "gpu_memory", "memory", "size_on_disk"), False),
)


def leading(found: Comparison) -> list[Row]:
    """The five figures that matter most, of those that both have: accuracy, time per token and to the first token under
    the first load, throughput under the last, memory."""
    chosen = []
    for names, last in _FIRST:
        for name in names:
            rows = [row for row in found.rows if row.metric.name == name and not row.metric.shape]
            if rows:
                chosen.append(rows[-1 if last else 0])
                break
    return chosen


def leading_lines(found: Comparison) -> list[Line]:
    """The same as lines."""
    return [Line(row.metric, name(row.metric), row.before, [row]) for row in leading(found)]


def split(found: Comparison) -> tuple[list[Line], list[Line]]:
    """All figures: those whose change has an interval, and the others."""
    every = lines([found], every=True)
    told = [line for line in every if line.rows[0] and line.rows[0].change.low is not None]
    return told, [line for line in every if line not in told]


def differences(found: Sequence[Comparison]) -> list[str]:
    """Why they can't be compared, each reason once."""
    return list(dict.fromkeys(line for comparison in found for line in comparison.differences))


def notes(found: Sequence[Comparison]) -> list[str]:
    """What else a reader should know, each thing once."""
    return list(dict.fromkeys(line for comparison in found for line in comparison.notes))


def accuracy(found: Comparison) -> list[AccuracyRow]:
    """Accuracy question by question, a row a task, all of them together last; none where it was not compared."""
    if found.accuracy is None:
        return []
    return [*map(accuracy_row, found.tasks), accuracy_row(found.accuracy, total=True)]


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that went from right to wrong (``lost``) or back.

    Attributes:
        right: the right answer.
        before: what A said.
        after: what B said.
        image: data URL of one of its images; None where neither report holds any.
    """

    task: str
    question: str
    right: str
    before: str
    after: str
    lost: bool
    image: str | None


def flips(found: Comparison, most: int) -> list[Flip]:
    """The questions that flipped, the first so many."""
    shown = []
    for before, after in found.flips[:most]:
        one, two = getattr(before, found.a.role), getattr(after, found.b.role)
        image = _image(found, after)
        lost = one.score >= RIGHT
        shown.append(Flip(after.task, after.question, words.golds(after), one.text, two.text, lost, image))
    return shown


def _image(found: Comparison, item: Item) -> str | None:
    """An image of the item that either report holds; they hold those of questions that flipped there."""
    held = [side.report.accuracy.thumbnails for side in (found.a, found.b) if side.report.accuracy]
    return next((known[sha] for known in held for sha in item.images if sha in known), None)
