"""The verbs that read reports: compare and schema. Heavy imports live inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["FAIL_IF", "exit_on", "register"]

_PANEL = "Measurement"
FAIL_IF = (
    "Exit 1 when this change is seen: METRIC OP CHANGE, such as 'accuracy<-1pt', 'tpot_p50@4>+5%' (at 4 in flight; "
    "without @ at any) or 'size_on_disk>0%'. Metrics: accuracy, accuracy.TASK, ttft_p50 (tpot, itl, e2e; p90, p99), "
    "output_tokens_per_s, requests_per_s, size_on_disk, memory, gpu_memory, weights_memory. OP: < <= > >=. Units: % "
    "(relative), pt (points of accuracy), ms. Repeatable."
)


def register(app: typer.Typer) -> None:
    """Add the verbs to ``app``."""
    app.command(rich_help_panel=_PANEL)(compare)
    app.command(rich_help_panel=_PANEL)(schema)


def compare(
    a: Annotated[Path, typer.Argument(help="Report directory or report.json to compare with.")],
    b: Annotated[Path, typer.Argument(help="Report that is judged.")],
    fail_if: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help=FAIL_IF)] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Test conditions although the questions, the load or the machine differ.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show p90 and p99 too.")] = False,
) -> None:
    """Compare the candidate of report A with the candidate of report B; changes are B relative to A.

    Exits 1 on a regression: a --fail-if condition that is met or, without any, an accuracy worse beyond chance, over
    all questions or in one task.

    Worse beyond chance: paired by question, the 95% interval lies below zero and reaches past the margin, and p < 5%.

    Exits 2 when the two can't be compared.
    """
    from bench.report import json, terminal
    from bench.report.compare import Side, parse_condition
    from bench.report.compare import compare as compare_sides
    from toolkit.console import out as stdout
    from toolkit.console import warn

    conditions = [parse_condition(text) for text in fail_if or []]
    reports = {path: json.read(path) for path in (a, b)}
    for path, report in reports.items():
        if json.UPGRADED in report.warnings:
            warn(f"{path}: {json.UPGRADED}")
    found = compare_sides(Side(reports[a], "candidate"), Side(reports[b], "candidate"), conditions, anyway=anyway)
    for difference in found.differences:
        warn(f"the reports differ: {difference}")
    terminal.show_comparison(found, stdout, every=every)
    worse = [] if conditions or found.accuracy is None else [*found.tasks, found.accuracy]
    losses = [f"accuracy ({row.task}) is worse beyond chance" for row in worse if row.verdict == "worse"]
    exit_on([*found.regressions, *losses])


def schema() -> None:
    """Print the JSON schema of report.json."""
    from bench.report import json

    typer.echo(json.schema(), nl=False)


def exit_on(regressions: list[str]) -> None:
    """Print the regressions, a line each, and exit with 1 when there is any."""
    from toolkit.console import err

    if regressions:
        for line in regressions:
            err.print(f"regression: {line}", style="bold red", markup=False, highlight=False)
        raise typer.Exit(1)
