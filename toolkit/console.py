"""What the command line looks like: rich on stderr for progress and notes, plain results on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import typer

__all__ = ["command_group", "err", "fail", "note", "out", "run", "warn"]

#: Columns of what is piped or kept in a file, where tables need not be cut to a terminal's.
_PIPED = 160


def _width() -> int | None:
    return None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _PIPED


#: Results that a script may read.
out = Console(soft_wrap=True, width=_width())
#: Progress, notes, warnings and errors.
err = Console(stderr=True, soft_wrap=True)


def note(message: str) -> None:
    """Print a note to stderr, dimmed; never part of a verb's result."""
    err.print(message, style="dim", highlight=False, markup=False)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    err.print(f"warning: {message}", style="yellow", highlight=False, markup=False)


def fail(message: str) -> None:
    """Print an error to stderr. The caller exits with 2."""
    err.print(f"error: {message}", style="bold red", highlight=False, markup=False)
    sys.stderr.flush()


def command_group(name: str, help: str) -> typer.Typer:
    """Return an empty group of commands that looks as all of this project's do."""
    import typer
    from typer.core import TyperGroup

    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        cls=TyperGroup,
    )


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Run a command line, the process's own unless ``arguments`` are given, and exit: a user's mistake prints one
    message and exits with 2 (3 where something could not be measured), never a traceback (``QVL_DEBUG=1`` shows it)."""
    from toolkit.errors import QvlError

    try:
        app(arguments)
    except QvlError as error:
        if os.environ.get("QVL_DEBUG"):
            raise
        fail(str(error))
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C, in silence
            fail("interrupted")
        raise
