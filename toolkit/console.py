"""What the command line looks like: rich on stderr for progress and notes, plain results on stdout."""

from __future__ import annotations

import os
import sys

from rich.console import Console

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
