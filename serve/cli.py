"""The verbs of serve: serve, status, stop, ask. Heavy imports live inside the functions."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from serve.lifecycle import OnPhase, Server, Status

_DEFAULT_PORT = 8000


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
    app.command(rich_help_panel="Server")(serve)
    app.command(rich_help_panel="Server")(status)
    app.command(rich_help_panel="Server")(stop)
    app.command(rich_help_panel="Server")(ask)


def serve(
    model: Annotated[str, typer.Argument(help="A directory, a hub name, or demo (the embedded model).")],
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_FLAGS...]", help="Any further flags of `vllm serve`.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = _DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
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
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16 or float32 to compute in (bfloat16; float16 for small models)."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="cpu or gpu (QVL_BACKEND, else what is installed and found).")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="QVL_API_KEY", show_envvar=True, help="Key that requests to /v1 must bring.")
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
) -> None:
    """Serve a model with vLLM, fp16 or AWQ, behind an OpenAI-compatible API.

    It is ready when it has answered a question about a picture. Ctrl-C stops it; requests under way may finish.
    """
    from serve.lifecycle import start
    from serve.options import ServeOptions
    from toolkit.console import warn
    from toolkit.errors import ServerError

    if vllm_flags and not vllm_flags[0].startswith("-"):
        raise ServerError(f"{vllm_flags[0]!r} after the model is not understood. Flags for vLLM come after -- .")
    options = ServeOptions(
        host=host,
        port=port,
        backend=backend,  # type: ignore[arg-type]  # checked by ServeOptions
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        served_model_name=served_model_name,
        dtype=dtype,
        api_key=api_key,
        timeout=timeout,
        compile=compile,
        extra=tuple(vllm_flags or ()),
    )
    if host not in ("127.0.0.1", "localhost", "::1") and options.api_key is None:
        warn(f"anyone who reaches {host}:{port} can use this server: give --api-key, or keep to 127.0.0.1")
    with _stopped_by_signals():
        with _progress(f"{model} on port {port}") as on_phase:
            server = start(model, options, on_phase=on_phase, attached=not detach)
        if detach:
            _announce(server, f"qvl stop --port {port}")
        else:
            _stay(server)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that what cleans up after one does after all."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup stays
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _announce(server: Server, how_to_stop: str) -> None:
    from toolkit.console import note, out

    out.print(f"ready: {server.model_name} at {server.url}/v1 after {server.boot_seconds:.0f} s", highlight=False)
    note(f"log: {server.log}\nask:  qvl ask --url {server.url} --image PICTURE QUESTION\nstop: {how_to_stop}")


def _stay(server: Server) -> None:
    """Show the server's log until it ends or Ctrl-C; a second Ctrl-C does not wait for requests under way."""
    from serve.log import follow
    from toolkit.console import err, note
    from toolkit.errors import ServerError

    _announce(server, "Ctrl-C")
    try:
        for line in follow(server.log, while_true=server.running):
            err.print(line, style="dim", highlight=False, markup=False)
    except KeyboardInterrupt:
        note("stopping: requests under way may finish, Ctrl-C again cuts them off")
        try:
            server.stop()
        except KeyboardInterrupt:
            server.stop(drain=False)
        note("stopped")
        return
    server.stop()  # forget it, and end what its processes may have left
    if server.wait() != 0:
        raise ServerError(f"vLLM ended by itself (exit status {server.wait()}). Its log is {server.log}")


def status(
    port: Annotated[int | None, typer.Option(help="Only the server on this port.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Show the servers that `qvl serve` has started on this machine."""
    import json
    from dataclasses import asdict

    from serve import lifecycle
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
    from serve import lifecycle
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
    from serve.media import image_url
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
    from serve.state import load_all

    running = [server.url for server in load_all() if server.ready and server.alive]
    return running[0] if len(running) == 1 else f"http://127.0.0.1:{_DEFAULT_PORT}"
