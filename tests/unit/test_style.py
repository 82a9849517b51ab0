"""Functions fit a screen: none is longer than 80 lines, docstring and all, unless it is named here with a reason.

Parameters, statements and branches are ruff's to count; here only that its list of exceptions holds nothing that fits.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LIMIT = 80
#: Longer functions, and why. What is to shrink is taken out of here when it has.
ALLOWED = {
    "bench.chaos.hostile.catalogue": "one long table of requests",
}


@pytest.mark.parametrize("package", ["bench", "deploy", "serve", "tests", "toolkit"])
def test_functions_fit_a_screen(package: str) -> None:
    """The names on the list too: one that fits is taken off it."""
    long = {name: lines for name, lines in _lengths(package) if lines > LIMIT}
    allowed = {name for name in ALLOWED if name.startswith(f"{package}.")}
    assert set(long) == allowed, f"longer than {LIMIT} lines: {long}, allowed: {allowed}"


def test_what_ruff_lets_pass_is_over_its_limits() -> None:
    """Files that were shrunk are taken off the list in pyproject.toml."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    listed = {file: codes for file, codes in lint["per-file-ignores"].items() if file.endswith(".py")}
    limits = {
        "lint.pylint.max-args": lint["pylint"]["max-args"],
        "lint.pylint.max-statements": lint["pylint"]["max-statements"],
        "lint.mccabe.max-complexity": lint["mccabe"]["max-complexity"],
    }
    options = [word for name, value in limits.items() for word in ("--config", f"{name}={value}")]
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--exit-zero", "--output-format", "json"]
    ran = subprocess.run(
        [*ruff, *options, "--select", "C901,PLR0913,PLR0915", *listed],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    over = {(Path(found["filename"]).relative_to(ROOT).as_posix(), found["code"]) for found in json.loads(ran.stdout)}
    assert {(file, code) for file, codes in listed.items() for code in codes} <= over


def _lengths(package: str) -> Iterator[tuple[str, int]]:
    """Yield every function's full name and its lines, from its def to its end."""
    for path in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        todo: list[tuple[str, ast.AST]] = [(module, ast.parse(path.read_text(encoding="utf-8")))]
        while todo:
            name, node = todo.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{name}.{node.name}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield name, node.end_lineno - node.lineno + 1
            todo += ((name, child) for child in ast.iter_child_nodes(node))
