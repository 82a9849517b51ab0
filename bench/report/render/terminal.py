"""The tables of a report in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.report import words
from bench.report.schema import Report
from bench.roles import ROLES

__all__ = ["show"]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def show(report: Report, console: Console) -> None:
    """Print accuracy and verdict by task, fidelity, speed by load, size, and the verdict over all."""
    base, cand = (report.systems[role].label for role in ROLES)
    if report.accuracy:
        table = _table("Accuracy", "task", "n", base, cand, "points", "95% interval", "lost/won", "verdict")
        for row in [*report.accuracy.tasks, report.accuracy.overall]:
            d = row.difference
            table.add_row(
                row.task,
                str(row.n),
                words.percent(row.baseline.value),
                words.percent(row.candidate.value),
                words.points(d.value),
                words.interval(d),
                f"{d.lost}/{d.won}",
                row.verdict,
                style="bold" if row is report.accuracy.overall else None,
            )
        console.print(table, "")
    if report.fidelity:
        table = _table("Fidelity", "", cand, f"{base}, asked again")
        for name, values in words.drift_rows(report.fidelity):
            table.add_row(name, *values)
        console.print(table, "")
    if report.speed:
        table = _table(
            "Speed (p50)", "load", "system", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms", "tokens/s", "req/s", ""
        )
        for point in report.speed:
            table.add_row(
                point.load.name,
                report.systems[point.role].label,
                *(
                    words.number(latency.p50) if latency else "–"
                    for latency in (point.ttft_ms, point.tpot_ms, point.itl_ms, point.e2e_ms)
                ),
                words.number(point.output_tokens_per_s) if point.output_tokens_per_s else "–",
                words.number(point.requests_per_s),
                words.marks(point),
            )
        console.print(table, "")
    systems = [report.systems[role] for role in ROLES]
    if any(system.disk_bytes for system in systems):
        table = _table("Size", "", base, cand)
        table.add_row("stored as", *(system.quantization or "–" for system in systems))
        table.add_row("on disk", *(words.gib(system.disk_bytes) for system in systems))
        table.add_row("host memory", *(words.gib(system.memory.host_bytes) for system in systems))
        if any(system.memory.gpu_bytes for system in systems):
            table.add_row("GPU memory", *(words.gib(system.memory.gpu_bytes) for system in systems))
        if any(system.memory.weights_bytes for system in systems):
            table.add_row("weights in memory", *(words.gib(system.memory.weights_bytes) for system in systems))
        if any(system.memory.kv_cache_tokens for system in systems):
            table.add_row("KV cache, tokens", *(words.count(system.memory.kv_cache_tokens) for system in systems))
        console.print(table, "")
    if report.verdict.accuracy:
        console.print(f"{report.verdict.accuracy}: ", style="bold", end="", markup=False)
    console.print(report.verdict.sentence, markup=False, highlight=False)
    if report.verdict.speed:
        console.print(report.verdict.speed, markup=False, highlight=False)
