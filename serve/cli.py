"""The verbs of serve: serve, status, stop, ask. Heavy imports live inside the functions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from serve.process.lifecycle import OnPhase, Server, Status
    from serve.process.supervisor import Booted, Supervisor

_DEFAULT_PORT = 8000
_GUARD, _OPERATION, _PAGE, _SPEED = "Guard", "Operation", "Page", "Speed"


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
    app.command(rich_help_panel="Server")(_with_limits(serve))
    app.command(rich_help_panel="Server")(status)
    app.command(rich_help_panel="Server")(stop)
    app.command(rich_help_panel="Server")(ask)


def serve(
    model: Annotated[str, typer.Argument(help="A directory, a hub name, or demo (the embedded model).")],
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_FLAGS...]", help="Any further flags of `vllm serve`.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = _DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all, which takes a key or --insecure.")
    ] = "127.0.0.1",
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is ready, and leave it running.")] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest sequence in tokens, pictures included (4096 on a CPU, 16384 on a GPU)."),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences computed together (8 on a CPU, vLLM's choice on a GPU).")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of GPU memory (on the CPU: of host memory) to take; 0.9 on a GPU.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that requests ask for (the directory's name).")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="LoRA adapter to serve as a model of that name; repeat for several."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16 or float32 to compute in (bfloat16; float16 for small models)."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="cpu or gpu (QVL_BACKEND, else what is installed and found).")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it must be ready.")] = 600.0,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the model: slower to start, faster to answer (on a GPU only).",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="auto, latency or throughput: settings that were measured here; off.", rich_help_panel=_SPEED
        ),
    ] = "auto",
    tp: Annotated[int, typer.Option(help="GPUs that split every layer.", rich_help_panel=_SPEED)] = 1,
    dp: Annotated[int, typer.Option(help="Copies of the model, on GPUs of their own.", rich_help_panel=_SPEED)] = 1,
    pp: Annotated[int, typer.Option(help="Stages, each with some of the layers.", rich_help_panel=_SPEED)] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread over the machines of a Ray cluster.", rich_help_panel=_SPEED)
    ] = False,
    play: Annotated[
        bool, typer.Option("--play", help="Serve a page to try it, at /play.", rich_help_panel=_PAGE)
    ] = False,
    play_beside: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Another server, which the page asks side by side.", rich_help_panel=_PAGE),
    ] = None,
    drain: Annotated[
        str, typer.Option(help="How long requests under way may take when it is stopped.", rich_help_panel=_OPERATION)
    ] = "30s",
    restarts: Annotated[
        int,
        typer.Option(
            min=0, help="Restarts of a dead server within 10 minutes; 0 never does.", rich_help_panel=_OPERATION
        ),
    ] = 5,
    probe_every: Annotated[
        str,
        typer.Option(help="Longest time until it is asked whether it still answers.", rich_help_panel=_OPERATION),
    ] = "15s",
    probe_timeout: Annotated[
        str, typer.Option(help="Within this it must have answered.", rich_help_panel=_OPERATION)
    ] = "20s",
    log_format: Annotated[
        str,
        typer.Option(help="text, or json for one object a line (json without a terminal).", rich_help_panel=_OPERATION),
    ] = "auto",
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen where others reach it, without a key.", rich_help_panel=_GUARD),
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_API_KEY", show_envvar=True, help="Key that requests must bring.", rich_help_panel=_GUARD
        ),
    ] = None,
    **limits: Any,
) -> None:
    """Serve a model with vLLM, fp16 or AWQ, behind an OpenAI-compatible API that is guarded against its clients.

    It is ready when it has answered a question about a picture. Ctrl-C stops it; requests under way may finish.
    It is started again when it dies or hangs.
    """
    import sys

    from serve.plan.tuned import tuned
    from serve.process.supervisor import GaveUp, Policy, stopped_by_signals, supervisor
    from serve.process.supervisor import detach as start_detached
    from serve.settings.config import ServeOptions
    from serve.settings.limits import Limits
    from serve.settings.lora import Lora
    from serve.settings.parallel import Parallel
    from toolkit.console import fail, note
    from toolkit.errors import ServerError

    if vllm_flags and not vllm_flags[0].startswith("-"):
        raise ServerError(f"{vllm_flags[0]!r} after the model is not understood. Flags for vLLM come after -- .")
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() or detach else "json"
    guard = Limits(**limits)
    options = ServeOptions(
        host=host,
        port=port,
        backend=backend,  # type: ignore[arg-type]  # checked by ServeOptions
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        served_model_name=served_model_name,
        loras=tuple(Lora.parse(each) for each in lora or ()),
        dtype=dtype,
        api_key=api_key,
        guard=guard,
        insecure=insecure,
        play=play,
        play_beside=play_beside,
        timeout=timeout,
        drain=_seconds("--drain", drain),
        probe_every=_seconds("--probe-every", probe_every),
        probe_timeout=_seconds("--probe-timeout", probe_timeout),
        log_format=log_format,  # type: ignore[arg-type]  # checked by ServeOptions
        compile=compile,
        parallel=Parallel(tp=tp, dp=dp, pp=pp, ray=ray),
        extra=tuple(vllm_flags or ()),
    )
    options = tuned(model, options, profile, note if log_format == "text" else _say_json)  # type: ignore[arg-type]
    what = f"{model} on port {port}"
    policy = Policy(restarts=restarts)
    with stopped_by_signals():
        if detach:
            with _progress(what) as on_phase:
                booted = start_detached(model, options, policy, on_phase)
            _announce(booted, f"qvl stop --port {port}")
            return
        with contextlib.ExitStack() as boot:
            on_phase = boot.enter_context(_progress(what))
            own = supervisor(model, options, policy, note if log_format == "text" else _say_json, on_phase)
            try:
                _stay(own, boot)
            except GaveUp as error:
                fail(str(error))
                raise typer.Exit(1) from None


def _say_json(text: str) -> None:
    from serve.http.logs import line, write

    write(line("warning", "qvl.supervisor", text))


def _with_limits(function: Any) -> Any:
    """Let a function's `**limits` be one command-line option for each of the guard's limits, from their metadata."""
    from dataclasses import fields

    from serve.settings.limits import Limits

    signature = inspect.signature(function, eval_str=True)
    parameters = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    for limit in fields(Limits):
        if "option" not in limit.metadata or limit.name in signature.parameters:
            continue
        default = limit.default
        kind: Any = list[str] if isinstance(default, tuple) else str | None if default is None else type(default)
        option = typer.Option(limit.metadata["option"], help=limit.metadata["help"], rich_help_panel=_GUARD)
        default = [] if isinstance(default, tuple) else default
        parameters.append(
            inspect.Parameter(
                limit.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
            )
        )
    function.__signature__ = signature.replace(parameters=parameters)
    return function


def _seconds(option: str, text: str) -> float:
    """Read a time such as 30s, 2m or 45; raises ServerError."""
    from toolkit.errors import ServerError

    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise ServerError(f"{option} {text}: give a time such as 30s or 2m.") from None


@contextlib.contextmanager
def _progress(what: str) -> Iterator[OnPhase]:
    """Show the phase of a boot and the seconds since its start: one live line,
    or a line a phase where there is no terminal.
    """
    from toolkit.console import err, note

    if err.is_terminal:
        with err.status(f"starting {what}") as live:
            yield lambda phase, seconds: live.update(f"starting {what}: {phase} ({seconds:.0f} s)")
        return
    seen: list[str] = []

    def report(phase: str, seconds: float) -> None:
        if seen[-1:] != [phase]:
            seen.append(phase)
            note(f"starting {what}: {phase} ({seconds:.0f} s)")

    yield report


def _announce(server: Booted | Server, how_to_stop: str) -> None:
    from toolkit.console import note, out

    out.print(f"ready: {server.model_name} at {server.url}/v1 after {server.boot_seconds:.0f} s", highlight=False)
    note(f"log: {server.log}\nask:  qvl ask --url {server.url} --image PICTURE QUESTION\nstop: {how_to_stop}")


def _stay(own: Supervisor, boot: contextlib.ExitStack) -> None:
    """Run the server and show its log until Ctrl-C; a second Ctrl-C does not wait for requests under way.

    `boot` is closed when the server is ready for the first time.
    """
    import sys
    import threading

    from serve.process.bootlog import follow
    from serve.process.lifecycle import Drained, Server
    from serve.process.supervisor import Supervised
    from toolkit.console import note

    stopped = threading.Event()
    printer: threading.Thread | None = None

    def show(log: Path) -> None:
        for text in follow(log, while_true=lambda: not stopped.is_set()):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def up(server: Supervised) -> None:
        nonlocal printer
        boot.close()
        assert isinstance(server, Server)
        _announce(server, "Ctrl-C")
        printer = threading.Thread(target=show, args=(server.log,), daemon=True)
        printer.start()

    own.up = up
    try:
        own.run()
    except Drained:
        note("stopped")
    except KeyboardInterrupt:
        if own.server is None:
            raise
        note("stopping: requests under way may finish, Ctrl-C again cuts them off")
        try:
            own.server.stop()
        except KeyboardInterrupt:
            own.server.stop(drain=False)
        note("stopped")
    finally:
        stopped.set()
        if printer is not None:
            printer.join(timeout=2)


def status(
    port: Annotated[int | None, typer.Option(help="Only the server on this port.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Show the servers that `qvl serve` has started on this machine."""
    import json
    from dataclasses import asdict

    from serve.process import lifecycle
    from toolkit.console import note, out

    found = lifecycle.statuses() if port is None else [lifecycle.status(port)]
    if as_json:
        typer.echo(json.dumps([asdict(server) for server in found], indent=1))
    elif not found:
        note("no server is running; start one with `qvl serve MODEL`")
    else:
        out.print(_table(found))


