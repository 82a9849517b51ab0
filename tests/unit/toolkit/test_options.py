"""A settings model makes its command line: names, defaults, help, what was given, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pytest
import typer
from pydantic import Field, field_validator, model_validator
from typer.testing import CliRunner

from toolkit.errors import FormatError, QvlError
from toolkit.options import Option, Settings, settings_as_options


class Sizes(Settings):
    error: ClassVar[type[QvlError]] = FormatError

    group_size: Annotated[int, Option("Inputs that share a scale.")] = 128
    clip: Annotated[bool, Option("Clip.", panel="Search")] = True
    force: Annotated[bool, Option("Replace.", asked=False)] = False
    way: Annotated[Literal["plain", "duo"], Option("The grid.")] = "plain"
    hosts: Annotated[tuple[str, ...], Option("A host.", name="--host")] = ()
    skip: Annotated[str | None, Option("A pattern.")] = None
    pair: Annotated[tuple[int, int], Option("A pair.", type=str, asked=lambda p: f"{p[0]}x{p[1]}")] = (1, 2)
    key: Annotated[str | None, Option("A key.", envvar="QVL_TEST_KEY", asked=False, instead="QVL_TEST_KEY")] = None
    inner: int = 7

    @field_validator("pair", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return tuple(int(part) for part in value.split("x")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size == 3:
            raise FormatError("groups of 3: choose 32, 64 or 128")
        return self


class Report(Settings):
    pages: Annotated[int, Option("How many.", before="skip")] = 1
    tall: Annotated[bool, Option("Tall.")] = False


@pytest.fixture
def seen() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def app(seen: list[tuple[Any, ...]]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @settings_as_options
    def verb(model: Annotated[str, typer.Argument()], sizes: Sizes, out: Annotated[Path, typer.Option()]) -> None:
        """Do it."""
        seen.append((model, sizes, out))

    return app


def run(app: typer.Typer, *arguments: str, **settings: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), **settings)


def test_defaults_are_the_models(app: typer.Typer, seen: list[tuple[Any, ...]]) -> None:
    assert run(app, "m", "--out", "d").exit_code == 0
    assert seen == [("m", Sizes(), Path("d"))]
    assert seen[0][1].model_fields_set == set()


def test_what_is_given_arrives(app: typer.Typer, seen: list[tuple[Any, ...]]) -> None:
    given = ["--group-size", "64", "--no-clip", "--force", "--way", "duo", "--host", "a", "--host", "b", "--skip", "x"]
    assert run(app, "m", *given, "--pair", "3x4", "--out", "d", env={"QVL_TEST_KEY": "k"}).exit_code == 0
    wanted = Sizes(group_size=64, clip=False, force=True, way="duo", hosts=("a", "b"), skip="x", pair=(3, 4), key="k")
    assert seen[0][1] == wanted
    assert seen[0][1].model_fields_set == set(Sizes.model_fields) - {"inner"}


def test_a_secret_on_the_command_line_is_warned_of(app: typer.Typer, seen: list[tuple[Any, ...]]) -> None:
    told = run(app, "m", "--out", "o", "--key", "sekrit").stderr
    assert told.startswith("warning: --key on the command line can be read by every user of this machine")
    assert "Give QVL_TEST_KEY instead" in told and "sekrit" not in told
    assert run(app, "m", "--out", "o", env={"QVL_TEST_KEY": "sekrit"}).stderr == ""
    assert [sizes.key for _, sizes, _ in seen] == ["sekrit", "sekrit"]


def test_the_help_has_them_all(app: typer.Typer) -> None:
    text = run(app, "--help", env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).output
    for part in ("--group-size", "128", "--clip", "--no-clip", "Search", "--host", "QVL_TEST_KEY", "A pair."):
        assert part in text
    assert "--inner" not in text and "--no-force" not in text


def test_a_validators_own_error_is_heard(app: typer.Typer) -> None:
    assert str(run(app, "m", "--group-size", "3", "--out", "d").exception) == "groups of 3: choose 32, 64 or 128"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"way": "x"}, "--way 'x': input should be 'plain' or 'duo'"),
        ({"hosts": 3}, "--host 3: input should be a valid tuple"),
        ({"nonsense": 1}, "nonsense is no setting of Sizes: choose among group_size, clip,"),
    ],
)
def test_what_pydantic_finds_is_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError) as caught:
        Sizes(**values)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_what_was_asked() -> None:
    assert Sizes(pair=(3, 4)).asked() == {
        "--group-size": "128",
        "--clip": "True",
        "--way": "plain",
        "--host": "()",
        "--skip": "None",
        "--pair": "3x4",
    }


def test_settings_survive_json() -> None:
    sizes = Sizes(hosts=("a",), pair=(5, 6))
    assert Sizes.model_validate_json(sizes.model_dump_json()) == sizes


def test_an_option_may_stand_elsewhere() -> None:
    @settings_as_options
    def verb(report: Report, sizes: Sizes) -> None: ...

    names = [name for name in inspect.signature(verb).parameters if name != "qvl_context"]
    assert names == ["tall", *["group_size", "clip", "force", "way", "hosts", "pages", "skip", "pair", "key"]]


def test_two_options_of_one_name_are_a_fault_of_the_code() -> None:
    with pytest.raises(TypeError, match="two options are called clip"):

        @settings_as_options
        def verb(clip: bool, sizes: Sizes) -> None: ...


class Bounds(Settings):
    most: Annotated[int, Option("The most.")] = 9
    key: Annotated[str | None, Option("A key.", asked=False)] = Field(None, repr=False)


class Whole(Settings):
    first: Annotated[int, Option("First.")] = 1
    shape: Annotated[str, Option("A shape.", default="auto")] = "round"
    bounds: Bounds | None = None
    last: Annotated[int, Option("Last.")] = 2

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Self:
        return cls(**{"shape": "found", **given})


def test_settings_within_settings() -> None:
    app, seen = typer.Typer(add_completion=False), []

    @app.command()
    @settings_as_options
    def verb(whole: Whole) -> None:
        seen.append(whole)

    parameters = typer.main.get_command(app).params
    assert [p.name for p in parameters] == ["first", "shape", "most", "key", "last"]
    assert run(app).exit_code == 0 and run(app, "--most", "3", "--shape", "flat").exit_code == 0
    assert seen == [Whole(shape="found", bounds=Bounds()), Whole(shape="flat", bounds=Bounds(most=3))]
    assert Whole().bounds is None and "auto" in run(app, "--help", env={"TERM": "dumb"}).output
    assert Whole(bounds=Bounds()).asked() == {"--first": "1", "--shape": "round", "--most": "9", "--last": "2"}


def test_a_changed_copy_is_checked() -> None:
    assert Sizes().replaced(clip=False) == Sizes(clip=False)
    with pytest.raises(FormatError, match="groups of 3"):
        Sizes().replaced(group_size=3)


def test_a_secret_is_not_said() -> None:
    with pytest.raises(QvlError, match=r"^--key: input should be a valid string$"):
        Bounds(key=5)
