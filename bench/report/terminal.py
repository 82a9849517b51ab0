"""The tables of a report and of a comparison in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.report import words
from bench.report.compare import Comparison, Metric
from bench.report.model import Report, Role

__all__ = ["show", "show_comparison"]

ROLES: tuple[Role, ...] = ("baseline", "candidate")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def show(report: Report, console: Console) -> None:
    """Print accuracy and verdict by task, speed by concurrency, size, and the verdict over all."""
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
    if report.speed:
        table = _table(
            "Speed (p50)", "in flight", "system", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms", "tokens/s", "req/s"
        )
        for concurrency in report.workload.concurrencies:
            for role in ROLES:
                point = report.point(role, concurrency)
                if point is None:
                    continue
                table.add_row(
                    str(concurrency),
                    report.systems[role].label,
                    words.number(point.ttft_ms.p50),
                    words.number(point.tpot_ms.p50) if point.tpot_ms else "–",
                    words.number(point.itl_ms.p50) if point.itl_ms else "–",
                    words.number(point.e2e_ms.p50),
                    words.number(point.output_tokens_per_s) if point.output_tokens_per_s else "–",
                    words.number(point.requests_per_s),
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
        console.print(table, "")
    if report.verdict.accuracy:
        console.print(f"{report.verdict.accuracy}: ", style="bold", end="", markup=False)
    console.print(report.verdict.sentence, markup=False, highlight=False)


def _shown(metric: Metric, value: float) -> str:
    if metric.name.startswith("accuracy"):
        return words.percent(value)
    if metric.name in ("size_on_disk", "memory", "gpu_memory", "weights_memory"):
        return words.gib(round(value))
    return words.number(value)


def show_comparison(comparison: Comparison, console: Console, *, every: bool = False) -> None:
    """Print A, B and the change for each figure both have; p90 and p99 only with ``every``."""
    table = _table("", "", f"A: {comparison.a.label}", f"B: {comparison.b.label}", "change")
    for metric, before, after in comparison.rows:
        if not every and metric.name.endswith(("_p90", "_p99")):
            continue
        accuracy = metric.name.startswith("accuracy")
        change = f"{words.points(after - before)} points" if accuracy else words.change(before, after)
        table.add_row(str(metric), _shown(metric, before), _shown(metric, after), change)
    console.print(table, "")
    if comparison.accuracy:
        table = _table("Accuracy, item by item", "task", "n", "points", "95% interval", "lost/won", "p", "verdict")
        for row in [*comparison.tasks, comparison.accuracy]:
            d = row.difference
            table.add_row(
                row.task,
                str(row.n),
                words.points(d.value),
                words.interval(d),
                f"{d.lost}/{d.won}",
                words.p_value(row.p_adjusted),
                row.verdict,
                style="bold" if row is comparison.accuracy else None,
            )
        console.print(table)
