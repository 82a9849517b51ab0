"""The tables of a report in the terminal."""

from __future__ import annotations

from rich.console import Console

from bench.report.schema import Report
from bench.report.view.whole import HEADINGS, View, view
from toolkit.tables import table

__all__ = ["show"]

#: Of the ratios, those that fit into a terminal; report.html has all.
BRIEF = ("TTFT", "TPOT", "E2E", "output tokens/s", "goodput")
RATIOS = "Candidate / baseline (95% over rounds)"


def show(report: Report, console: Console) -> None:
    """Print accuracy and verdict by task, fidelity, speed by load, size, and the verdict over all."""
    shown = view(report)
    if shown.accuracy:
        _accuracy(shown, console)
    if report.fidelity:
        names = ["", shown.labels[1], f"{shown.labels[0]}, asked again"]
        drift = table(names, (1, 2), title=HEADINGS["fidelity"])
        for name, values in shown.drift:
            drift.add_row(name, *values)
        console.print(drift, "")
    if shown.speed:
        _speed(shown, console)
    if any(system.disk_bytes for system in report.systems.values()):
        sizes = table(["", *shown.labels], (1, 2), title="Size")
        for size in shown.sizes:
            if size.short and (size.known or size.always):
                sizes.add_row(size.short, *size.values)
        console.print(sizes, "")
    if not shown.judged or shown.verdict.status in ("failed", "partial"):
        console.print(shown.verdict.sentence, markup=False, highlight=False)
    for part in shown.judged:
        console.print(f"{part.what}: {part.word}. ", style="bold", end="", markup=False, highlight=False)
        console.print(part.sentence, markup=False, highlight=False)


def _accuracy(shown: View, console: Console) -> None:
    names = ["task", "n", *shown.labels, "points", "95% interval", "lost/won", "verdict"]
    accuracy = table(names, range(1, len(names)), title=HEADINGS["accuracy"])
    for row in shown.accuracy:
        cells = [row.task, str(row.n), row.baseline.value, row.candidate.value]
        cells += [row.difference.value, row.difference.interval, f"{row.lost}/{row.won}", row.verdict]
        accuracy.add_row(*cells, style="bold" if row.total else None)
    console.print(accuracy, "")


def _speed(shown: View, console: Console) -> None:
    names = ["load", "system", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms", "tokens/s", "req/s", ""]
    speed = table(names, range(1, len(names)), title=f"{HEADINGS['speed']} (p50)")
    for row in shown.speed:
        latencies = [latency.p50 if latency else "–" for latency in row.latencies]
        speed.add_row(row.load, row.system, *latencies, row.tokens_per_s, row.requests_per_s, row.marks or row.kept)
        for shape, cells in row.shapes:
            speed.add_row("", f"  {shape}", *cells, "", "", "")
    console.print(speed, "")
    if shown.ratios.rows:
        kept = [at for at, head in enumerate(shown.ratios.head) if head in BRIEF]
        ratios = table(["load", *(shown.ratios.head[at] for at in kept)], range(1, 1 + len(kept)), title=RATIOS)
        for load, found in shown.ratios.rows:
            ratios.add_row(load, *(str(found[at]) for at in kept))
        console.print(ratios, "")
