"""A verb's settings are one pydantic model; its command line, with help and defaults, is made from that model.

A field says what its option is called and what its help says, in the metadata of its annotation::

    class Recipe(Settings):
        group_size: Annotated[int, Option("Inputs that share a scale: 32, 64, 128, or -1 for all.")] = 128
        clip: Annotated[bool, Option("Search for clipped ranges too.", panel="Search")] = True

and a verb takes the model where it would take the options::

    @settings_as_options
    def quantize(model: ModelOption, out: OutOption, recipe: Recipe) -> None: ...

The order of options is that of the verb's parameters, a model's fields standing where the model stands, and those of a
field that holds a `Settings` of its own standing where that field stands. Only what was given on the command line (or
by an environment variable) is passed to the model: the rest are its own defaults, which `Settings.from_options` may
take from elsewhere, such as a preset.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from toolkit.errors import QvlError

__all__ = ["Option", "Settings", "settings_as_options"]

_CONTEXT = "qvl_context"
#: Where click finds a value that somebody gave; by name, for typer carries a click of its own.
_GIVEN = ("COMMANDLINE", "ENVIRONMENT", "PROMPT", "DEFAULT_MAP")


@dataclass(frozen=True, kw_only=True)
class _Option:
    help: str
    name: str | None
    panel: str | None
    metavar: str | None
    envvar: str | None
    type: Any
    least: int | float | None
    show_default: bool | str
    default: str | None
    hidden: bool
    before: str | None
    asked: bool | Callable[[Any], str]
    instead: str | None


def Option(
    help: str,
    *,
    name: str | None = None,
    panel: str | None = None,
    metavar: str | None = None,
    envvar: str | None = None,
    type: Any = None,
    least: int | float | None = None,
    show_default: bool | str = True,
    default: str | None = None,
    hidden: bool = False,
    before: str | None = None,
    asked: bool | Callable[[Any], str] = True,
    instead: str | None = None,
) -> _Option:
    """Say how a field of `Settings` stands on the command line.

    Args:
        help: what it does, in a line.
        name: the option, or ``--yes/--no`` for a flag with both; by default ``--field-name`` (a bool that is true by
            default gets ``--field-name/--no-field-name``).
        panel: heading of the help under which it stands.
        metavar: what stands for the value in the help.
        envvar: environment variable that sets it.
        type: what the command line reads, where the field holds something made from it; the field then needs a
            validator that takes both.
        least: smallest number that the command line takes; click refuses others.
        show_default: a text in place of the default, or False to show none.
        default: what the help shows as the default where `Settings.from_options` finds another than the model's.
        hidden: leave it out of the help.
        before: name of the verb's parameter or field before which the help has it, if not where its model stands.
        asked: whether it decides what comes out, so that it belongs into `Settings.asked`; or how it is written there.
        instead: where a secret belongs; whoever gives it on the command line, which every user of the machine can
            read, is told so.
    """
    return _Option(
        help=help,
        name=name,
        panel=panel,
        metavar=metavar,
        envvar=envvar,
        type=type,
        least=least,
        show_default=show_default,
        default=default,
        hidden=hidden,
        before=before,
        asked=asked,
        instead=instead,
    )


class Settings(BaseModel):
    """Base of the settings of a verb: frozen, no unknown names, one message for what can't be.

    A validator that raises a `QvlError` is heard as it is. For all else pydantic finds, ``error`` is raised with one
    line that names the option and the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="strings")

    #: The error raised for a value that is of no use.
    error: ClassVar[type[QvlError]] = QvlError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as found:
            raise self.error(_first(type(self), found)) from None

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings for what a command line gave, by the fields' names."""
        return cls(**given)

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like new settings; what was not given is not given in it."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    @classmethod
    def option(cls, field: str) -> str:
        """Return how a field's option is written: ``--group-size``."""
        return _spelling(field, cls.model_fields[field])

    def asked(self) -> dict[str, str]:
        """Return what decides the outcome, by the names of the options: two runs with equal ones asked for the same."""
        found: dict[str, str] = {}
        for name, field in type(self).model_fields.items():
            option = _of(field)
            if _inner(field) and isinstance(inner := getattr(self, name), Settings):
                found |= inner.asked()
            if option is None or option.asked is False:
                continue
            value = getattr(self, name)
            found[_spelling(name, field)] = option.asked(value) if callable(option.asked) else str(value)
        return found


