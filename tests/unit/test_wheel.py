"""What is installed: everything that `qvl` needs, nothing of what is only run from a checkout."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

from tests.support.paths import ROOT

LEFT_OUT = ("bench.studies", "bench.chaos", "bench.micro")


@pytest.fixture(scope="module")
def packages() -> set[str]:
    """The packages that setuptools finds by pyproject.toml."""
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        found = read_configuration(ROOT / "pyproject.toml", expand=True)["tool"]["setuptools"]["packages"]
    finally:
        os.chdir(here)
    return set(found)


def imported(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_studies_chaos_and_micro_are_not_installed(packages: set[str]) -> None:
    assert {"bench", "bench.cli", "bench.report.render", "serve", "toolkit", "toolkit.demo"} <= packages
    assert not {name for name in packages if name.startswith(LEFT_OUT)}


def test_every_other_package_is_installed(packages: set[str]) -> None:
    there = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("toolkit", "serve", "bench")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert {name for name in there if not name.startswith(LEFT_OUT)} <= packages


def test_nothing_that_is_installed_imports_what_is_not(packages: set[str]) -> None:
    for package in packages:
        for module in (ROOT / package.replace(".", "/")).glob("*.py"):
            wrong = [name for name in imported(module) if name.startswith(LEFT_OUT)]
            assert not wrong, f"{module.relative_to(ROOT)} imports {wrong[0]}"
