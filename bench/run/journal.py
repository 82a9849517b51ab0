"""What a `qvl bench` has measured so far, on disk as it comes: an interrupted run goes on from it.

A file of JSON lines in the report's directory: first what was asked for, then each answer, each pass of fidelity, each
block of load. It is written when there is something to keep, and goes when the report is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from bench.load.client import Trace
from bench.questions.observe import Observed
from bench.roles import Role
from bench.run.loads import Load
from bench.run.measured import Measurements, Observer, Stretch
from toolkit.errors import BenchError

__all__ = ["JOURNAL", "Journal"]

#: The file, in the directory of the report that is to come.
JOURNAL = "run.jsonl"
VERSION = 1


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class _Settings(_Line):
    kind: Literal["settings"] = "settings"
    version: int = VERSION
    settings: dict[str, str]


class _Answer(_Line):
    kind: Literal["answer"] = "answer"
    role: Role
    question: str
    trace: Trace


class _Unit(_Line):
    kind: Literal["unit"] = "unit"
    role: Role
    unit: str
    round: int
    stretches: list[tuple[Load, Stretch]]

    @field_validator("stretches", mode="before")
    @classmethod
    def _without_what_was_dropped(cls, given: list[Any]) -> list[Any]:
        """Let a run go on that was begun when servers were asked how busy they had been."""
        for _, stretch in given:
            if isinstance(stretch, dict) and stretch.get("server"):
                stretch["server"].pop("busy_before", None)
        return given


class _Observed(_Line):
    kind: Literal["observed"] = "observed"
    who: Observer
    observed: Observed


_LINES: TypeAdapter[_Settings | _Answer | _Unit | _Observed] = TypeAdapter(
    Annotated[_Settings | _Answer | _Unit | _Observed, Field(discriminator="kind")]
)


class Journal:
    """Keeps measurements in ``directory``; `bench.run.measure.Keep`.

    Args:
        settings: what was asked for, by the names of the options.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.file = directory / JOURNAL
        self._settings = dict(settings)
        self._out: TextIO | None = None

    def resume(self) -> Measurements:
        """Return what was measured before.

        Raises:
            BenchError: nothing was kept, something else was asked for then (it says what), or the file is damaged.
        """
        try:
            lines = self.file.read_bytes().split(b"\n")
        except FileNotFoundError as error:
            raise BenchError(f"--resume: {self.file.parent} holds no interrupted run; start one without it") from error
        if lines[-1]:
            # The process was killed while it wrote: the line is not whole, and nothing is written behind it.
            self.file.write_bytes(b"\n".join([*lines[:-1], b""]))
        found = Measurements()
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = _LINES.validate_json(line)
            except ValidationError as error:
                raise BenchError(f"{self.file}:{number}: damaged; start anew with --force") from error
            if isinstance(entry, _Settings):
                self._check(entry)
            elif isinstance(entry, _Answer):
                found.answers.setdefault(entry.role, {})[entry.question] = entry.trace
            elif isinstance(entry, _Unit):
                found.units[entry.role, entry.unit, entry.round] = entry.stretches
            else:
                found.observed[entry.who] = entry.observed
        return found

    def _check(self, before: _Settings) -> None:
        if before.version != VERSION:
            raise BenchError(f"{self.file} was written by another version of qvl; start anew with --force")
        names = [*before.settings, *(name for name in self._settings if name not in before.settings)]
        changed = [
            f"{name} was {before.settings.get(name, 'not given')}, is {self._settings.get(name, 'not given')}"
            for name in names
            if before.settings.get(name) != self._settings.get(name)
        ]
        if changed:
            raise BenchError(
                f"--resume: this is not what was interrupted: {'; '.join(changed)}. Repeat the command as it was, or "
                "start anew with --force"
            )

    def answer(self, role: Role, question: str, trace: Trace) -> None:
        """Keep an answer to a question."""
        self._write(_Answer(role=role, question=question, trace=trace))

    def unit(self, role: Role, unit: str, round_: int, stretches: Sequence[tuple[Load, Stretch]]) -> None:
        """Keep a unit of a round."""
        self._write(_Unit(role=role, unit=unit, round=round_, stretches=list(stretches)))

    def observed(self, who: Observer, observed: Observed) -> None:
        """Keep a pass of fidelity."""
        self._write(_Observed(who=who, observed=observed))

    def close(self) -> None:
        """Let go of the file."""
        if self._out:
            self._out.close()
            self._out = None

    def _write(self, line: _Line) -> None:
        try:
            if self._out is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                new = not self.file.exists()
                self._out = self.file.open("a", encoding="utf-8")
                if new:
                    self._out.write(_Settings(settings=self._settings).model_dump_json() + "\n")
            self._out.write(line.model_dump_json() + "\n")
            self._out.flush()
        except OSError as error:
            raise BenchError(f"{self.file} can't be written: {error.strerror or error}") from error
