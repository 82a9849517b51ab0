"""Every command line in deploy/ is one that `qvl serve` takes, and every variable one that the project reads."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import typer.main

from serve.settings.config import is_loopback
from tests.unit.deploy.conftest import DEPLOY, ROOT, option, serve_commands, tool
from toolkit.cli import app

COMMANDS = serve_commands()


def parsed(command: list[str]) -> dict[str, Any]:
    """What `qvl serve` makes of the arguments. Raises UsageError for an option that it does not have."""
    serve: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    parameters: dict[str, Any] = serve.make_context("serve", list(command)).params
    return parameters


@pytest.mark.parametrize("where", COMMANDS)
def test_qvl_serve_takes_it(where: str) -> None:
    settings = parsed(COMMANDS[where])
    assert settings["model"].startswith(("/models/", "/srv/models/"))
    assert not settings["vllm_flags"]


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["/models/7b-awq", "--api-keys-file=x"])


@pytest.mark.parametrize("where", COMMANDS)
def test_whoever_listens_to_others_asks_for_keys(where: str) -> None:
    command = COMMANDS[where]
    assert option(command, "--api-key-file")
    assert "--insecure" not in command
    if where == "systemd":  # beside its TLS proxy
        assert is_loopback(option(command, "--host"))


def test_variables_are_ones_that_the_project_reads() -> None:
    text = "\n".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".json")
    named = set(re.findall(r"\bQVL_[A-Z_]+\b", text))
    source = "\n".join(path.read_text() for package in ("toolkit", "serve") for path in (ROOT / package).rglob("*.py"))
    assert named and {name for name in named if f'"{name}"' not in source} == set()


def test_yaml_is_clean() -> None:
    command = [tool("yamllint"), "--strict", "-c", str(DEPLOY / ".yamllint"), str(DEPLOY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
