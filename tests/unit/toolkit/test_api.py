"""The public API: typed for users, light to import, and the same however its package came to be imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit
from toolkit.paths import source_root

_SCRIPT = """
from pathlib import Path

from toolkit import Inspection, QvlError, Recipe, convert, inspect, merge, quantize

made: Path = convert("awq", Path("gemv"), to="gemv", force=True)
merged: Path = merge(Path("base"), "adapter", "out")
found: Inspection = inspect("demo", deep=True)
recipe = Recipe(samples=32, search="moments")
quantized: Path = quantize("demo", "awq", recipe=recipe, force=True)
again: Path = quantize("demo", Path("awq"), samples=32)
if found.broken:
    print([problem.message for problem in found.problems], QvlError)
"""


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(source_root())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, toolkit; print([m for m in ('torch', 'pydantic', 'rich', 'typer') if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("first", ["", "import toolkit.quantize.recipe", "from toolkit import quantize"])
def test_quantize_is_called_however_its_package_was_imported(first: str) -> None:
    code = f"{first}\nfrom toolkit import quantize\nimport toolkit.quantize.recipe\nprint(callable(quantize))"
    assert python(code) == "True"


def test_all_public_names_are_there() -> None:
    for name in toolkit.__all__:
        assert getattr(toolkit, name) is not None, name
        assert name in dir(toolkit)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = toolkit.nonesuch  # type: ignore[attr-defined]
    for function in (toolkit.convert, toolkit.merge, toolkit.inspect):
        documented = inspect.getdoc(function) or ""
        assert "Args:" in documented and "Raises:" in documented and "Returns:" in documented
        assert all(f"{name}: " in documented for name in inspect.signature(function).parameters)


def test_they_do_what_the_verbs_do(tmp_path: Path) -> None:
    assert not toolkit.inspect("demo").broken
    with pytest.raises(toolkit.QvlError, match="no such directory"):
        toolkit.inspect(tmp_path / "nothing")
    with pytest.raises(toolkit.QvlError, match="16-bit weights"):
        toolkit.convert("demo", tmp_path / "out", "gemv")
    with pytest.raises(toolkit.QvlError, match="is no LoRA adapter"):
        toolkit.merge("demo", tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_users_script_is_type_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    good, bad, config = tmp_path / "good.py", tmp_path / "bad.py", tmp_path / "mypy.ini"
    good.write_text(_SCRIPT)
    wrong = {'to="gemv"': 'to="gemm2"', '"demo", deep=True': "7", "samples=32, search": "samples=[], search"}
    wrong |= {'"awq", recipe=recipe': '"awq", recipe="fast"', 'Path("awq"), samples=32': 'Path("awq"), samples="32"'}
    script = _SCRIPT
    for right, not_right in wrong.items():
        assert right in script
        script = script.replace(right, not_right)
    bad.write_text(script)
    # large packages that no signature needs are not read: that would take a minute
    config.write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*,numpy.*,PIL.*,rich.*]\nfollow_imports = skip\n"
        "[mypy-safetensors.*,peft.*,qwen_vl_utils.*]\nignore_missing_imports = True\n"
    )
    monkeypatch.setenv("MYPYPATH", str(source_root()))
    said, _, code = api.run(["--config-file", str(config), "--cache-dir", os.devnull, str(good), str(bad)])
    errors = [line for line in said.splitlines() if ": error:" in line]
    assert code == 1 and len(errors) == len(wrong), said
    assert all("[arg-type]" in line and "bad.py" in line for line in errors), said


@pytest.mark.parametrize("package", ["toolkit", "serve", "bench"])
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (source_root() / package / "py.typed").is_file()
