"""`qvl tune`: what is fastest here, kept as a profile that `qvl serve` uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bench.run.boot import Abort, Server, Start
    from bench.tune.measure import Journal, TunePlan
    from serve.settings.config import ServeOptions
    from serve.settings.profiles import Key, Profile

__all__ = ["boot_with", "register"]


def register(app: typer.Typer) -> None:
    """Add this module's verb to ``app``."""
    app.command(rich_help_panel="Server")(tune)


def tune(
    model: Annotated[str, typer.Argument(help="Directory, hub id or demo.")],
    concurrency: Annotated[str, typer.Option(help="Requests in flight, a load each.")] = "1,8,32,128",
    fp16: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The 16-bit model, measured beside it with vLLM's own settings.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing after so long; called again, it goes on.")] = 60.0,
    requests: Annotated[
        int, typer.Option(help="Requests a load, and at least three times as many as are in flight.")
    ] = 64,
    output_tokens: Annotated[int, typer.Option(help="Exact length of answers.")] = 128,
    image_sizes: Annotated[str, typer.Option(help="Pictures, WIDTHxHEIGHT,... or text.")] = "448x448",
    questions: Annotated[
        Path | None,
        typer.Option(help="FILE.jsonl of questions to ask instead; then guesses from n-grams are tried too."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Candidates to try, by name, with commas.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Try settings that change answers: KV cache in fp8.")] = False,
    tp: Annotated[int, typer.Option(help="GPUs that split the weights.")] = 1,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    backend: Annotated[str | None, typer.Option(help="cpu or gpu (what is installed and found).")] = None,
    boot_timeout: Annotated[float, typer.Option(help="Seconds until a server must be ready.")] = 600.0,
    shared: Annotated[bool, typer.Option("--shared", help="Measure although others use a GPU.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what was measured before.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory for the profile (where `qvl serve` looks).")] = None,
    fail_if_left: Annotated[bool, typer.Option("--fail-if-left", help="Exit 3 when the time was up.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile and the trials as JSON.")] = False,
) -> None:
    """Measure vLLM's settings on this machine and keep the fastest at each load as a profile for `qvl serve`.

    A candidate that does not start is recorded and skipped. Killed, or out of time, it goes on when called again.
    """
    import json

    from bench.load.workload import parse_sizes
    from bench.run.config import parse_concurrencies
    from bench.run.signals import sigterm_like_ctrl_c
    from bench.tune.measure import FP16, Journal, TunePlan
    from bench.tune.measure import tune as run
    from serve.plan.candidates import candidates, refuse_busy_gpu
    from serve.settings.backend import choose, require_vllm
    from serve.settings.parallel import Parallel
    from serve.settings.profiles import key_for, save
    from toolkit.checkpoint.checkpoint import Checkpoint, resolve
    from toolkit.console import note
    from toolkit.errors import BenchError
    from toolkit.paths import cache_dir

    where = choose(backend)
    require_vllm(where)
    if where == "gpu" and not shared:
        refuse_busy_gpu()
    checkpoint = Checkpoint.open(resolve(model))
    parallel = Parallel(tp=tp)
    parallel.check(checkpoint, where)
    plan = TunePlan(
        parse_concurrencies(concurrency), requests, output_tokens, parse_sizes(image_sizes), _file(questions)
    )
    key = key_for(checkpoint, where, tp)
    tried = candidates(where, key.card, checkpoint.quantization is not None, text=questions is not None, lossy=lossy)
    if only is not None:
        names = only.split(",")
        if unknown := [name for name in names if name not in tried]:
            raise BenchError(f"--only {unknown[0]}: no such candidate here. There are {', '.join(tried)}.")
        tried = {name: tried[name] for name in names}
    about = {"key": asdict(key), "plan": asdict(plan), "model": str(checkpoint.path.resolve()), "fp16": fp16}
    journal = Journal(cache_dir("tune", Journal.name(about)), about, fresh=restart)
    sources = dict.fromkeys(tried, model) | ({FP16: fp16} if fp16 else {})
    settings = {name: each.as_dict() for name, each in tried.items()} | ({FP16: {}} if fp16 else {})

    def options(name: str) -> ServeOptions:
        from serve.settings.config import ServeOptions
        from serve.settings.profiles import Settings

        return ServeOptions(
            port=_free_port(),
            backend=where,
            max_model_len=max_model_len,
            timeout=boot_timeout,
            parallel=parallel,
            settings=tried.get(name, Settings()),
        )

    with sigterm_like_ctrl_c(), _progress() as (progress, on_phase):
        complete = run(
            settings,
            plan,
            lambda name: boot_with(sources[name], options(name), on_phase),
            journal,
            seconds=60 * minutes,
            progress=progress,
        )
    profile = _profile(key, plan, journal, settings)
    if profile is None:
        reasons = "\n".join(f"{t.name}: {t.failed}" for t in journal.trials.values() if t.failed)
        if not reasons and fail_if_left:
            note("the time was up before anything was measured: give more --minutes")
            raise typer.Exit(3)
        raise BenchError(f"nothing was measured: {reasons or 'the time was up before the first load'}")
    path = save(profile, out)
    if as_json:
        trials = [asdict(trial) for trial in journal.trials.values()]
        typer.echo(
            json.dumps({"profile": json.loads(profile.dumps()), "trials": trials, "complete": complete}, indent=1)
        )
    else:
        _show(journal, plan, profile)
    note(f"profile: {path}; `qvl serve` finds it" if out is None else f"profile: {path}")
    if not complete:
        note("the time is up: the same command goes on with what is left")
        if fail_if_left:
            raise typer.Exit(3)


def _file(questions: Path | None) -> str | None:
    """Return the file's absolute path, having read it once: a line that is no question is found before any boot."""
    if questions is None:
        return None
    from bench.questions.tasks import load_questions

    load_questions(questions)
    return str(questions.resolve())


def _free_port() -> int:
    from bench.run.boot import free_ports

    return free_ports(1)[0]


def _silent(phase: str) -> None:
    pass


def boot_with(source: str, options: ServeOptions, on_phase: Callable[[str], None] = _silent) -> tuple[Start, Abort]:
    """Return how to start a server of ``source``, and how to end it while it boots."""
    from serve.process import lifecycle
    from toolkit.errors import ServerError

    def start() -> Server:
        return lifecycle.start(source, options, attached=True, on_phase=lambda phase, seconds: on_phase(phase))

    def abort() -> None:
        with suppress(ServerError):  # not started yet, or gone
            lifecycle.stop(options.port, drain=False)

    return start, abort


def _profile(key: Key, plan: TunePlan, journal: Journal, settings: dict[str, dict[str, Any]]) -> Profile | None:
    """Make a profile of what was measured; None when nothing was."""
    from bench.machine.environment import command_line, system_name, versions
    from bench.tune.measure import FP16
    from serve.settings.profiles import Measured, Profile, Settings

    what = "output_tokens_per_s"
    loads = []
    for load in plan.concurrencies:
        found = {
            name: t.figures[load][what] for name, t in journal.trials.items() if load in t.figures and name in settings
        }
        plain = found.pop(FP16, None)
        if found:
            loads.append(Measured(load, found, plain))
    if not loads:
        return None
    import datetime
    import sys

    measured = {name for load in loads for name in load.figures}
    sizes = ", ".join("text" if size is None else f"{size[0]}x{size[1]}" for size in plan.image_sizes)
    made = f"{plan.output_tokens} output tokens, pictures of {sizes}"
    asked = (
        f"questions of {Path(plan.questions).name}, {plan.output_tokens} output tokens at most"
        if plan.questions
        else ""
    )
    provenance = {
        "what": f"closed loop, {asked or made}",
        "when": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(sys.argv[1:]),
        "versions": versions(),
        "system": system_name(),
        "failed": {name: t.failed for name, t in journal.trials.items() if t.failed},
        "figures": {name: journal.trials[name].figures for name in sorted(measured)},
    }
    kept = {name: Settings.read(settings[name]) for name in settings if name in measured}
    return Profile(key, kept, tuple(loads), what, provenance)


def _show(journal: Journal, plan: TunePlan, profile: Profile) -> None:
    from rich import box
    from rich.table import Table

    from bench.tune.measure import table_rows
    from toolkit.console import out

    table = Table("candidate", box=box.SIMPLE_HEAD, pad_edge=False)
    for load in plan.concurrencies:
        table.add_column(f"{load} in flight", justify="right")
    table.add_column("")
    for name, cells in table_rows(list(journal.trials.values()), plan.concurrencies):
        table.add_row(name, *cells)
    table.caption = "output tokens/s, * the most"
    out.print(table)
    for line in recommendation(profile):
        out.print(line, highlight=False, markup=False)


def recommendation(profile: Profile) -> list[str]:
    """Return what was found, a line a load: the winner, against vLLM's own settings and against fp16."""
    from serve.plan.candidates import DEFAULT

    lines, losing = [], []
    for load in profile.loads:
        name = profile.winner(load.concurrency)
        said = f"{load.concurrency} in flight: {name} ({profile.candidates[name]})"
        if DEFAULT in load.figures and name != DEFAULT:
            said += f", {load.figures[name] / load.figures[DEFAULT]:.2f}x vLLM's own settings"
        if load.fp16 is not None:
            factor = load.figures[name] / load.fp16
            said += f", {factor:.2f}x fp16"
            if factor < 1:
                losing.append(load.concurrency)
        lines.append(said)
    if losing and profile.key.format != "fp16":
        where = "at every load" if len(losing) == len(profile.loads) else f"at {', '.join(map(str, losing))} in flight"
        lines.append(f"fp16 is faster {where}: serve it there if it fits the card; AWQ then saves memory, not time.")
    names = {mode: profile.chosen(mode) for mode in ("latency", "throughput", "auto")}
    lines.append("--profile " + ", ".join(f"{mode}: {name}" for mode, name in names.items()))
    return lines


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str, str, int, int], None], Callable[[str], None]]]:
    """A bar over all loads of all candidates, with what the current one is doing; lines where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from toolkit.console import err, note

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        bar = bars.add_task("", total=None)
        current = ""

        def progress(name: str, step: str, done: int, total: int) -> None:
            nonlocal current
            current = name
            bars.update(bar, description=f"{name}: {step}", completed=done, total=total)
            if not err.is_terminal:
                note(f"{name}: {step} ({done}/{total})")

        def phase(said: str) -> None:
            bars.update(bar, description=f"{current}: {said}")

        yield progress, phase
