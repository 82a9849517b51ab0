"""README and guides: commands that exist, links that lead somewhere, targets that make knows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main

from bench.chaos.cli import app as chaos
from bench.studies.cli import app as studies
from tests.support.paths import ROOT
from toolkit.calibration.manifest import _read_line
from toolkit.cli import app
from toolkit.demo.cli import app as demo

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "results" not in p.parts),
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


#: What a page may show, and the group of commands that it calls.
PROGRAMS = {
    "qvl": app,
    "python -m bench.studies": studies,
    "python -m bench.chaos": chaos,
    "python -m toolkit.demo": demo,
}


def commands(page: Path) -> list[tuple[str, str]]:
    """Return the program and the rest of each command that a page shows, in a block or in a sentence."""
    shown = page.read_text()
    programs = "|".join(map(re.escape, PROGRAMS))
    blocks = re.findall(rf"^ {{4}}({programs}) (.+)$", shown, re.MULTILINE)
    return blocks + re.findall(r"`(python -m [a-z]+\.[a-z]+) ([a-z-]+)[^`]*`", shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_shown_is_one_that_qvl_takes(page: Path) -> None:
    for program, line in commands(page):
        group = typer.main.get_command(PROGRAMS[program])
        assert isinstance(group, click.Group) or hasattr(group, "commands")
        verb, *words = shlex.split(line.split("  #")[0])
        command = group.commands[verb]
        if not words and program != "qvl":
            continue  # it is named, not called
        command.make_context(verb, list(words))  # raises on an unknown option or a missing one


def test_the_readme_shows_commands_and_fits_120_lines() -> None:
    assert len(commands(PAGES[0])) >= 4
    assert len(PAGES[0].read_text().splitlines()) <= 120


def test_the_readme_s_first_screen_says_what_how_fast_and_where_to_start() -> None:
    lines = PAGES[0].read_text().splitlines()
    first = "\n".join(lines[:24])
    for part in ("4-bit", "docs/images/speed.svg", "times the tokens", "GiB", "divergence", "make setup", "make demo"):
        assert part in first, part
    assert any("slower" in line for line in lines[:10]), "a loss stands beside the gain"


def test_the_quick_start_is_part_of_getting_started() -> None:
    """Which a test runs word for word (tests/e2e/test_start.py): whoever has read both runs nothing twice."""
    quick = PAGES[0].read_text().partition("## Quick start")[2].partition("## ")[0]
    shown = re.findall(r"^ {4}(qvl .+)$", quick, re.MULTILINE)
    whole = re.findall(r"^ {4}(qvl .+)$", (ROOT / "docs/start.md").read_text(), re.MULTILINE)
    assert len(shown) == 4 and [line for line in whole if line in shown] == shown


def test_the_first_page_of_the_docs_quotes_the_readme() -> None:
    """Its figures are README's, which are the reports'."""
    readme = PAGES[0].read_text()
    figures = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])|\d+%|\d+ s\b", (ROOT / "docs/index.md").read_text()))
    assert len(figures) >= 8
    assert {figure for figure in figures if figure not in readme} == set()


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_complete_and_needs_no_torch(program: str) -> None:
    group = typer.main.get_command(PROGRAMS[program])
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            if not command.hidden:
                assert getattr(parameter, "help", None), f"{program} {name}: {parameter.name} has no help"
    module = "toolkit.cli" if program == "qvl" else f"{program.split()[-1]}.cli"
    heavy = "{'torch', 'transformers', 'vllm', 'matplotlib'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
