"""What `qvl VERB --help` looks like: the everyday options with their help, the others by name, within 80 columns.

`--help-all` explains all of them. An option is of every day where it stands under no heading (`Option(panel=...)`), or
under one that is `everyday("Name")`. Typer's own boxes cut long names at 80 columns and take brackets in a help text
for markup; here both stay as they are written.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["Verb", "Verbs", "everyday"]

#: Widest line, and the column at which what an option does begins.
_WIDEST, _COLUMN = 80, 30
_ALL = "--help-all"


class _Everyday(str):
    """A heading whose options are shown by `--help`."""


def everyday(panel: str) -> str:
    """Return a heading for options that `--help` explains too, though they stand under a heading."""
    return _Everyday(panel)


class Verbs(typer.Typer):
    """A group of verbs whose help is this module's."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """Register a verb; as typer's own, but for its help."""
        settings.setdefault("cls", Verb)
        return super().command(name, **settings)


class Verb(TyperCommand):
    """A verb with a short help and a long one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Answer `--help-all` before anything is required; leave the rest to typer."""
        if _ALL in (args[: args.index("--")] if "--" in args else args):
            typer.echo("\n".join(_lines(self, ctx, everything=True)))
            raise typer.Exit
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the short help."""
        formatter.write("\n".join(_lines(self, ctx, everything=False)))


def _lines(verb: Any, ctx: Any, everything: bool) -> Iterator[str]:
    width = min(_WIDEST, shutil.get_terminal_size().columns) if "COLUMNS" in os.environ else _WIDEST
    usage = f"Usage: {ctx.command_path} {' '.join(verb.collect_usage_pieces(ctx))}"
    yield from textwrap.wrap(usage, width, subsequent_indent="       ")
    for paragraph in re.split(r"\n\s*\n", verb.help or ""):
        yield ""
        yield from textwrap.wrap(" ".join(paragraph.split()), width)
    panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
    for parameter in verb.get_params(ctx):
        if not getattr(parameter, "hidden", False):
            own = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(parameter.rich_help_panel or own, []).append(parameter)
    others = []
    for panel, parameters in panels.items():
        if everything or panel in ("Arguments", "Options") or isinstance(panel, _Everyday):
            yield from _panel(panel, parameters, ctx, width)
            if panel == "Options" and len(panels) > 2:
                yield f"  {_ALL:{_COLUMN - 2}}Explain every option and exit."
        else:
            others.append((panel, parameters))
    if others:
        yield ""
        yield typer.style(f"More, explained by {ctx.command_path} {_ALL}:", bold=True)
    for panel, parameters in others:
        names = ", ".join(parameter.opts[0] for parameter in parameters)
        yield from textwrap.wrap(f"{panel}: {names}", width, initial_indent="  ", subsequent_indent="    ", **_WHOLE)


#: Names of options are not parted at their hyphens.
_WHOLE: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}


def _panel(name: str, parameters: list[Any], ctx: Any, width: int) -> Iterator[str]:
    records = [record for parameter in parameters if (record := parameter.get_help_record(ctx))]
    if not records:
        return
    yield ""
    yield typer.style(f"{name}:", bold=True)
    for shown, help in records:
        text = textwrap.wrap(" ".join(help.split()), width - _COLUMN, **_WHOLE) or [""]
        begin = f"  {shown}"
        if len(begin) > _COLUMN - 2:
            yield begin
        else:
            yield f"{begin:{_COLUMN}}{text.pop(0)}".rstrip()
        for line in text:
            yield f"{'':{_COLUMN}}{line}"
