"""Figures as people read them, the same in the terminal, markdown and HTML."""

from __future__ import annotations

from bench.report.model import Difference, Report, Role, Share, TaskAccuracy

__all__ = ["change", "gib", "interval", "milliseconds", "number", "p_value", "percent", "points", "ratio", "sentence"]

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


def sentence(overall: TaskAccuracy | None, accuracy_verdict: str | None, margin: float, labels: dict[Role, str]) -> str:
    """The verdict on accuracy in one sentence."""
    if overall is None or accuracy_verdict is None:
        return "Accuracy was not measured."
    d = overall.difference
    scores = (
        f"{labels['candidate']} scores {percent(overall.candidate.value)}, {labels['baseline']} "
        f"{percent(overall.baseline.value)}, on {overall.n} questions "
        f"({points(d.value)} points, 95% interval {interval(d)})"
    )
    if accuracy_verdict == "worse":
        return f"{scores}: a loss beyond chance."
    if accuracy_verdict == "no worse":
        return f"{scores}: a loss of more than {100 * margin:g} points is ruled out."
    if d.smallest_detectable >= 1:
        return f"{scores}: so few questions can show no loss at all."
    shown = 100 * d.smallest_detectable
    return f"{scores}: no loss shown, none ruled out; this many questions show losses from about {shown:.1f} points on."


def failure_sentence(report: Report) -> str:
    """What went wrong in a failed run, in one sentence."""
    total = sum(failed.count for failed in report.failures)
    first = report.failures[0]
    requests = "1 request" if total == 1 else f"{total} requests"
    return (
        f"The run failed and has no figures: {requests} failed; first, to the {first.role} during {first.phase}: "
        f"{first.kind}: {first.message}"
    )
