"""Figures as people read them, the same in the terminal, markdown and HTML."""

from __future__ import annotations

from collections import Counter

from bench.report.model import Accuracy, Answer, Difference, Item, Report, Role, Share

__all__ = [
    "answer",
    "change",
    "failure_sentence",
    "gib",
    "golds",
    "interval",
    "limit",
    "milliseconds",
    "number",
    "p_value",
    "percent",
    "points",
    "questions",
    "ratio",
    "sentence",
]

MINUS = "\u2212"


def number(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent: 1234, 123, 12.3, 1.23, 0.123."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    decimals = max(0, digits - (len(str(int(magnitude))) if magnitude >= 1 else 0))
    return f"{value:,.{min(decimals, 4)}f}".replace("-", MINUS)


def milliseconds(value: float | None) -> str:
    """``12.3 ms``; a dash for None."""
    return "–" if value is None else f"{number(value)} ms"


def percent(share: float | None) -> str:
    """A fraction of 1 as ``96.5%``."""
    return "–" if share is None else f"{100 * share:.1f}%"


def points(difference: float) -> str:
    """A difference of fractions as signed percentage points, ``−0.5`` or ``+1.0``."""
    text = f"{100 * difference:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def interval(part: Share | Difference) -> str:
    """The 95% interval of a share (``94.0–98.1``) or of a difference (``−2.1 … +1.1``), in percent or points."""
    if isinstance(part, Difference):
        return f"{points(part.low)}\u00a0…\u00a0{points(part.high)}"
    return f"{100 * part.low:.1f}–{100 * part.high:.1f}"


def p_value(p: float) -> str:
    """``0.034``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def gib(size: int | None) -> str:
    """Bytes as MiB or GiB."""
    if size is None:
        return "–"
    return f"{number(size / 2**30)} GiB" if size >= 2**30 else f"{number(size / 2**20)} MiB"


def ratio(value: float) -> str:
    """``×0.87``."""
    return f"×{value:.2f}"


def change(before: float, after: float) -> str:
    """A relative change, ``+12%`` or ``−3.4%``."""
    if before == 0:
        return "–"
    percentage = 100 * (after - before) / before
    text = f"{percentage:+.0f}%" if abs(percentage) >= 10 else f"{percentage:+.1f}%"
    return text.replace("-", MINUS)


def questions(count: int) -> str:
    """A number of questions that was estimated: two significant digits, rounded up."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // step) * step:,}"


def limit(margin: float) -> str:
    """A margin, a fraction of 1, as ``1 point`` or ``0.5 points``."""
    return f"{100 * margin:g} point{'' if 100 * margin == 1 else 's'}"


def golds(item: Item) -> str:
    """The right answers of an item; what several people said is counted."""
    if item.metric != "vqa":
        return " / ".join(item.answers)
    return ", ".join(f"{said} (×{count})" for said, count in Counter(item.answers).most_common())


def answer(given: Answer) -> str:
    """What a system answered, with what there is to know about it."""
    text = given.text.strip() or "(empty)"
    remarks = [given.note] if given.note else []
    remarks += ["cut at the token limit"] if given.finish_reason == "length" else []
    return f"{text} [{'; '.join(remarks)}]" if remarks else text


def sentence(found: Accuracy | None, margin: float, labels: dict[Role, str]) -> str:
    """The verdict on accuracy in a sentence or two."""
    if found is None:
        return "Accuracy was not measured."
    row = found.overall
    d = row.difference
    text = (
        f"{labels['candidate']} scores {percent(row.candidate.value)}, {labels['baseline']} "
        f"{percent(row.baseline.value)}, on {row.n} questions ({points(d.value)} points, 95% interval {interval(d)}): "
    )
    if row.verdict == "worse":
        text += "a loss beyond chance."
    elif row.verdict == "no worse":
        text += f"a loss of more than {limit(margin)} is ruled out{', a smaller one is there' * (d.high < 0)}."
    else:
        text += f"no loss is shown, and one of more than {limit(margin)} is not ruled out."
        if row.items_needed:
            text += f" About {questions(row.items_needed)} questions like these would tell."
    worse = [task.task for task in found.tasks if task.verdict == "worse"]
    if worse and len(found.tasks) > 1:
        text += f" Worse by {'itself' if len(worse) == 1 else 'themselves'}: {', '.join(worse)}."
    return text


def failure_sentence(report: Report) -> str:
    """What went wrong in a failed run, in one sentence."""
    total = sum(failed.count for failed in report.failures)
    first = report.failures[0]
    requests = "1 request" if total == 1 else f"{total} requests"
    return (
        f"The run failed and has no figures: {requests} failed; first, to the {first.role} during {first.phase}: "
        f"{first.kind}: {first.message}"
    )
