"""Figures as people read them, the same in the terminal, markdown and HTML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from bench.report.headlines import throughput
from bench.report.schema import (
    Accuracy,
    Answer,
    Difference,
    Drift,
    Fidelity,
    Item,
    Report,
    Share,
    SpeedPoint,
    SpeedRatio,
)
from bench.roles import Role

__all__ = [
    "answer",
    "change",
    "count",
    "drift_rows",
    "failure_sentence",
    "gib",
    "golds",
    "interval",
    "limit",
    "marks",
    "milliseconds",
    "nats",
    "number",
    "p_value",
    "partial_sentence",
    "percent",
    "points",
    "questions",
    "ratio",
    "ratio_interval",
    "sentence",
    "small_interval",
    "speed_sentence",
    "told",
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


def count(value: int | None) -> str:
    """``1,234``; a dash for None."""
    return "–" if value is None else f"{value:,}"


def marks(point: SpeedPoint) -> str:
    """What is wrong with a point, in few words; empty when nothing is."""
    found = ["invalid"] if point.invalid else []
    found += [f"{sum(point.errors.values())} failed"] if point.errors else []
    found += ["stopped"] if point.stopped else []
    found += ["burst"] if point.burst else []
    found += [f"{point.retries} retries"] if point.retries else []
    if point.kept is False and point.load.has_rate:
        found.append(f"{number(point.achieved_per_s or 0.0)}/s achieved")
    return ", ".join(found)


def drift_rows(found: Fidelity) -> list[tuple[str, list[str]]]:
    """Every measure of fidelity that there is, of the candidate and of the baseline asked again."""

    def row(name: str, of: Callable[[Drift], str | None]) -> tuple[str, list[str]]:
        return name, [(of(drift) if drift else None) or "–" for drift in (found.candidate, found.noise)]

    def share(part: Share | None) -> str | None:
        return f"{percent(part.value)} ({interval(part)})" if part else None

    def small(part: Share | None) -> str | None:
        return f"{nats(part.value)} ({small_interval(part)})" if part else None

    def plain(part: Share | None) -> str | None:
        return f"{part.value:.3f} ({part.low:.3f}–{part.high:.3f})" if part else None

    rows = [
        row("mean KL, nats a token", lambda drift: small(drift.mean_kl)),
        row("trimmed KL, nats a token", lambda drift: small(drift.trimmed_kl)),
        row("geometric KL, nats a token", lambda drift: small(drift.geometric_kl)),
        row("p99 KL", lambda drift: small(drift.p99_kl)),
        row("top-1 agreement", lambda drift: share(drift.top1_agreement)),
        row("delta-p, 1st percentile", lambda drift: small(drift.delta_p.get("1"))),
        row("delta-p, median", lambda drift: small(drift.delta_p.get("50"))),
        row("perplexity ratio", lambda drift: plain(drift.perplexity_ratio)),
        row("identical answers", lambda drift: share(drift.identical)),
        row("first divergence, tokens", lambda drift: small(drift.first_divergence)),
        row("tokens scored", lambda drift: f"{drift.tokens:,} of {drift.scored} answers" if drift.tokens else None),
    ]
    return [(name, values) for name, values in rows if values != ["–", "–"]]


def ratio(value: float) -> str:
    """``×0.87``."""
    return f"×{value:.2f}"


def ratio_interval(low: float | None, high: float | None) -> str:
    """``0.81–0.93``; a dash where there is no interval."""
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"


def nats(value: float) -> str:
    """A divergence with two significant digits: ``0.00035``, ``0.012``, ``1.2``."""
    if value == 0:
        return "0"
    decimals = max(1, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 7)}f}".replace("-", MINUS)


def small_interval(part: Share) -> str:
    """The 95% interval of a divergence or another small figure."""
    return f"{nats(part.low)}–{nats(part.high)}"


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


def speed_sentence(ratios: Sequence[SpeedRatio]) -> str | None:
    """The verdict on speed in a sentence: time per token under the first load, and throughput, of the headlines; None
    where there are none."""
    chosen = [ratio for ratio in ratios if ratio.headline]
    first = next((r for name in ("tpot", "e2e", "ttft") for r in chosen if r.metric == name), None)
    last = throughput(chosen)
    said = []
    if first:
        what = {"tpot": "Time per token", "e2e": "End-to-end latency"}.get(first.metric, "Time to first token")
        said.append(f"{what} is {_compared(first, 'shorter', 'longer', below=True)} at {first.load}")
    if last:
        what = "output tokens/s" if "tokens" in last.metric else "requests/s"
        name = "throughput" if first else "Throughput"
        said.append(f"{name} ({what}) is {_compared(last, 'higher', 'lower', below=False)} at {last.load}")
    return f"{', '.join(said)}." if said else None


def told(found: SpeedRatio) -> str:
    """``better``, ``worse`` or ``not told apart``; empty where there is no interval."""
    if found.low is None:
        return ""
    if not found.beyond_chance:
        return "not told apart"
    below = found.metric in ("ttft", "tpot", "itl", "e2e")
    return "better" if (found.ratio < 1.0) == below else "worse"


def _compared(found: SpeedRatio, better: str, worse: str, *, below: bool) -> str:
    """A ratio in words, which claim a difference only where it is beyond chance."""
    if found.low is None or found.high is None:
        return f"{ratio(found.ratio)} (no interval)"
    shown = f"{ratio(found.ratio)}, 95%: {ratio_interval(found.low, found.high)}"
    if not found.beyond_chance:
        return f"not told apart ({shown})"
    return f"{better if (found.ratio < 1.0) == below else worse} ({shown})"


def partial_sentence(missing: Sequence[str], said: str | None) -> str:
    """What an interrupted run lacks, and what it says so far."""
    so_far = f" So far: {said}" if said else ""
    return f"The run was interrupted and is not complete: {'; '.join(missing)} missing.{so_far}"


def failure_sentence(report: Report) -> str:
    """What went wrong in a failed run, in one sentence."""
    total = sum(failed.count for failed in report.failures)
    first = report.failures[0]
    requests = "1 request" if total == 1 else f"{total} requests"
    return (
        f"The run failed and has no figures: {requests} failed; most often, to the {first.role} during {first.phase}: "
        f"{first.kind}: {first.message}"
    )
