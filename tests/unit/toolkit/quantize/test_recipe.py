"""A recipe: what it stands for, what it refuses, and that the call, the command line and qvl.json are made from it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from toolkit import verbs
from toolkit.errors import FormatError, ManifestError
from toolkit.quantize import Recipe, RunOptions, quantize, run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Recipe, RunOptions]]:
    """What runs were asked for, none of which happens."""
    found: list[tuple[str, Path, Recipe, RunOptions]] = []

    def taken(model: str, out: Path, recipe: Recipe, options: RunOptions) -> Path:
        found.append((model, out, recipe, options))
        return out

    monkeypatch.setattr(run, "run", taken)
    return found


def test_the_rounding_goes_with_the_search() -> None:
    assert Recipe().rounding == "compensated"
    assert Recipe(search="autoawq").rounding == "nearest"
    assert Recipe(rounding="nearest").rounding == "nearest"


def test_the_best_effort_takes_more_samples_where_no_number_is_given() -> None:
    assert (Recipe().samples, Recipe(effort="best").samples, Recipe(effort="best", samples=9).samples) == (128, 512, 9)


def test_no_bound_on_pixels() -> None:
    assert Recipe(max_pixels=0).max_pixels is None and Recipe(max_pixels=None).max_pixels is None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"search": "x"}, FormatError, "unknown search 'x': choose moments or autoawq"),
        ({"scaling": "trio"}, FormatError, "unknown scaling 'trio': choose plain or duo or none"),
        ({"rounding": "up"}, FormatError, "unknown rounding 'up': choose nearest or compensated"),
        ({"balance": 3}, FormatError, "unknown balance 3: choose none or modality"),
        ({"samples": 0}, ManifestError, "0 calibration samples: at least 1 is needed, 128 is usual"),
        ({"search": "autoawq", "balance": "modality"}, FormatError, "AutoAWQ's search rounds to nearest"),
        ({"search": "autoawq", "effort": "best"}, FormatError, "--effort best goes on from compensated rounding"),
        ({"rounding": "nearest", "effort": "best"}, FormatError, "--effort best goes on from compensated rounding"),
        ({"scaling": "duo"}, FormatError, "--scaling duo is of AutoAWQ's search, and --search moments tries both"),
        ({"scaling": "plain", "search": "moments"}, FormatError, "--scaling plain is of AutoAWQ's search"),
        (
            {"scaling": "duo", "effort": "best"},
            FormatError,
            "--scaling duo is of AutoAWQ's search, and --search moments",
        ),
        ({"scaling": "none", "search": "autoawq"}, FormatError, "--scaling none is of --search moments"),
        ({"budget": 0.2}, FormatError, "--budget 0.2 is for the layers that a report says to leave in 16 bits: add"),
        ({"sample": 3}, FormatError, "sample is no setting of Recipe: choose among format, group_size,"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Recipe(**settings)
    assert str(caught.value).startswith(message)


def test_what_belongs_together_is_taken(tmp_path: Path) -> None:
    assert Recipe(search="autoawq", scaling="duo").scaling == "duo"
    assert Recipe(scaling="none").scaling == Recipe(effort="best").scaling == "none"
    assert Recipe(from_report=tmp_path / "layers.json", budget=0.2).budget == 0.2
    changed = Recipe(samples=3).replaced(seed=7)  # nobody gave a scaling or a budget
    assert (changed.samples, changed.seed, changed.scaling, changed.budget) == (3, 7, "plain", 0.1)
    assert Recipe(samples=3).replaced(search="autoawq").rounding == "nearest"


@pytest.mark.parametrize("given", [["--scaling", "duo"], ["--budget", "0.1"]])
def test_an_option_without_its_partner_is_refused(asked: list[Any], given: list[str]) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(verbs.quantize)
    done = CliRunner().invoke(app, ["--model", "demo", "--out", "o", *given])
    assert isinstance(done.exception, FormatError) and "\n" not in str(done.exception)
    assert asked == []


def test_what_qvl_json_records() -> None:
    assert list(Recipe(max_pixels=0).recorded().items()) == [
        ("format", "gemm"),
        ("bits", 4),
        ("group_size", 128),
        ("search", "moments"),
        ("effort", "fast"),
        ("distill", False),
        ("scaling", "plain"),
        ("clip", True),
        ("rounding", "compensated"),
        ("balance", "none"),
        ("vision", "16bit"),
        ("lm_head", False),
        ("skip", None),
        ("samples", 128),
        ("max_tokens", 4096),
        ("max_pixels", None),
        ("seed", 0),
    ]


def test_settings_may_be_given_as_keywords(asked: list[Any]) -> None:
    quantize("demo", "out", samples=32, format="gemv", force=True, devices="cpu")
    quantize("demo", Path("out"), recipe=Recipe(samples=32, format="gemv"), force=True, devices="cpu")
    expected = ("demo", Path("out"), Recipe(samples=32, format="gemv"), RunOptions(force=True, devices="cpu"))
    assert asked == [expected, expected]
    with pytest.raises(TypeError, match="a recipe was given, and seed, skip beside it"):
        quantize("demo", "out", recipe=Recipe(), seed=1, skip="x")


def test_the_signature_has_every_setting() -> None:
    found = inspect.signature(quantize).parameters
    assert list(found)[:2] == ["model", "out"]
    assert set(found) == {"model", "out", "recipe", *Recipe.model_fields, *RunOptions.model_fields}
    assert found["group_size"].default == 128


def test_the_command_line_makes_the_recipe(asked: list[Any]) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(verbs.quantize)
    given = ["--group-size", "64", "--no-clip", "--search", "autoawq", "--max-pixels", "0", "--adapter", "a", "--force"]
    done = CliRunner().invoke(app, ["--model", "demo", "--out", "o", *given, "--layers-report", "r.json"])
    assert done.exit_code == 0 and done.output == "o\n"
    recipe = Recipe(group_size=64, clip=False, search="autoawq", max_pixels=None, adapter=Path("a"))
    assert asked == [("demo", Path("o"), recipe, RunOptions(force=True, layers_report=Path("r.json")))]
    assert recipe.rounding == "nearest"


def test_the_helps_order() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(verbs.quantize)
    env = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    lines = CliRunner().invoke(app, ["--help"], env=env).output.splitlines()
    options = [word for line in lines for word in line.split() if word.startswith("--")]
    own = "model out format group-size bits calib samples adapter revision max-tokens max-pixels seed"
    this_run, searching = (
        "devices force restart dry-run verdict no-verdict help",
        "search effort distill no-distill scaling clip no-clip rounding balance",
    )
    mixed = "vision lm-head skip layers-report from-report budget"
    assert options == [f"--{name}" for part in (own, this_run, searching, mixed) for name in part.split()]
