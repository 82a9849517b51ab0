"""What the candidate is judged by, each by itself: accuracy, speed, memory."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import words
from bench.report.schema import Report, SystemInfo
from bench.roles import ROLES

__all__ = ["Judged", "judged", "name"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One of the three.

    Attributes:
        what: ``Accuracy``, ``Speed`` or ``Memory``.
        tone: ``good``, ``bad`` or ``open``: its colour, which only repeats what the words say.
        word: the verdict.
        sentence: what it stands on.
    """

    what: str
    tone: str
    word: str
    sentence: str


def name(system: SystemInfo) -> str:
    """What a system is called with its format and kernel: ``7b-awq (AWQ 4 bits, group 128, Marlin)``."""
    form = system.quantization or ""
    form = form.replace("awq", "AWQ").replace(", gemm", "").replace(", gemv", " GEMV")
    form = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "unknown": ""}.get(form, form)
    known = system.label.lower()
    parts = [part for part in (form, system.kernel or "") if part and part.lower() not in known]
    return f"{system.label} ({', '.join(parts)})" if parts else system.label


def judged(report: Report) -> list[Judged]:
    """Return the verdicts on what was measured; none for a failed run."""
    if report.status == "failed":
        return []
    return [part for part in (_accuracy(report), _speed(report), _memory(report)) if part]


def _accuracy(report: Report) -> Judged:
    if report.accuracy is None:
        return Judged("Accuracy", "open", "not measured", report.verdict.sentence)
    rows = report.accuracy.tasks
    word: str = report.verdict.accuracy or "not complete"
    tone = {"no worse": "good", "worse": "bad"}.get(word, "open")
    tasks = [row.task for row in rows if row.verdict == "worse"] if len(rows) > 1 else []
    if tasks and word != "worse":
        word, tone = f"{word} over all, worse in {', '.join(tasks)}", "bad"
    return Judged("Accuracy", tone, word, report.verdict.sentence)


def _speed(report: Report) -> Judged | None:
    if not report.verdict.speed:
        return None
    said = {words.told(ratio) for ratio in report.speed_ratios if ratio.headline} - {""}
    if not said:
        return Judged("Speed", "open", "no interval", report.verdict.speed)
    if {"better", "worse"} <= said:
        return Judged("Speed", "open", "better and worse", report.verdict.speed)
    for word, shown, tone in (("worse", "slower", "bad"), ("better", "faster", "good")):
        if word in said:
            return Judged("Speed", tone, shown, report.verdict.speed)
    return Judged("Speed", "open", "not told apart", report.verdict.speed)


def _memory(report: Report) -> Judged | None:
    """Of weights in memory, else of the whole server, else of the disk: the first that is known of both."""
    base, cand = (report.systems[role] for role in ROLES)
    kinds = (
        ("weights in memory", base.memory.weights_bytes, cand.memory.weights_bytes),
        ("the server's host memory", base.memory.host_bytes, cand.memory.host_bytes),
        ("checkpoint on disk", base.disk_bytes, cand.disk_bytes),
    )
    known = [(what, before, after) for what, before, after in kinds if before and after]
    if not known:
        return None
    _, before, after = known[0]
    ratio = after / before
    word, tone = ("less", "good") if ratio < 0.99 else ("more", "bad") if ratio > 1.01 else ("the same", "open")
    said = [f"{words.gib(b)} to {words.gib(a)} ({words.ratio(a / b)}) for {w}" for w, b, a in known]
    return Judged("Memory", tone, word, f"From {said[0]}" + "".join(f", {more}" for more in said[1:]) + ".")
