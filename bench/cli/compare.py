"""The verbs that read reports: compare, history and schema. Heavy imports live inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["FAIL_IF", "exit_on", "register"]

_PANEL = "Measurement"
FAIL_IF = (
    "Exit 1 when this change is seen beyond chance: METRIC[@LOAD] OP CHANGE, such as 'accuracy<-1pt', 'tpot.p50@4>+5%' "
    "(at 4 in flight; without @ under any load) or 'size_on_disk>0%'. Metrics: accuracy, accuracy.TASK, ttft.p50 "
    "(tpot, itl, e2e; p90, p95, p99), output_tokens_per_s, requests_per_s, goodput_per_s, size_on_disk, memory, "
    "gpu_memory, weights_memory, kv_cache, mean_kl, top1_agreement, ... OP: < <= > >=. Units: % (relative), pt (points "
    "of a share), ms. Repeatable."
)


def register(app: typer.Typer) -> None:
    """Add the verbs to ``app``."""
    app.command(rich_help_panel=_PANEL)(compare)
    app.command(rich_help_panel=_PANEL)(history)
    app.command(rich_help_panel=_PANEL)(schema)


def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(metavar="A B [C ...]", help="Report directories or report.json files; A is the reference."),
    ],
    fail_if: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help=FAIL_IF)] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that needs nothing else.")] = None,
    markdown: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write markdown for a pull request; - prints it, and no table.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare although the questions, the load or the machine differ.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show p90, p95 and p99 too.")] = False,
) -> None:
    """Compare the candidate of report A with those of the others; changes are relative to A.

    Exits 1 on a regression: a --fail-if condition that is met beyond chance or, without any, an accuracy worse beyond
    chance, over all questions or in one task. A condition is worse when the change meets it and its 95% interval leaves
    out no change at all, no worse when nothing in the interval meets it; anything between is shown as can't tell.

    Exits 2 when they can't be compared, and 3 when what a condition names could not be measured: the point is invalid,
    or the report is marked failed.
    """
    from bench.report.compare import html_file as compare_html
    from bench.report.compare import markdown as compare_markdown
    from bench.report.compare import terminal as compare_terminal
    from bench.report.compare.comparison import compare_all
    from bench.report.compare.conditions import parse_condition
    from bench.report.compare.figures import Side
    from bench.report.render import json_file
    from toolkit.console import note, warn
    from toolkit.console import out as stdout
    from toolkit.errors import BenchError

    if len(reports) < 2:
        raise BenchError("nothing to compare: give two reports or more, the reference first")
    conditions = [parse_condition(text) for text in fail_if or []]
    sides = []
    for path in reports:
        report = json_file.read(path)
        if json_file.UPGRADED in report.warnings:
            warn(f"{path}: {json_file.UPGRADED}")
        sides.append(Side(report, "candidate", _name(path, report.systems["candidate"].label, reports)))
    found = compare_all(sides, conditions, anyway=anyway)
    for comparison in found:
        for difference in comparison.differences:
            warn(f"the reports differ: {difference}")
    if markdown == "-":
        typer.echo(compare_markdown.render(found), nl=False)
    else:
        compare_terminal.show(found, stdout, every=every)
        for line in dict.fromkeys(line for comparison in found for line in comparison.notes):
            note(line)
    if markdown not in (None, "-"):
        _write(Path(str(markdown)), compare_markdown.render(found))
    if html is not None:
        _write(html, compare_html.render(found))
    for line in (line for comparison in found for line in comparison.undecided):
        warn(f"can't tell: {line}")
    lost = [] if conditions else [line for comparison in found for line in comparison.losses]
    exit_on(
        [*(line for comparison in found for line in comparison.regressions), *lost],
        [line for comparison in found for line in comparison.unmeasured],
    )


def history(
    reports: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Reports, or directories that hold them, in any order.")
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with a plot of each figure.")] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare although the questions, the load or the machine differ.")
    ] = False,
) -> None:
    """Show how the candidate changed from report to report, each against the oldest.

    Where reports measured the same baseline, changes of speed are told through it: what the machine did on either day
    is left out, and shown beside them.
    """
    from bench.report.compare import history_view
    from bench.report.compare.differences import differences
    from bench.report.compare.figures import Side
    from bench.report.compare.history import found_in, tracks
    from toolkit.console import note, warn
    from toolkit.console import out as stdout

    found = found_in(reports)
    paths = [path for path, _ in found]
    sides = [Side(report, "candidate", _name(path, report.systems["candidate"].label, paths)) for path, report in found]
    shown = tracks(sides, anyway=anyway)
    differ = [line for side in sides[1:] for part in differences(sides[0].report, side.report) for line in part]
    for line in dict.fromkeys(differ):
        warn(f"the reports differ: {line}")
    history_view.show(shown, stdout)
    if history_view.through(shown):
        note("changes of speed are told through the baseline, which was the same in all reports")
    if html is not None:
        _write(html, history_view.render(shown, list(dict.fromkeys(differ))))


def _name(path: Path, label: str, reports: list[Path]) -> str:
    """The system's label, with the report's path where several reports might have the same."""
    directory = path.resolve().parent if path.suffix == ".json" else path.resolve()
    names = [other.resolve().parent if other.suffix == ".json" else other.resolve() for other in reports]
    short = directory.name if sum(name.name == directory.name for name in names) == 1 else str(path)
    return f"{label} ({short})"


def _write(file: Path, text: str) -> None:
    from toolkit.errors import BenchError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{file} can't be written: {error.strerror}") from error


def schema() -> None:
    """Print the JSON schema of report.json."""
    from bench.report.render import json_file

    typer.echo(json_file.schema(), nl=False)


def exit_on(regressions: list[str], unmeasured: list[str]) -> None:
    """Print the regressions and what could not be measured, a line each; exit with 1 when there is a regression, else
    with 3 when something could not be measured."""
    from toolkit.console import err

    for line in unmeasured:
        err.print(f"not measured: {line}", style="bold red", markup=False, highlight=False)
    if regressions:
        for line in regressions:
            err.print(f"regression: {line}", style="bold red", markup=False, highlight=False)
        raise typer.Exit(1)
    if unmeasured:
        raise typer.Exit(3)
