"""The verbs of serve: serve, status, stop, ask. Heavy imports live inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.settings.ask import AskConfig
from serve.settings.config import DEFAULT_PORT, ServerConfig
from toolkit.options import settings_as_options

if TYPE_CHECKING:
    from serve.process.status import Status


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
    for verb in (serve, status, stop, ask):
        app.command(rich_help_panel="Server")(verb)


@settings_as_options
def serve(
    model: Annotated[str, typer.Argument(help="Directory, hub id (org/name), or 'demo' for the embedded model.")],
    config: ServerConfig,
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_FLAGS...]", help="Any further flags of `vllm serve`.")
    ] = None,
) -> None:
    """Serve a model with vLLM, fp16 or AWQ, behind an OpenAI-compatible API that is guarded against its clients.

    It is ready when it has answered a question about an image. Ctrl-C stops it; requests under way may finish.
    It is started again when it dies or hangs.
    """
    from serve.plan.tuned import tuned
    from serve.process import foreground
    from serve.process.supervisor import GaveUp
    from toolkit.console import fail
    from toolkit.errors import ServerError

    if vllm_flags and not vllm_flags[0].startswith("-"):
        raise ServerError(f"{vllm_flags[0]!r} after the model is not understood. Flags for vLLM come after -- .")
    config = config.replaced(extra=tuple(vllm_flags or ()))
    foreground.warn_of(config)
    config = tuned(model, config, foreground.voice(config))
    try:
        foreground.serve(model, config)
    except GaveUp as error:
        fail(str(error))
        raise typer.Exit(1) from None


def status(
    port: Annotated[int | None, typer.Option(help="Only the server on this port.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Show the servers that `qvl serve` has started on this machine."""
    import json
    from dataclasses import asdict

    from serve.process.status import known_server, known_servers
    from toolkit.console import note, out

    found = known_servers() if port is None else [known_server(port)]
    if as_json:
        typer.echo(json.dumps([asdict(server) for server in found], indent=1))
    elif not found:
        note("no server is running; start one with `qvl serve MODEL`")
    else:
        out.print(_table(found))


def _table(found: list[Status]) -> Any:
    from toolkit.tables import table

    names = ("port", "state", "model", "backend", "pid", "up", "memory", "directory")
    long = [names.index(name) for name in ("model", "backend", "directory")]
    shown = table(names, ruled=True, wrapped=long, fold=True)
    for server in found:
        up = "" if server.uptime is None else f"{server.uptime // 60:.0f}m{server.uptime % 60:02.0f}s"
        memory = "" if server.memory is None else f"{server.memory / (1 << 30):.1f} GiB"
        what = [str(server.port), server.state, server.model_name, server.backend, str(server.pid), up, memory]
        shown.add_row(*what, server.checkpoint + (f"\n{server.reason}" if server.reason else ""))
    return shown


def stop(
    port: Annotated[int, typer.Option(help="Port of the server to stop.")] = DEFAULT_PORT,
    everything: Annotated[bool, typer.Option("--all", help="Stop all servers that qvl has started.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Do not let requests under way finish.")] = False,
) -> None:
    """Stop a server that `qvl serve` has started; requests under way may finish."""
    from serve.process.lifecycle import stop as stop_server
    from serve.process.status import known_servers
    from toolkit.console import note, out

    known = known_servers() if everything else []
    ports = [server.port for server in known if server.state != "elsewhere"] if everything else [port]
    for server in known:
        if server.state == "elsewhere":
            note(f"port {server.port} is left alone: {server.reason}")
    if not ports:
        note("no server is running")
    for each in ports:
        before = stop_server(each, drain=not now)
        what = "forgot" if before.state == "dead" else "stopped"
        out.print(f"{what} {before.model_name} on port {each}", highlight=False)


@settings_as_options
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    config: AskConfig,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer, token counts and times as JSON, at the end.")
    ] = False,
) -> None:
    """Ask a question about images; the answer streams as it is written."""
    import json

    from serve.ask import ask as ask_server
    from serve.http.images import image_url
    from serve.process.trust import context_for
    from toolkit.console import warn

    url = config.url or _only_server()
    answer = ask_server(
        url,
        question,
        [image_url(source) for source in config.images],
        model=config.model,
        api_key=config.api_key,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        verify=context_for(url),
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
        warn(f"the answer was cut at {config.max_tokens} tokens: give a larger --max-tokens for all of it")


def _only_server() -> str:
    """Return where to ask when nothing was said: the only server that qvl has started, or the usual address."""
    from serve.process.state import load_all

    running = [server.url for server in load_all() if server.ready and server.alive]
    return running[0] if len(running) == 1 else f"http://127.0.0.1:{DEFAULT_PORT}"
