"""`--help` fits 80 columns, cuts nothing, and names every option; `--help-all` explains them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from toolkit.cli import app

VERBS: dict[str, Any] = {
    name: command for name, command in typer.main.get_command(app).commands.items() if not command.hidden
}


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("option", ["--help", "--help-all"])
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_it_fits_80_columns(verb: str, option: str) -> None:
    if not verb and option == "--help-all":
        pytest.skip("the group has one help")
    text = shown(*filter(None, [verb]), option)
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text, "something was cut"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_named_and_the_long_help_explains_it(verb: str) -> None:
    short, long = shown(verb, "--help"), " ".join(shown(verb, "--help-all").split())
    for parameter in VERBS[verb].params:
        if parameter.hidden or parameter.param_type_name == "argument":
            continue
        assert re.search(rf"{parameter.opts[0]}\b", short), parameter.opts
        assert " ".join((parameter.help or "").split()) in long, parameter.opts


def test_everyday_options_are_explained_and_the_others_named() -> None:
    text = shown("serve", "--help")
    assert (
        text.index("--port")
        < text.index("--api-key-file <str>")
        < text.index("More, explained by qvl serve --help-all")
    )
    assert text.index("More, explained by") < text.index("--max-json-depth") and "Levels of nesting" not in text
    assert "KEY [name= expires= scope= tokens-per-day=]" in " ".join(text.split()), "brackets stay"
    assert "Levels of nesting" in shown("serve", "--help-all")
    assert "--help-all" not in shown("ask", "--help"), "there is no more to say"


def test_what_follows_two_dashes_is_not_ours() -> None:
    done = CliRunner().invoke(app, ["serve", "nowhere", "--", "--help-all"])
    assert done.exit_code != 0 and "Usage" not in done.output
