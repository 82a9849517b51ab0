"""report.md: the tables, for a pull request or a terminal."""

from __future__ import annotations

from bench.report.schema import Report
from bench.report.view.speed import Spread
from bench.report.view.whole import HEADINGS, View, view
from toolkit.tables import markdown as table

__all__ = ["render"]

#: Rows and characters a cell: a comment on a pull request holds 65,536.
FLIPS_SHOWN, BRIEF = 60, 160


def render(report: Report) -> str:
    """Return the report as markdown."""
    shown = view(report)
    parts = [
        f"# {shown.title}",
        _verdicts(shown),
        f"Measured {shown.created} UTC in {shown.duration} s on {shown.machine}.",
    ]
    if report.warnings:
        parts.append("\n".join(f"- Note: {warning}." for warning in report.warnings))
    if shown.failures:
        head = ["system", "phase", "kind", "count", "message"]
        parts += [f"## {HEADINGS['failures']}", table(head, shown.failures)]
    parts += _accuracy(shown)
    if report.fidelity:
        rows = [[name, *values] for name, values in shown.drift]
        head = ["", shown.labels[1], f"{shown.labels[0]}, asked again"]
        parts += [f"## {HEADINGS['fidelity']}", shown.fidelity, table(head, rows)]
    parts += _speed(shown)
    if any(system.disk_bytes or system.memory.kv_cache_tokens for system in report.systems.values()):
        parts += ["## Size", table(["", *shown.labels], [[size.name, *size.values] for size in shown.sizes])]
    parts += ["## How it was measured", shown.workload, f"    {report.environment.command}"]
    parts.append("\n".join(f"- {definition}" for definition in report.definitions.values()))
    return "\n\n".join(parts) + "\n"


def _verdicts(shown: View) -> str:
    """What is judged, a line each."""
    lines = [f"- **{part.what}: {part.word}.** {part.sentence}" for part in shown.judged]
    if not lines or shown.verdict.status in ("failed", "partial"):
        lines.insert(0, f"**{shown.verdict.sentence}**" + ("\n" if lines else ""))
    return "\n".join(lines)


def _accuracy(shown: View) -> list[str]:
    if not shown.accuracy:
        return []
    rows = [
        [
            row.task,
            row.verdict + (f" (needs {row.needs})" if row.needs else ""),
            str(row.n) + (f" in {row.clusters} clusters" if row.clusters is not None else ""),
            *map(str, (row.baseline, row.candidate, row.difference, row.recovery)),
            f"{row.lost} / {row.won}",
            row.p,
        ]
        for row in shown.accuracy
    ]
    head = ["task", "verdict", "n", *shown.labels, "difference, points", "recovery", "lost / won", "p"]
    parts = [
        f"## {HEADINGS['accuracy']}",
        table(head, rows),
        "Intervals are 95%. Lost: right before, wrong now; won: the other way. "
        f"p is adjusted for the number of tasks; verdicts are against a margin of {shown.margin}.",
    ]
    return parts + ([f"## {HEADINGS['flips']}", *_flips(shown)] if shown.flips else [])


def _flips(shown: View) -> list[str]:
    """The answers that flipped, as a table, and how many more there are."""
    rows = [
        [flip.flip, flip.id, *map(_brief, (flip.question, flip.right, *(said.brief for said in flip.said)))]
        for flip in shown.flips[:FLIPS_SHOWN]
    ]
    parts = [table(["", "item", "question", "right answer", *shown.labels], rows)]
    if len(shown.flips) > FLIPS_SHOWN:
        parts.append(f"{len(shown.flips) - FLIPS_SHOWN} more, and the images, are in report.html.")
    return parts


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…"


def _speed(shown: View) -> list[str]:
    if not shown.speed:
        return []
    rows = [
        [
            row.load,
            row.system,
            *map(_three, row.latencies),
            row.tokens_per_s,
            row.requests_per_s,
            f"{row.completed}",
            ", ".join(filter(None, (row.kept, row.marks))),
        ]
        for row in shown.speed
    ]
    head = ["load", "system", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms", "tokens/s", "requests/s", "n", ""]
    parts = [
        f"## {HEADINGS['speed']}",
        table(head, rows),
        "Each cell: p50, the median of the rounds', / p90 / p99 over all rounds, where there are enough requests. "
        "Throughput of closed loops is without each round's end.",
    ]
    if shown.ratios.rows:
        rows = [[load, *map(str, cells)] for load, cells in shown.ratios.rows]
        parts.append(table(["load", *shown.ratios.head], rows))
        parts.append("Candidate / baseline; of latencies their p50, below 1 is faster. 95%.")
    if shown.counted.head:
        rows = [[row.load, row.system, *cells] for row, cells in shown.counted.rows]
        parts.append(table(["load", "system", *shown.counted.head], rows))
    return parts


def _three(found: Spread | None) -> str:
    return "–" if found is None else " / ".join(filter(None, (found.p50, found.p90, found.p99)))
