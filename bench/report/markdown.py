"""report.md: the tables, for a pull request or a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import words
from bench.report.model import Distribution, Report, Role, SystemInfo

__all__ = ["render"]

#: Rows and characters a cell: a comment on a pull request holds 65,536.
FLIPS_SHOWN, BRIEF = 60, 160
ROLES: tuple[Role, ...] = ("baseline", "candidate")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        # An answer may hold anything; it must neither end a cell nor be taken for a tag.
        plain = (cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(plain) + " |"

    return "\n".join([line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)])


def render(report: Report) -> str:
    """Return the report as markdown."""
    base, cand = report.systems["baseline"], report.systems["candidate"]
    parts = [
        f"# {cand.label} against {base.label}",
        f"**{report.verdict.sentence}**",
        f"Measured {report.created:%Y-%m-%d %H:%M} UTC in {report.duration_s:.0f} s on {_machine(report)}.",
    ]
    if report.warnings:
        parts.append("\n".join(f"- Note: {warning}." for warning in report.warnings))
    if report.failures:
        rows = [[f.role, f.phase, f.kind, str(f.count), f.message] for f in report.failures]
        parts += ["## Failed requests", _table(["system", "phase", "kind", "count", "message"], rows)]
    if report.accuracy:
        parts += [
            "## Accuracy",
            accuracy_table(report),
            "Intervals are 95%. Lost: right before, wrong now; won: the other way. "
            "p is adjusted for the number of tasks; verdicts are against a margin of "
            f"{words.limit(report.verdict.margin)}.",
        ]
        if report.accuracy.flipped:
            parts += ["## Answers that changed between right and wrong", *flips(report)]
    if report.speed:
        parts += ["## Speed", speed_table(report), "Each cell: p50 / p90 / p99."]
    if base.booted or cand.booted:
        parts += ["## Size", size_table(report)]
    parts += ["## How it was measured", workload_text(report), f"    {report.environment.command}"]
    parts.append("\n".join(f"- {definition}" for definition in report.definitions.values()))
    return "\n\n".join(parts) + "\n"


def _machine(report: Report) -> str:
    return "; ".join(report.environment.gpus) or report.environment.cpu


def accuracy_table(report: Report) -> str:
    """Accuracy of both systems by task, the overall row last."""
    assert report.accuracy
    rows = []
    for row in [*report.accuracy.tasks, report.accuracy.overall]:
        d = row.difference
        rows.append(
            [
                row.task,
                row.verdict + (f" (needs {words.questions(row.items_needed)})" if row.items_needed else ""),
                str(row.n) + (f" in {row.clusters} clusters" if row.clusters < row.n else ""),
                f"{words.percent(row.baseline.value)} ({words.interval(row.baseline)})",
                f"{words.percent(row.candidate.value)} ({words.interval(row.candidate)})",
                f"{words.points(d.value)} ({words.interval(d)})",
                f"{words.percent(row.recovery.value)} ({words.interval(row.recovery)})" if row.recovery else "–",
                f"{d.lost} / {d.won}",
                words.p_value(row.p_adjusted),
            ]
        )
    base, cand = report.systems["baseline"].label, report.systems["candidate"].label
    return _table(["task", "verdict", "n", base, cand, "difference, points", "recovery", "lost / won", "p"], rows)


def flips(report: Report) -> list[str]:
    """The answers that flipped, as a table, and how many more there are."""
    assert report.accuracy
    flipped = report.accuracy.flipped
    rows = [
        [
            item.flip or "",
            item.id,
            _brief(item.question),
            _brief(words.golds(item)),
            *(_brief(words.answer(getattr(item, role))) for role in ROLES),
        ]
        for item in flipped[:FLIPS_SHOWN]
    ]
    labels = [report.systems[role].label for role in ROLES]
    parts = [_table(["", "item", "question", "right answer", *labels], rows)]
    if len(flipped) > FLIPS_SHOWN:
        parts.append(f"{len(flipped) - FLIPS_SHOWN} more, and the pictures, are in report.html.")
    return parts


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…"


def _three(distribution: Distribution | None) -> str:
    if distribution is None:
        return "–"
    return " / ".join(words.number(value) for value in (distribution.p50, distribution.p90, distribution.p99))


def speed_table(report: Report) -> str:
    """Latency and throughput of both systems by concurrency."""
    rows = []
    for concurrency in report.workload.concurrencies:
        for role in ROLES:
            point = report.point(role, concurrency)
            if point is None:
                continue
            rows.append(
                [
                    f"{concurrency}",
                    report.systems[role].label,
                    _three(point.ttft_ms),
                    _three(point.tpot_ms),
                    _three(point.itl_ms),
                    _three(point.e2e_ms),
                    "–" if point.output_tokens_per_s is None else words.number(point.output_tokens_per_s),
                    words.number(point.requests_per_s),
                ]
            )
    head = ["in flight", "system", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms", "tokens/s", "requests/s"]
    return _table(head, rows)


def size_table(report: Report) -> str:
    """Disk and memory of both systems."""
    systems: list[SystemInfo] = [report.systems[role] for role in ROLES]
    rows = [
        ["stored as", *(s.quantization or "–" for s in systems)],
        ["checkpoint on disk", *(words.gib(s.disk_bytes) for s in systems)],
        ["of it weights", *(words.gib(s.disk_weights_bytes) for s in systems)],
        ["server, host memory", *(words.gib(s.memory.host_bytes) for s in systems)],
        ["server, GPU memory", *(words.gib(s.memory.gpu_bytes) for s in systems)],
        ["weights in memory", *(words.gib(s.memory.weights_bytes) for s in systems)],
    ]
    return _table(["", *(s.label for s in systems)], rows)


def _counts(counts: Sequence[int]) -> str:
    """``24``, or ``96 to 288``."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def workload_text(report: Report) -> str:
    """What was asked, in a few sentences."""
    work = report.workload
    text = []
    if work.questions:
        text.append(
            f"{work.questions} questions ({work.tasks_source}), temperature 0, natural end, "
            f"at most {work.answer_tokens} tokens, {work.question_concurrency} in flight."
        )
    if work.concurrencies:
        text.append(
            f"Load: {_counts(work.requests)} requests a point and system in {work.rounds} rounds, closed loop, "
            f"pictures of {', '.join(work.image_sizes)}, exactly {work.output_tokens} output tokens (end-of-text is "
            "ignored). "
            "Every picture and prompt is new to the server, warm-up inputs are others."
        )
    turns = "in turns, a few questions or one block of load each" if work.interleaved else "one after the other"
    text.append(f"The systems were measured {turns}. Seed {work.seed}.")
    return " ".join(text)
