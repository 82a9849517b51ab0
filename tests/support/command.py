"""Calls a group of commands as its command line would."""

from __future__ import annotations

import pytest
import typer

from toolkit.console import run


def exit_code(app: typer.Typer, *arguments: object) -> int | str:
    """Run a command and return what its process would end with: a status, or a message for status 1."""
    with pytest.raises(SystemExit) as ended:
        run(app, [str(argument) for argument in arguments])
    return ended.value.code or 0
