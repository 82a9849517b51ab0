"""The verbs of bench. Heavy imports live inside the functions."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.compare_cli import FAIL_IF, exit_on

if TYPE_CHECKING:
    from bench.boot import Abort, Server, Start
    from bench.run import Progress

__all__ = ["register"]

#: What --quick changes: enough for a model of a few million parameters on two cores.
QUICK: dict[str, Any] = {
    "per_task": 25,
    "concurrency": "1,2,4",
    "requests": 24,
    "rounds": 2,
    "output_tokens": 16,
    "image_sizes": "224x224,224x168",
    "answer_tokens": 32,
}
FULL: dict[str, Any] = {
    "per_task": None,
    "concurrency": "1,4,16",
    "requests": 96,
    "rounds": 3,
    "output_tokens": 128,
    "image_sizes": "448x448",
    "answer_tokens": 64,
}
ACCURACY, SPEED, SERVERS = "Accuracy", "Speed", "Servers"
_PANEL = "Measurement"


def _both(name: str) -> str:
    """The two defaults of an option, for its help."""
    full = "all" if FULL[name] is None else FULL[name]
    return f"default {full}; --quick {QUICK[name]}"


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
    app.command(rich_help_panel=_PANEL)(bench)


def bench(
    baseline: Annotated[str, typer.Option(help="What to measure against: DIR, hub id, demo, or the URL of a server.")],
    candidate: Annotated[str, typer.Option(help="What is judged: DIR, hub id, demo, or the URL of a server.")],
    out: Annotated[Path, typer.Option(help="Directory for report.json, report.md and report.html; must not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller defaults: the demo on two cores in about two minutes.")
    ] = False,
    fail_if: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help=FAIL_IF)] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="QUESTIONS",
            help="demo, FILE.jsonl, or none to measure speed alone; docvqa, chartqa, textvqa or mmmu, from the hub or "
            "as NAME:DIR_OR_HUB_ID@SPLIT.",
            rich_help_panel=ACCURACY,
        ),
    ] = "demo",
    per_task: Annotated[
        int | None, typer.Option(min=1, help=f"Questions of each task ({_both('per_task')}).", rich_help_panel=ACCURACY)
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help=f"Longest answer ({_both('answer_tokens')}).", rich_help_panel=ACCURACY)
    ] = None,
    question_concurrency: Annotated[int, typer.Option(help="Questions in flight.", rich_help_panel=ACCURACY)] = 4,
    margin: Annotated[
        float, typer.Option(help="Loss, in points, that would not matter.", rich_help_panel=ACCURACY)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling questions and of resampling.", rich_help_panel=ACCURACY)] = 0,
    concurrency: Annotated[
        str | None,
        typer.Option(
            help=f"Requests in flight, a point each, or none ({_both('concurrency')}).", rich_help_panel=SPEED
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help=f"Requests a point and system ({_both('requests')}).", rich_help_panel=SPEED)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help=f"Turns a point is measured in ({_both('rounds')}).", rich_help_panel=SPEED)
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(help=f"Exact length of answers ({_both('output_tokens')}).", rich_help_panel=SPEED)
    ] = None,
    image_sizes: Annotated[
        str | None,
        typer.Option(help=f"Pictures, WIDTHxHEIGHT,... or text ({_both('image_sizes')}).", rich_help_panel=SPEED),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.", rich_help_panel=SERVERS)] = 120.0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="QVL_API_KEY", help="Key for servers given by URL.", rich_help_panel=SERVERS),
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="One server at a time, when both do not fit.", rich_help_panel=SERVERS),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(help="First port of servers started here (default: free ones).", rich_help_panel=SERVERS),
    ] = None,
    serve_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARG",
            help="vLLM argument of servers started here, such as --serve-arg=--max-num-seqs=16. Repeatable.",
            rich_help_panel=SERVERS,
        ),
    ] = None,
) -> None:
    """Measure a candidate against a baseline: accuracy, latency, throughput, size; write a report.

    Starts servers for what is no URL and stops them in the end.

    Exits 1 when a --fail-if condition is met; 2 when a request failed: such a run is marked failed and has no figures.
    """
    from bench import report as reports
    from bench.environment import command_line
    from bench.inputs import parse_sizes
    from bench.report import json, terminal
    from bench.report.compare import Side, parse_condition
    from bench.report.compare import compare as compare_sides
    from bench.run import Plan
    from bench.session import Settings, is_url, run
    from toolkit.console import out as stdout
    from toolkit.console import warn
    from toolkit.errors import BenchError

    defaults = QUICK if quick else FULL

    def chosen(name: str, given: Any) -> Any:
        return defaults[name] if given is None else given

    conditions = [parse_condition(text) for text in fail_if or []]
    plan = Plan(
        concurrencies=_concurrencies(chosen("concurrency", concurrency)),
        requests=chosen("requests", requests),
        rounds=chosen("rounds", rounds),
        output_tokens=chosen("output_tokens", output_tokens),
        image_sizes=parse_sizes(chosen("image_sizes", image_sizes)),
        answer_tokens=chosen("answer_tokens", answer_tokens),
        question_concurrency=question_concurrency,
        timeout_s=timeout,
    )
    reports.check_target(out, force)
    settings = Settings(
        sources={"baseline": baseline, "candidate": candidate},
        plan=plan,
        tasks=tasks,
        per_task=chosen("per_task", per_task),
        margin=margin / 100.0,
        seed=seed,
        side_by_side=not sequential,
        api_key=api_key,
        serve_arguments=tuple(serve_arg or ()),
        command=command_line(sys.argv[1:]),
    )
    logs: list[Path] = []
    both_local = not is_url(baseline) and not is_url(candidate)
    with _sigterm_like_ctrl_c(), _progress() as (progress, on_phase):
        booter = _Booter(settings.serve_arguments, port, shared=both_local and not sequential, on_phase=on_phase)
        report = run(settings, boot=booter, write_demo=_write_demo, progress=progress, logs=logs)
    reports.write(report, out, force=force)
    if report.status == "failed":
        seen = f"; logs of the servers: {', '.join(map(str, logs))}" if logs else ""
        raise BenchError(f"{report.verdict.sentence} (all of them in {out / json.FILE}{seen})")
    for warning in report.warnings:
        warn(warning)
    terminal.show(report, stdout)
    stdout.print(f"report: {out / 'report.html'}", markup=False, highlight=False)
    if conditions:
        found = compare_sides(Side(report, "baseline"), Side(report, "candidate"), conditions)
        exit_on(found.regressions)


def _concurrencies(text: str) -> tuple[int, ...]:
    from toolkit.errors import BenchError

    if text.strip() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise BenchError(f"--concurrency {text!r}: write whole numbers with commas, e.g. 1,4,16, or none") from error


def _write_demo(directory: Path, per_task: int | None) -> Path:
    from toolkit.demo import write_tasks

    return write_tasks(directory) if per_task is None else write_tasks(directory, per_task=per_task)


class _Booter:
    """Starts servers with `serve.lifecycle`, each on a port of its own."""

    def __init__(
        self, arguments: tuple[str, ...], port: int | None, *, shared: bool, on_phase: Callable[[str, str], None]
    ) -> None:
        from bench.boot import free_ports

        self._arguments = arguments
        self._ports = iter(free_ports(2) if port is None else [port, port + 1])
        self._shared = shared
        self._on_phase = on_phase

    @property
    def at_once(self) -> bool:
        """Whether servers may boot at the same time: not on a GPU, where each measures how much memory is left."""
        from serve.options import ServeOptions

        return not ServeOptions().on_gpu

    def boot(self, source: str) -> tuple[Start, Abort]:
        """Return how to start a server for ``source`` and how to end it while it boots."""
        from serve import lifecycle
        from serve.options import DEFAULT_GPU_SHARE, ServeOptions
        from toolkit.errors import ServerError

        share = DEFAULT_GPU_SHARE / 2 if self._shared and not self.at_once else None
        options = ServeOptions(port=next(self._ports), gpu_memory_utilization=share, extra=self._arguments)

        def start() -> Server:
            # Attached: the server ends with this process even when that is killed.
            return lifecycle.start(
                source, options, attached=True, on_phase=lambda phase, seconds: self._on_phase(source, phase)
            )

        def abort() -> None:
            with suppress(ServerError):  # not started yet, or gone
                lifecycle.stop(options.port, drain=False)

        return start, abort


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let a polite kill stop the servers too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[tuple[Progress, Callable[[str, str], None]]]:
    """Bars on stderr: one for each phase of the measurement, one for each server that boots."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from toolkit.console import err, note

    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        phases: dict[str, str] = {}

        def update(phase: str, done: int, total: int) -> None:
            for source in [name for name in tasks if bars.tasks[bars.task_ids.index(tasks[name])].total is None]:
                bars.remove_task(tasks.pop(source))  # servers have booted when something is measured
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
                if not err.is_terminal:
                    note(f"{phase}: {total} requests")
            bars.update(tasks[phase], completed=done)

        def booting(source: str, phase: str) -> None:
            if phases.get(source) != phase and not err.is_terminal:
                note(f"{source}: {phase}")  # bars are drawn on terminals only
            phases[source] = phase
            if source not in tasks:
                tasks[source] = bars.add_task("", total=None)
            bars.update(tasks[source], description=f"{source}: {phase}")

        yield update, booting
