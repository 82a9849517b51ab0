"""The verb that compares a server with transformers: verify. Heavy imports live inside the functions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from bench.verify.settings import VerifySettings
from toolkit.options import settings_as_options

if TYPE_CHECKING:
    from bench.load.endpoint import Endpoint
    from serve.settings.config import ServerConfig

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""
    app.command(rich_help_panel="Measurement")(verify)


@settings_as_options
def verify(
    model: Annotated[str, typer.Argument(help="Directory, hub id or demo: what is served, in 16 bits or quantized.")],
    settings: VerifySettings,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare vLLM's answers with transformers' on your images, and name what makes them differ.

    The prompt's tokens, the sizes that images are brought to, the first token's log-probabilities, and greedy tokens
    until they part. Quantized weights run in transformers as the weights that they stand for, in float32. The key of a
    server is read from QVL_API_KEY.

    Exits 1 when they differ beyond what rounding does, 2 on a mistake.
    """
    from bench.verify.run import verify as run
    from bench.verify.samples import asked
    from bench.verify.served import ask
    from bench.verify.view import render
    from serve.settings.config import ServerConfig
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.checkpoint.problems import refuse_broken
    from toolkit.console import err
    from toolkit.console import out as stdout
    from toolkit.sources.directory import resolve

    checkpoint = Checkpoint.open(resolve(model))
    refuse_broken(checkpoint)
    config = ServerConfig(dtype=settings.dtype)
    dtype = config.dtype_for(checkpoint)
    with err.status("reading images") as status:
        chats = asked(settings.images, settings.samples, settings.question)
        with ExitStack() as running:
            endpoint = _endpoint(running, model, settings, config, status.update)
            served = []
            for chat in chats:
                status.update(f"the server answers {chat.where}")
                served.append(ask(endpoint, chat, settings.tokens))
        found = run(
            checkpoint,
            list(zip(chats, served, strict=True)),
            dtype=dtype,
            device=settings.device or _device(),
            on_sample=lambda where: status.update(f"transformers answers {where}"),
        )
    if json:
        stdout.print_json(data={"model": model, "server": endpoint.version, **found.to_dict()})
    else:
        stdout.print(render(found))
    if not found.same:
        raise typer.Exit(1)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _endpoint(
    running: ExitStack, model: str, settings: VerifySettings, config: ServerConfig, say: Callable[[str], None]
) -> Endpoint:
    """Return the server to ask: the one that was named, or one that is started and stopped with ``running``."""
    import asyncio
    import os

    from bench.load.endpoint import discover
    from bench.run.boot import booted, free_ports, server_of

    url, key = settings.url, os.environ.get("QVL_API_KEY") or None
    if url is None:
        options = config.replaced(port=free_ports(1)[0])
        start = server_of(model, options, lambda phase: say(f"the server starts: {phase}"))
        server = running.enter_context(booted({"candidate": start}, at_once=True))["candidate"]
        url, key = server.url, server.api_key
    return asyncio.run(discover(url, key, model=settings.name))