def settings_as_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one option for each field of the `Settings` that its parameters name.

    The verb is then to be called by typer alone; its own signature stays at ``__wrapped__``.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = [
        inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    ]
    models: dict[str, type[Settings]] = {}
    moved: dict[str, str] = {}
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if inspect.isclass(kind) and issubclass(kind, Settings):
            models[parameter.name] = kind
            parameters += [_parameter(name, field) for name, field in _options(kind)]
            moved |= {name: o.before for name, field in _options(kind) if (o := _of(field)) and o.before}
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    doubled = {p.name for p in parameters if [q.name for q in parameters].count(p.name) > 1}
    if doubled:
        raise TypeError(f"{function.__name__}: two options are called {', '.join(sorted(doubled))}")
    for name, before in moved.items():
        parameter = parameters.pop([p.name for p in parameters].index(name))
        parameters.insert([p.name for p in parameters].index(before), parameter)

    @functools.wraps(function)
    def verb(**values: Any) -> None:
        context: typer.Context = values.pop(_CONTEXT)
        for name, model in models.items():
            values[name] = model.from_options(_given(model, values, context))
        function(**values)

    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


def _given(model: type[Settings], values: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """Take a model's options out of ``values``; return those that somebody gave, and settings that it holds."""
    given: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if inner := _inner(field):
            given[name] = inner.from_options(_given(inner, values, context))
        elif name in values:
            value = values.pop(name)
            source = getattr(context.get_parameter_source(name), "name", "")
            if source in _GIVEN:
                given[name] = value
            option = _of(field)
            if source == "COMMANDLINE" and option is not None and option.instead is not None:
                _warn_of(_spelling(name, field), option.instead)
    return given


def _warn_of(option: str, instead: str) -> None:
    text = f"{option} on the command line can be read by every user of this machine (ps). Give {instead} instead."
    typer.secho(f"warning: {text}", err=True, fg="yellow")


def _options(model: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields that are options, those of settings within settings too."""
    for name, field in model.model_fields.items():
        if inner := _inner(field):
            yield from _options(inner)
        elif _of(field):
            yield name, field


def _inner(field: FieldInfo) -> type[Settings] | None:
    """Return the settings that a field holds, if their fields are options."""
    union = get_origin(field.annotation) in (Union, types.UnionType)
    for kind in get_args(field.annotation) if union else (field.annotation,):
        if inspect.isclass(kind) and issubclass(kind, Settings) and any(_options(kind)):
            return kind
    return None


def _of(field: FieldInfo) -> _Option | None:
    return next((each for each in field.metadata if isinstance(each, _Option)), None)


def _spelling(name: str, field: FieldInfo) -> str:
    option = _of(field)
    given = option.name if option is not None else None
    return (given or f"--{name.replace('_', '-')}").split("/")[0]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    option = _of(field)
    assert option is not None
    kind = option.type if option.type is not None else _plain(field.annotation)
    default: Any = field.get_default(call_default_factory=True) if not field.is_required() else ...
    if default is PydanticUndefined:
        default = ...
    if option.default is not None:
        default = option.default
    repeated = get_origin(kind) is list
    if option.type is not None and not isinstance(default, str | int | float | Path | bool):
        default = [] if repeated else None
        kind = kind if repeated or default is not None else kind | None
    elif repeated:
        default = list(default or [])
    spelled = [option.name] if option.name else _flags(name, default)
    shown = option.show_default
    described = typer.Option(
        *spelled,
        help=option.help,
        rich_help_panel=option.panel,
        metavar=option.metavar,
        envvar=option.envvar,
        show_envvar=option.envvar is not None,
        show_default=shown,
        hidden=option.hidden,
        min=option.least,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, described],
        default=inspect.Parameter.empty if default is ... else default,
    )


def _flags(name: str, default: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    return [option] if default is not True else [f"{option}/--no-{option[2:]}"]


def _plain(annotation: Any) -> Any:
    """Return the type that typer reads for a field: choices are checked by the model, tuples are repeated options."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(parts[0])
    if origin is Literal:
        return type(parts[0])
    if origin in (tuple, list):
        return list[_plain(parts[0])]  # type: ignore[misc]
    if origin in (Union, types.UnionType):
        others = [_plain(part) for part in parts if part is not type(None)]
        if len(others) != 1:
            raise TypeError(f"{annotation} is more than one type: give the option a `type`")
        return others[0] if get_origin(others[0]) is list else others[0] | None
    return annotation


def _first(model: type[Settings], found: ValidationError) -> str:
    """Say the first thing that is wrong: the option, the value, and what pydantic has against it."""
    error = found.errors()[0]
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"{name} is no setting of {model.__name__}: choose among {', '.join(model.model_fields)}"
    where = _spelling(name, model.model_fields[name]) if name in model.model_fields else name
    what = error["msg"][:1].lower() + error["msg"][1:]
    shown = error["type"] != "missing" and (name not in model.model_fields or model.model_fields[name].repr)
    value = f" {error['input']!r}" if shown else ""
    return f"{where}{value}: {what}" if where else what
