"""Calls a group of commands as its command line would."""

from __future__ import annotations

import contextlib
import io
import subprocess

import pytest
import typer

from toolkit.console import run


def exit_code(app: typer.Typer, *arguments: object) -> int | str:
    """Run a command and return what its process would end with: a status, or a message for status 1."""
    with pytest.raises(SystemExit) as ended:
        run(app, [str(argument) for argument in arguments])
    return ended.value.code or 0


def called(app: typer.Typer, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves the seconds that a process of its own imports for; what it ends with
    and prints is as that one's."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = exit_code(app, *arguments)
    return subprocess.CompletedProcess(["qvl", *map(str, arguments)], int(status), out.getvalue(), err.getvalue())