def _table(found: list[Status]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("port", "state", "model", "backend", "pid", "up", "memory", "directory"):
        table.add_column(column, overflow="fold", no_wrap=column in ("port", "state", "pid", "up", "memory"))
    for server in found:
        up = "" if server.uptime is None else f"{server.uptime // 60:.0f}m{server.uptime % 60:02.0f}s"
        memory = "" if server.memory is None else f"{server.memory / (1 << 30):.1f} GiB"
        what = [str(server.port), server.state, server.model_name, server.backend, str(server.pid), up, memory]
        table.add_row(*what, server.checkpoint + (f"\n{server.reason}" if server.reason else ""))
    return table


def stop(
    port: Annotated[int, typer.Option(help="Port of the server to stop.")] = _DEFAULT_PORT,
    everything: Annotated[bool, typer.Option("--all", help="Stop all servers that qvl has started.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Do not let requests under way finish.")] = False,
) -> None:
    """Stop a server that `qvl serve` has started; requests under way may finish."""
    from serve.process import lifecycle
    from toolkit.console import note, out

    ports = [server.port for server in lifecycle.statuses()] if everything else [port]
    if not ports:
        note("no server is running")
    for each in ports:
        before = lifecycle.stop(each, drain=not now)
        what = "forgot" if before.state == "dead" else "stopped"
        out.print(f"{what} {before.model_name} on port {each}", highlight=False)


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Picture to ask about, a file or URL; repeat for several.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The server (the one that `qvl serve` has started, else http://127.0.0.1:8000)."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="QVL_API_KEY", show_envvar=True, help="The server's key, if it wants one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask (the first that the server lists).")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer, token counts and times as JSON, at the end.")
    ] = False,
) -> None:
    """Ask a question about pictures; the answer streams as it is written."""
    import json

    from serve.ask import ask as ask_server
    from serve.http.images import image_url
    from toolkit.console import warn

    images = [image_url(source) for source in image or []]
    answer = ask_server(
        url or _only_server(),
        question,
        images,
        model=model,
        api_key=api_key,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    try:
        for piece in answer:
            if not as_json:
                typer.echo(piece, nl=False)
    finally:
        if not as_json and answer.text:
            typer.echo()
    if as_json:
        typer.echo(json.dumps(answer.as_dict(), ensure_ascii=False, indent=1))
    elif answer.finish_reason == "length":
        warn(f"the answer was cut at {max_tokens} tokens: give a larger --max-tokens for all of it")


def _only_server() -> str:
    """Return where to ask when nothing was said: the only server that qvl has started, or the usual address."""
    from serve.process.state import load_all

    running = [server.url for server in load_all() if server.ready and server.alive]
    return running[0] if len(running) == 1 else f"http://127.0.0.1:{_DEFAULT_PORT}"
