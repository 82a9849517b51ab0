"""The verbs of bench. Heavy imports live inside the functions."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from bench.cli.compare import FAIL_IF, exit_on

if TYPE_CHECKING:
    from bench.load.inputs import Lengths, Preset
    from bench.load.loops import Arrivals
    from bench.run.boot import Abort, Here, Server, Start
    from bench.run.measure import Progress

__all__ = ["register"]

#: What --quick changes: enough for a model of a few million parameters on two cores.
QUICK: dict[str, Any] = {
    "per_task": 25,
    "fidelity": 24,
    "concurrency": "1,2,4",
    "requests": 24,
    "rounds": 3,
    "sweep_rates": 3,
    "sweep_concurrency": 8,
    "output_tokens": "16",
    "image_sizes": "224x224,224x168",
    "answer_tokens": 32,
}
FULL: dict[str, Any] = {
    "per_task": None,
    "fidelity": 64,
    "concurrency": "1,4,16",
    "requests": 96,
    "rounds": 3,
    "sweep_rates": 5,
    "sweep_concurrency": 64,
    "output_tokens": "128",
    "image_sizes": "448x448",
    "answer_tokens": 64,
}
#: Seconds between two lines of progress where there is no terminal.
NOTE_S = 30.0
ACCURACY, FIDELITY, SPEED, SERVERS = "Accuracy", "Fidelity", "Speed", "Servers"
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted or failed; the same command.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller defaults: the demo on two cores in a few minutes.")
    ] = False,
    fail_if: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help=FAIL_IF)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="QUESTIONS",
            help="demo, FILE.jsonl, or none to measure speed alone; docvqa, chartqa, textvqa or mmmu, from the hub or "
            "as NAME:DIR_OR_HUB_ID@SPLIT (default demo, none with --images).",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
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
    fidelity: Annotated[
        int | None,
        typer.Option(
            help=f"Questions whose answers are compared token by token, 0 for none ({_both('fidelity')}).",
            rich_help_panel=FIDELITY,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Compare token by token on your pictures instead.", rich_help_panel=FIDELITY),
    ] = None,
    image_prompt: Annotated[
        str, typer.Option(help="What is asked about each of them.", rich_help_panel=FIDELITY)
    ] = "Describe this picture.",
    concurrency: Annotated[
        str | None,
        typer.Option(
            help=f"Requests in flight, a point each, or none ({_both('concurrency')}; none with --rate or --sweep).",
            rich_help_panel=SPEED,
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Requests due each second, a point each, such as 2,4,8.", rich_help_panel=SPEED),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson or constant: when they are due under a rate.", rich_help_panel=SPEED)
    ] = "poisson",
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help=f"One request at a time, then saturation, then rates between ({_both('sweep_rates')}).",
            rich_help_panel=SPEED,
        ),
    ] = False,
    sweep_concurrency: Annotated[
        int | None,
        typer.Option(
            help=f"Requests in flight that saturate a server ({_both('sweep_concurrency')}).", rich_help_panel=SPEED
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help=f"Requests a point and system ({_both('requests')}).", rich_help_panel=SPEED)
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds a point is measured in each turn, instead of --requests.", rich_help_panel=SPEED),
    ] = None,
    ramp: Annotated[
        float, typer.Option(help="Seconds in which a load grows before it is measured.", rich_help_panel=SPEED)
    ] = 0.0,
    rounds: Annotated[
        int | None, typer.Option(help=f"Turns a point is measured in ({_both('rounds')}).", rich_help_panel=SPEED)
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(help="Objectives for goodput: ttft, tpot, e2e, as ttft=200ms,tpot=30ms.", rich_help_panel=SPEED),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="chat, ocr-document or multi-image: pictures and lengths by use; the four options below change them.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    image_sizes: Annotated[
        str | None,
        typer.Option(help=f"Pictures, WIDTHxHEIGHT,... or text ({_both('image_sizes')}).", rich_help_panel=SPEED),
    ] = None,
    images_per_request: Annotated[
        str | None, typer.Option(help="Pictures of a request: 2, or 1-4 (default 1).", rich_help_panel=SPEED)
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            help="Length of prompts: 64, 32-128 (uniform), or lognormal:MEDIAN:SIGMA (default 16).",
            rich_help_panel=SPEED,
        ),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Exact length of answers, likewise ({_both('output_tokens')}).",
            rich_help_panel=SPEED,
        ),
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
    """Measure a candidate against a baseline: accuracy, fidelity, latency, throughput, size; write a report.

    Starts servers for what is no URL and stops them in the end. What was measured is kept in --out as it comes: after
    Ctrl-C there is a partial report, and the same command with --resume goes on.

    Exits 1 when a --fail-if condition is met; 2 when requests failed that must not: such a run is marked failed and has
    no figures; 130 after Ctrl-C.
    """
    from bench import report as reports
    from bench.load.inputs import Lengths, Preset, parse_lengths, parse_sizes
    from bench.load.metrics import parse_slos
    from bench.machine.environment import command_line
    from bench.report import build
    from bench.report.compare.figures import Side, parse_condition
    from bench.report.compare.figures import compare as compare_sides
    from bench.report.render import json_file as json
    from bench.report.render import terminal
    from bench.run.config import Plan, Settings, is_url
    from bench.run.session import measured
    from toolkit.console import err, warn
    from toolkit.console import out as stdout
    from toolkit.errors import BenchError

    defaults = QUICK if quick else FULL

    def chosen(name: str, given: Any) -> Any:
        return defaults[name] if given is None else given

    def lengths(given: str | None, option: str, otherwise: Lengths, least: int) -> Lengths:
        return otherwise if given is None else parse_lengths(given, option, least=least)

    conditions = [parse_condition(text) for text in fail_if or []]
    use = _preset(preset)
    if use is None:
        use = Preset(
            "",
            parse_sizes(defaults["image_sizes"]),
            Lengths.fixed(1),
            Lengths.fixed(16),
            parse_lengths(defaults["output_tokens"], "--output-tokens", least=2),
        )
    if concurrency is None and (rate or sweep):
        concurrency = "none"
    plan = Plan(
        concurrencies=_concurrencies(chosen("concurrency", concurrency)),
        rates=_rates(rate),
        arrivals=_arrivals(arrivals),
        sweep=defaults["sweep_rates"] if sweep else 0,
        sweep_concurrency=chosen("sweep_concurrency", sweep_concurrency),
        requests=chosen("requests", requests),
        duration_s=duration,
        ramp_s=ramp,
        rounds=chosen("rounds", rounds),
        output_tokens=lengths(output_tokens, "--output-tokens", use.output_tokens, 2),
        prompt_tokens=lengths(prompt_tokens, "--prompt-tokens", use.prompt_tokens, 1),
        images=lengths(images_per_request, "--images-per-request", use.images, 1),
        image_sizes=use.sizes if image_sizes is None else parse_sizes(image_sizes),
        preset=preset,
        slos=parse_slos(slo) if slo else (),
        answer_tokens=chosen("answer_tokens", answer_tokens),
        question_concurrency=question_concurrency,
        timeout_s=timeout,
    )
    settings = Settings(
        sources={"baseline": baseline, "candidate": candidate},
        plan=plan,
        tasks=tasks if tasks is not None else "demo" if images is None else "none",
        per_task=chosen("per_task", per_task),
        images=images,
        image_prompt=image_prompt,
        fidelity=chosen("fidelity", fidelity),
        margin=margin / 100.0,
        seed=seed,
        side_by_side=not sequential,
        api_key=api_key,
        serve_arguments=tuple(serve_arg or ()),
        command=command_line([argument for argument in sys.argv[1:] if argument != "--resume"]),
    )
    if not resume:
        reports.clear(out, force)
    logs: list[Path] = []
    both_local = not is_url(baseline) and not is_url(candidate)
    with _sigterm_like_ctrl_c(), _progress() as (progress, on_phase):
        booter = _Booter(settings.serve_arguments, port, shared=both_local and not sequential, on_phase=on_phase)
        context = measured(
            settings,
            boot=booter,
            write_demo=_write_demo,
            progress=progress,
            find_here=_find_here,
            out=out,
            resume=resume,
            logs=logs,
        )
        with context as outcome:
            report = build.report(outcome, settings)
    reports.write(report, out, force=force or resume)
    if report.status == "failed":
        seen = f"; logs of the servers: {', '.join(map(str, logs))}" if logs else ""
        kept = " What was measured before is kept: the same command with --resume goes on." * reports.kept(out)
        raise BenchError(f"{report.verdict.sentence} (all of them in {out / json.FILE}{seen}).{kept}")
    for warning in report.warnings:
        warn(warning)
    terminal.show(report, stdout)
    stdout.print(f"report: {out / 'report.html'}", markup=False, highlight=False)
    if report.status == "partial":
        err.print("interrupted; the same command with --resume goes on", style="bold", markup=False, highlight=False)
        raise typer.Exit(130)
    if conditions:
        found = compare_sides(Side(report, "baseline"), Side(report, "candidate"), conditions)
        for line in found.undecided:
            warn(f"can't tell: {line}")
        exit_on(found.regressions)


def _concurrencies(text: str) -> tuple[int, ...]:
    from toolkit.errors import BenchError

    if text.strip() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise BenchError(f"--concurrency {text!r}: write whole numbers with commas, e.g. 1,4,16, or none") from error


def _rates(text: str | None) -> tuple[float, ...]:
    from toolkit.errors import BenchError

    if text is None:
        return ()
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as error:
        raise BenchError(f"--rate {text!r}: write requests per second with commas, e.g. 2,4,8") from error


def _arrivals(text: str) -> Arrivals:
    from toolkit.errors import BenchError

    if text not in ("poisson", "constant"):
        raise BenchError(f"--arrivals {text!r}: write poisson or constant")
    return "poisson" if text == "poisson" else "constant"


def _preset(name: str | None) -> Preset | None:
    from bench.load.inputs import PRESETS
    from toolkit.errors import BenchError

    if name is None:
        return None
    if name not in PRESETS:
        uses = "; ".join(f"{known}: {preset.use}" for known, preset in PRESETS.items())
        raise BenchError(f"--preset {name!r}: choose one of {uses}")
    return PRESETS[name]


def _write_demo(directory: Path, per_task: int | None) -> Path:
    from toolkit.tasks.manifests import write_tasks

    return write_tasks(directory) if per_task is None else write_tasks(directory, per_task=per_task)


def _find_here(url: str) -> Here | None:
    """Return the server that `qvl serve --detach` has left on this machine under a URL, if it is one of those."""
    from bench.run.boot import Here
    from serve.process import state

    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
        return None
    known = state.load(parts.port)
    return Here(known.pid, Path(known.log), Path(known.checkpoint)) if known and known.alive else None


class _Booter:
    """Starts servers with `serve.process.lifecycle`, each on a port of its own."""

    def __init__(
        self, arguments: tuple[str, ...], port: int | None, *, shared: bool, on_phase: Callable[[str, str], None]
    ) -> None:
        from bench.run.boot import free_ports

        self._arguments = arguments
        self._ports = iter(free_ports(2) if port is None else [port, port + 1])
        self._shared = shared
        self._on_phase = on_phase

    @property
    def at_once(self) -> bool:
        """Whether servers may boot at the same time: not on a GPU, where each measures how much memory is left."""
        from serve.settings.config import ServeOptions

        return not ServeOptions().on_gpu

    def boot(self, source: str) -> tuple[Start, Abort]:
        """Return how to start a server for ``source`` and how to end it while it boots."""
        from serve.process import lifecycle
        from serve.settings.config import DEFAULT_GPU_SHARE, ServeOptions
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
        signal.raise_signal(signal.SIGINT)  # which asyncio takes for a reason to close what is open

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

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}", style="dim"),
    )
    with Bars(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        phases: dict[str, str] = {}
        said = time.monotonic()

        def update(phase: str, done: int, total: int, now: str) -> None:
            nonlocal said
            for source in [name for name in tasks if bars.tasks[bars.task_ids.index(tasks[name])].total is None]:
                bars.remove_task(tasks.pop(source))  # servers have booted when something is measured
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, now="")
                if not err.is_terminal:
                    note(f"{phase}: {total} requests")
            elif not err.is_terminal and time.monotonic() - said > NOTE_S:
                note(f"{phase}: {done} of {total}; {now}")
                said = time.monotonic()
            # Once a phase is over, its rates are too.
            bars.update(tasks[phase], completed=done, total=total, now=now if done < total else "")

        def booting(source: str, phase: str) -> None:
            if phases.get(source) != phase and not err.is_terminal:
                note(f"{source}: {phase}")  # bars are drawn on terminals only
            phases[source] = phase
            if source not in tasks:
                tasks[source] = bars.add_task("", total=None, now="")
            bars.update(tasks[source], description=f"{source}: {phase}")

        yield update, booting
