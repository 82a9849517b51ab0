"""The docs site: it builds without a warning, loads nothing from elsewhere, and shows what the code has."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/_hooks/site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed: make setup")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_verb_and_option_is_in_the_reference(hooks: ModuleType) -> None:
    import typer.main

    from toolkit.cli import app

    page = hooks.command_line()
    sections = dict(re.findall(r"^## qvl (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    group = typer.main.get_command(app)
    shown = {name: command for name, command in group.commands.items() if not command.hidden}
    assert set(sections) == set(shown)
    for name, command in shown.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in sections[name], f"{name} {parameter.opts[0]}"
    assert "| `--group-size` | `int` | Inputs that share a scale: 32, 64, 128, or -1 for all. | `128` |" in page
    assert "| `--seed` | `int` | Seed of the draw of samples. | `0` |" in page


def test_every_setting_of_a_recipe_is_in_the_reference(hooks: ModuleType) -> None:
    from toolkit.quantize.recipe import Recipe, RunOptions

    page = hooks.recipe()
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == {*Recipe.model_fields, *RunOptions.model_fields}


def test_every_object_of_a_report_is_in_the_reference(hooks: ModuleType) -> None:
    from bench.report.schema import Report

    page = hooks.report()
    schema = Report.model_json_schema()
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == {"Report", *schema["$defs"]}
    for field in schema["properties"]:
        assert f"| `{field}` |" in page


def test_every_metric_of_ours_is_in_the_reference(hooks: ModuleType) -> None:
    named = {
        name.removesuffix("_total")
        for path in (ROOT / "serve").rglob("*.py")
        for name in re.findall(r"(?:Counter|Gauge|Histogram)\(\s*\"(qvl_\w+)\"", path.read_text())
    }
    assert {name.removesuffix("_total") for name in re.findall(r"^\| `(qvl_\w+)`", hooks.metrics(), re.M)} == named


def test_every_variable_of_ours_is_in_the_reference() -> None:
    page = (REFERENCE / "environment.md").read_text()
    used = {
        name
        for package in ("toolkit", "serve", "bench")
        for path in (ROOT / package).rglob("*.py")
        if path.parts[-2] != "chaos"
        for name in re.findall(r"\"(QVL_[A-Z_]+)\"", path.read_text())
    }
    assert used <= set(re.findall(r"`(QVL_[A-Z_]+)`", page)), "docs/reference/environment.md lacks a variable"


def test_every_example_is_on_the_site(hooks: ModuleType) -> None:
    page = hooks.examples()
    for script in (ROOT / "examples").glob("*.py"):
        assert script.read_text().rstrip() in page and f"| `{script.name}` |" in page
    assert "](" not in page.partition("## ")[0]


def test_a_link_out_of_the_site_becomes_text(hooks: ModuleType) -> None:
    class At:
        def __init__(self, src_uri: str) -> None:
            self.file = type("File", (), {"src_uri": src_uri})

    def shown(text: str, where: str) -> str:
        return str(hooks.on_page_markdown(text, At(where), None, None))

    assert shown("[plans](../serve/plans.json)", "kernels.md") == "plans"
    assert shown("[page](serving.md#logs)", "kernels.md") == "[page](serving.md#logs)"
    assert shown("[changes](../../CHANGELOG.md)", "operating/public.md") == "[changes](../changes.md)"


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "start.html", "operating.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text()
        assert "<!-- generated:" not in text, f"{page}: nothing was filled in"
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\"> ]+)", text)
        assert not [url for url in loaded if "w3.org" not in url], page
        run_in = re.search(r"\w[.)]\s+\d\. <strong>", text)
        assert run_in is None, f"{page}: an item of a list is in the middle of a paragraph: {run_in}"
