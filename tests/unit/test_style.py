"""Functions fit a screen: none is longer than 80 lines, docstring and all, unless it is named here with a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

LIMIT = 80
#: Longer functions, and why. What is to shrink is taken out of here when it has.
ALLOWED = {
    "bench.chaos.hostile.catalogue": "one long table of requests",
    "bench.cli.bench.bench": "to shrink: options come from a settings model",
    "bench.load.client.ask": "to shrink",
    "bench.report.build.build": "to shrink",
    "bench.run.session.run": "to shrink",
    "bench.tune.cli.tune": "to shrink: options come from a settings model",
    "serve.cli.serve": "to shrink: options come from a settings model",
    "serve.process.lifecycle.start": "to shrink",
    "toolkit.quantize.run.quantize": "to shrink: options come from Recipe",
    "toolkit.quantize.worker.run": "to shrink",
    "toolkit.verbs.quantize": "to shrink: options come from Recipe",
}


@pytest.mark.parametrize("package", ["bench", "deploy", "serve", "tests", "toolkit"])
def test_functions_fit_a_screen(package: str) -> None:
    """The names on the list too: one that fits is taken off it."""
    long = {name: lines for name, lines in _lengths(package) if lines > LIMIT}
    allowed = {name for name in ALLOWED if name.startswith(f"{package}.")}
    assert set(long) == allowed, f"longer than {LIMIT} lines: {long}, allowed: {allowed}"


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
