"""The variables of a server's environment are named in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import serve
from serve.settings import environment

ROOM = Path(serve.__file__).parent


@pytest.mark.parametrize("folder", ["app", "guard", "http"])
def test_no_module_spells_a_variable_itself(folder: str) -> None:
    spelt = [
        f"{path.name}:{node.lineno}: {node.value}"
        for path in sorted((ROOM / folder).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch("(QVL|VLLM)_[A-Z_]+", node.value)
    ]
    assert not spelt


def test_every_variable_is_in_the_table() -> None:
    assert environment.__doc__ is not None
    rows = set(re.findall(r"^\| ([A-Z_]+) ", environment.__doc__, re.MULTILINE))
    assert rows == set(environment.__all__)
