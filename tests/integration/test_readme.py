"""README and guides: commands that exist, links that lead somewhere, targets that make knows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import typer.main

from tests.support.paths import ROOT
from toolkit.calibration.manifest import _read_line
from toolkit.cli import app

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/adr").glob("*.md")),
]
ISSUE_TARGETS = [
    "setup",
    "demo",
    "quantize",
    "convert",
    "inspect",
    "serve",
    "stop",
    "status",
    "ask",
    "bench",
    "compare",
    "test",
    "coverage",
    "lint",
    "format",
    "microbench",
    "gpu-bench",
    "quant-bench",
    "demo-model",
    "clean",
]


def commands(page: Path) -> list[str]:
    return re.findall(r"^ {4}(qvl .+)$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_shown_is_one_that_qvl_takes(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    for line in commands(page):
        verb, *words = shlex.split(line.split("  #")[0])[1:]
        command = group.commands[verb]
        command.make_context(verb, list(words))  # raises on an unknown option or a missing one


def test_the_readme_shows_commands() -> None:
    assert len(commands(PAGES[0])) >= 4


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/results/README.md"], ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_two_commands_and_all_targets_are_there() -> None:
    readme = PAGES[0].read_text()
    assert "    make demo " in readme and "    make test " in readme
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ISSUE_TARGETS:
        assert re.search(rf"^  {target}\s", shown, re.MULTILINE), target
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
    for variable in ("MODEL", "OUT", "FORMAT", "GROUP_SIZE", "CALIB", "PORT", "BACKEND", "REPORT"):
        assert re.search(rf"^  {variable}\s+\S", shown, re.MULTILINE), variable


def test_the_manifest_shown_in_the_guide_can_be_read() -> None:
    lines = re.findall(r"^ {4}(\{.+\})$", (ROOT / "docs/calibration.md").read_text(), re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        json.loads(line)
        _read_line(line, "guide", ROOT)


def test_help_is_complete_and_needs_no_torch() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"qvl {name}: {parameter.name} has no help"
    import sys

    code = "import sys, toolkit.cli; sys.exit(bool({'torch', 'transformers', 'vllm', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
