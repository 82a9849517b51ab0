"""What `qvl tune` is told: its command line, and what a tuning that goes on must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, field_validator, model_validator

from bench.load.workload import ImageSize, parse_sizes
from bench.run.config import parse_concurrencies
from toolkit.errors import BenchError, QvlError
from toolkit.options import Option, Settings

__all__ = ["TuneConfig"]

#: Requests of a load for each that is in flight, at least.
_WAVES = 3
_LOADS, _SIZES = "1,8,32,128", "448x448"


class TuneConfig(Settings):
    """The settings of `qvl tune`.

    Attributes:
        concurrencies: requests in flight, a load each.
        fp16: the 16-bit model, which is measured too.
        requests: measured requests a load, at least three times as many as are in flight.
        output_tokens: exact length of each answer.
        image_sizes: of the requests' images, in turn.
        questions: file of questions that are asked instead; answers then end by themselves, or at ``output_tokens``.
        only: names of candidates, with commas.
        lossy: try settings that change answers.
        boot_timeout_s: seconds until a server must be ready.
        shared: measure although others use a GPU.
        restart: forget what was measured before.
        timeout_s: seconds a request may take.
    """

    error: ClassVar[type[QvlError]] = BenchError
    model_config = ConfigDict(validate_default=True)

    concurrencies: Annotated[
        tuple[int, ...],
        Option("Requests in flight, a load each.", name="--concurrency", type=str, default=_LOADS),
    ] = parse_concurrencies(_LOADS)
    fp16: Annotated[
        str | None, Option("The 16-bit model, measured beside it with vLLM's own settings.", metavar="MODEL")
    ] = None
    minutes: Annotated[float, Option("Begin nothing after so long; called again, it goes on.")] = 60.0
    requests: Annotated[int, Option("Requests a load, and at least three times as many as are in flight.")] = 64
    output_tokens: Annotated[int, Option("Exact length of answers.")] = 128
    image_sizes: Annotated[
        tuple[ImageSize, ...], Option("Images, WIDTHxHEIGHT,... or text.", type=str, default=_SIZES)
    ] = parse_sizes(_SIZES)
    questions: Annotated[
        Path | None, Option("FILE.jsonl of questions to ask instead; then guesses from n-grams are tried too.")
    ] = None
    only: Annotated[str | None, Option("Candidates to try, by name, with commas.")] = None
    lossy: Annotated[bool, Option("Try settings that change answers: KV cache in fp8.")] = False
    tp: Annotated[int, Option("GPUs that split the weights.")] = 1
    max_model_len: Annotated[int | None, Option("Longest sequence in tokens.")] = None
    backend: Annotated[str | None, Option("cpu or gpu (what is installed and found).")] = None
    boot_timeout_s: Annotated[float, Option("Seconds until a server must be ready.", name="--boot-timeout")] = 600.0
    shared: Annotated[bool, Option("Measure although others use a GPU.")] = False
    restart: Annotated[bool, Option("Discard what was measured before.")] = False
    out: Annotated[Path | None, Option("Directory for the profile (where `qvl serve` looks).")] = None
    fail_if_left: Annotated[bool, Option("Exit 3 when the time was up.")] = False
    as_json: Annotated[bool, Option("Print the profile and the trials as JSON.", name="--json")] = False

    # No option:
    timeout_s: float = 300.0

    @field_validator("concurrencies", "image_sizes", mode="before")
    @classmethod
    def _read(cls, value: Any, field: Any) -> Any:
        read = {"concurrencies": parse_concurrencies, "image_sizes": parse_sizes}
        return read[field.field_name](value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise BenchError("--concurrency: tuning needs loads, such as 1,8,32.")
        if self.requests < 1 or self.output_tokens < 2:
            raise BenchError(
                "give --requests of at least 1 and --output-tokens of at least 2: one has no time a token."
            )
        return self

    def requests_at(self, concurrency: int) -> int:
        """Return the measured requests of a load; fewer than three waves would be a burst."""
        return max(self.requests, _WAVES * concurrency)

    def load(self) -> dict[str, Any]:
        """Return what decides the figures of a candidate, as JSON has it: figures of equal loads are kept."""
        names = {"concurrencies", "requests", "output_tokens", "image_sizes", "timeout_s"}
        questions = str(self.questions.resolve()) if self.questions else None
        return self.model_dump(include=names) | {"questions": questions}
