"""`qvl bench`. Heavy imports live inside the functions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.compare import FAIL_IF, exit_on
from bench.run.config import BenchConfig, is_url
from toolkit.options import settings_as_options

if TYPE_CHECKING:
    from pathlib import Path

    from bench.report.compare.conditions import Condition
    from bench.report.schema import Report
    from bench.run.measured import Measurements

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's verb to ``app``."""
    app.command(rich_help_panel="Measurement")(bench)


@settings_as_options
def bench(
    config: BenchConfig,
    fail_if: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help=FAIL_IF)] = None,
) -> None:
    """Measure a candidate against a baseline: accuracy, fidelity, latency, throughput, size; write a report.

    Starts servers for what is no URL and stops them in the end. What was measured is kept in --out as it comes: after
    Ctrl-C there is a partial report, and the same command with --resume goes on.

    Exits 1 when a --fail-if condition is met; 2 on a mistake in what is asked; 3 when it could not be measured:
    requests failed that must not, such a run is marked failed and has no figures, or a condition names an invalid
    point; 130 after Ctrl-C.
    """
    from bench import report as reports
    from bench.report.compare.conditions import parse_condition
    from bench.report.render import requests_file

    conditions = [parse_condition(text) for text in fail_if or []]
    if not config.resume:
        reports.clear(config.out, config.force)
    report, measured, logs = _run(config)
    reports.write(
        report,
        config.out,
        force=config.force or config.resume,
        more=lambda directory: requests_file.write(measured, directory, config.exports) if config.exports else None,
    )
    _tell(report, config, logs)
    _judge(report, conditions)


def _run(config: BenchConfig) -> tuple[Report, Measurements, list[Path]]:
    """Measure, and make the report; say what was measured, and where the logs of servers are that were started."""
    from bench.cli.progress import progress
    from bench.cli.servers import Booter, find_here, write_demo
    from bench.machine.environment import command_line
    from bench.report.build import build
    from bench.run.session import Host, measured
    from bench.run.signals import sigterm_like_ctrl_c

    command = command_line([argument for argument in sys.argv[1:] if argument != "--resume"])
    both_local = not is_url(config.baseline) and not is_url(config.candidate)
    with sigterm_like_ctrl_c(), progress() as (show, on_phase):
        booter = Booter(
            config.serve_arguments, config.port, shared=both_local and not config.sequential, on_phase=on_phase
        )
        host = Host(booter, write_demo, find_here)
        with measured(config, host, show) as outcome:
            return build(outcome, config, command=command), outcome.measured, host.logs


def _tell(report: Report, config: BenchConfig, logs: list[Path]) -> None:
    """Show the report, or say why it has no figures."""
    from bench import report as reports
    from bench.report.render import json_file, terminal
    from toolkit.console import err, out, warn
    from toolkit.errors import UnmeasuredError

    if report.status == "failed":
        seen = f"; logs of the servers: {', '.join(map(str, logs))}" if logs else ""
        kept = " What was measured before is kept: the same command with --resume goes on." * reports.kept(config.out)
        raise UnmeasuredError(f"{report.verdict.sentence} (all of them in {config.out / json_file.FILE}{seen}).{kept}")
    for warning in report.warnings:
        warn(warning)
    terminal.show(report, out)
    out.print(f"report: {config.out / 'report.html'}", markup=False, highlight=False)
    if report.status == "partial":
        err.print("interrupted; the same command with --resume goes on", style="bold", markup=False, highlight=False)
        raise typer.Exit(130)


def _judge(report: Report, conditions: list[Condition]) -> None:
    """Exit with 1 when the candidate meets a condition."""
    from bench.report.compare.comparison import compare
    from bench.report.compare.figures import Side
    from toolkit.console import warn

    if not conditions:
        return
    found = compare(Side(report, "baseline"), Side(report, "candidate"), conditions)
    for line in found.undecided:
        warn(f"can't tell: {line}")
    exit_on(found.regressions, found.unmeasured)
