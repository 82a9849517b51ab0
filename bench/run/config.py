"""What `qvl bench` is told: its command line, what a resumed run must equal, and what a report says was asked."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from bench.load.objectives import Slo, parse_slos
from bench.load.workload import Arrivals, ImageSize, Lengths, parse_lengths, parse_sizes, written
from bench.questions.lmms_eval import CAPS
from bench.questions.scoring import Scoring
from bench.roles import Role
from bench.run import presets
from bench.run.loads import SWEEP, WAVES, Load
from toolkit.errors import BenchError, QvlError
from toolkit.help import everyday
from toolkit.options import Option, Settings

if TYPE_CHECKING:
    from bench.load.inputs import SpeedInputs

__all__ = ["DEMO", "NONE", "BenchConfig", "is_url", "parse_concurrencies"]

DEMO = "demo"
NONE = "none"

_ACCURACY, _FIDELITY, _SPEED, _SERVERS = everyday("Accuracy"), "Fidelity", "Speed", "Servers"
#: What requests look like that are made.
_MADE = ("preset", "image_sizes", "images_per_request", "prompt_tokens", "turns", "shared_prefix")
_FULL, _QUICK = presets.load("full"), presets.load("quick")


def is_url(source: str) -> bool:
    """Whether a system is given by the URL of its server."""
    return source.strip().lower().startswith(("http://", "https://"))


def parse_concurrencies(text: str) -> tuple[int, ...]:
    """Read ``1,4,16``, ascending, or ``none``.

    Raises:
        BenchError: on anything else.
    """
    if text.strip() == NONE:
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise BenchError(f"--concurrency {text!r}: write whole numbers with commas, e.g. 1,4,16, or none") from error


def _parse_rates(text: str) -> tuple[float, ...]:
    return _numbers(text, f"--rate {text!r}: write requests per second with commas, e.g. 2,4,8")


def _parse_speeds(text: str) -> tuple[float, ...]:
    return _numbers(text, f"--replay {text!r}: write speeds with commas, e.g. 1 or 1,2")


def _numbers(text: str, otherwise: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as error:
        raise BenchError(otherwise) from error


def _by_preset(field: str) -> str:
    """The two defaults of an option, for its help."""
    return f"default {_FULL.get(field, 'all')}; --quick {_QUICK[field]}"


def _listed(write: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda values: ",".join(map(write, values)) or NONE


def _number(value: float) -> str:
    return f"{value:g}"


def _key(help: str, variable: str) -> Any:
    """The option of an API key, which belongs into an environment variable: `ps` shows arguments."""
    return Option(help, envvar=variable, panel=_SERVERS, asked=False, instead=f"the environment variable {variable}")


class BenchConfig(Settings):
    """The settings of `qvl bench`. What is not given is the preset's: ``full.toml``, or ``quick.toml`` with ``quick``;
    image sizes and lengths are the use's where ``preset`` names one.

    Attributes:
        baseline: a directory, a hub id, ``demo``, or the URL of a server; likewise ``candidate``.
        tasks: ``demo``, ``none``, a file of questions, or a set of `datasets.LAYOUTS` as ``NAME[:SOURCE][@SPLIT]``.
        per_task: at most so many questions of each task; None takes all.
        answer_tokens: longest answer to a question; by lmms-eval's rules the limit of the set there.
        scoring: whose rules answers are scored by: ``paper`` or ``lmms-eval``.
        question_concurrency: questions in flight.
        margin: a loss of accuracy that would not matter, in points, above 0.
        fidelity: so many of the questions are taken for fidelity; 0 for none.
        images: a directory of images that fidelity is measured on, instead of on the questions.
        image_prompt: what is asked about each of them.
        concurrencies: requests kept in flight, one speed point each; none by default where there are rates or a sweep.
        rates: requests/s in an open loop, one speed point each.
        arrivals: of open loops; ``gamma`` where a burstiness is given.
        burstiness: shape of the gamma distribution of the gaps between arrivals, as vllm bench serve names it.
        traffic: requests of the user's own: a manifest of chats, a directory of images, or a recorded trace.
        replays: so many times as fast as recorded, the trace's requests at their own times, one speed point each.
        sweep: whether each system is measured up to its own saturation.
        sweep_concurrency: requests in flight that saturate a server, in a sweep.
        requests: measured requests a point and system, over all rounds; more at high concurrency.
        duration_s: seconds that a point is measured in each round, instead of so many requests.
        ramp_s: seconds in which a load grows before it is measured.
        rounds: each point is measured so often, the two systems taking turns in alternating order.
        slos: for goodput.
        exports: how each request under load is written down beside the report.
        price: of the machine of each server, an hour, in any currency.
        image_sizes: of the images in speed runs.
        images_per_request: in speed runs.
        prompt_tokens: of each prompt in speed runs, without its images.
        output_tokens: exact length of each answer in speed runs, at least 2 (one token has no TPOT).
        turns: of each chat in speed runs; later turns have the earlier ones before them.
        shared_prefix: tokens of a system's message that all prompts of a run begin with.
        timeout_s: seconds a request may take.
        baseline_key: in place of ``api_key``; likewise ``candidate_key``.
        baseline_model: None: the first that its server has; likewise ``candidate_model``.
        sequential: servers that this run starts never live at the same time.
        sweep_rates: open-loop rates of a sweep.
        top_k: likeliest tokens per position, for fidelity.
        fidelity_tokens: longest answer that is read for fidelity.
        nonce: makes this run's speed inputs new to a server that outlives it.
    """

    error: ClassVar[type[QvlError]] = BenchError
    model_config = ConfigDict(validate_default=True)

    baseline: Annotated[str, Option("What to measure against: DIR, hub id, demo, or the URL of a server.")]
    candidate: Annotated[str, Option("What is judged: DIR, hub id, demo, or the URL of a server.")]
    out: Annotated[Path, Option("Directory for report.json, report.md and report.html; must not exist.", asked=False)]
    force: Annotated[bool, Option("Replace an existing report.", asked=False)] = False
    resume: Annotated[
        bool, Option("Go on with a run that was interrupted or failed; the same command.", asked=False)
    ] = False
    quick: Annotated[bool, Option("Smaller defaults: the demo on two cores in a few minutes.", asked=False)] = False

    tasks: Annotated[
        str,
        Option(
            "demo, FILE.jsonl, or none to measure speed alone; docvqa, chartqa, textvqa or mmmu, from the hub or "
            "as NAME:DIR_OR_HUB_ID@SPLIT (default demo, none with --images).",
            metavar="QUESTIONS",
            panel=_ACCURACY,
            show_default=False,
        ),
    ] = DEMO
    per_task: Annotated[
        int | None, Option(f"Questions of each task ({_by_preset('per_task')}).", panel=_ACCURACY, least=1)
    ] = _FULL.get("per_task")
    answer_tokens: Annotated[
        int, Option(f"Longest answer ({_by_preset('answer_tokens')}).", panel=_ACCURACY, show_default=False)
    ] = _FULL["answer_tokens"]
    scoring: Annotated[
        Scoring,
        Option(
            "Rules to score by: paper, or lmms-eval's own, with its limits of tokens.", panel=_ACCURACY, asked=False
        ),
    ] = "paper"
    question_concurrency: Annotated[int, Option("Questions in flight.", panel=_ACCURACY)] = 4
    margin: Annotated[float, Option("Loss, in points, that would not matter.", panel=_ACCURACY, asked=_number)] = 1.0
    seed: Annotated[int, Option("Seed for drawing questions and for bootstraps.", panel=_ACCURACY)] = 0

    # What fidelity is measured on is in `asked` by its SHA-256.
    fidelity: Annotated[
        int,
        Option(
            f"Questions whose answers are compared token by token, 0 for none ({_by_preset('fidelity')}).",
            panel=_FIDELITY,
            show_default=False,
            asked=False,
        ),
    ] = _FULL["fidelity"]
    images: Annotated[
        Path | None,
        Option("Compare token by token on your images instead.", metavar="DIR", panel=_FIDELITY),
    ] = None
    image_prompt: Annotated[
        str, Option("Question to ask about each of these images.", panel=_FIDELITY, asked=False)
    ] = "Describe this picture."

    concurrencies: Annotated[
        tuple[int, ...],
        Option(
            f"Requests in flight, a point each, or none ({_by_preset('concurrencies')}; none with --rate or --sweep).",
            name="--concurrency",
            type=str,
            panel=_SPEED,
            show_default=False,
            asked=_listed(str),
        ),
    ] = _FULL["concurrencies"]
    rates: Annotated[
        tuple[float, ...],
        Option(
            "Requests due each second, a point each, such as 2,4,8.",
            name="--rate",
            type=str,
            panel=_SPEED,
            asked=_listed(_number),
        ),
    ] = ()
    arrivals: Annotated[Arrivals, Option("poisson or constant: when they are due under a rate.", panel=_SPEED)] = (
        "poisson"
    )
    burstiness: Annotated[
        float,
        Option("Below 1 they come in bursts: shape of gamma gaps; 1 is poisson.", panel=_SPEED, asked=False),
    ] = 1.0
    traffic: Annotated[
        Path | None,
        Option(
            "Your own requests: chats (JSONL as for --calib), a directory of images, or a recorded trace.",
            metavar="PATH",
            panel=_SPEED,
            asked=False,
        ),
    ] = None
    replays: Annotated[
        tuple[float, ...],
        Option(
            "Send the trace's requests at their own times, a point each: 1, or 1,2 for twice as fast too.",
            name="--replay",
            type=str,
            panel=_SPEED,
            asked=False,
        ),
    ] = ()
    sweep: Annotated[
        bool,
        Option(
            f"One request at a time, then saturation, then rates between ({_by_preset('sweep_rates')}).", panel=_SPEED
        ),
    ] = False
    sweep_concurrency: Annotated[
        int,
        Option(
            f"Requests in flight that saturate a server ({_by_preset('sweep_concurrency')}).",
            panel=_SPEED,
            show_default=False,
            asked=False,
        ),
    ] = _FULL["sweep_concurrency"]
    requests: Annotated[
        int,
        Option(
            f"Requests under each load, for each system ({_by_preset('requests')}).", panel=_SPEED, show_default=False
        ),
    ] = _FULL["requests"]
    duration_s: Annotated[
        float | None,
        Option("Seconds to measure each load for in a round, instead of --requests.", name="--duration", panel=_SPEED),
    ] = None
    ramp_s: Annotated[
        float,
        Option("Seconds in which a load grows before it is measured.", name="--ramp", panel=_SPEED, asked=_number),
    ] = 0.0
    rounds: Annotated[
        int,
        Option(
            f"Rounds in which both systems take turns under each load ({_by_preset('rounds')}).",
            panel=_SPEED,
            show_default=False,
        ),
    ] = _FULL["rounds"]
    slos: Annotated[
        tuple[Slo, ...],
        Option(
            "Objectives for goodput: ttft, tpot, e2e, as ttft=200ms,tpot=30ms.",
            name="--slo",
            type=str,
            panel=_SPEED,
            asked=_listed(str),
        ),
    ] = ()
    preset: Annotated[
        str | None,
        Option(
            "chat, ocr-document or multi-image: images and lengths by use; the four options below change them.",
            panel=_SPEED,
            asked=False,
        ),
    ] = None
    image_sizes: Annotated[
        tuple[ImageSize, ...],
        Option(
            f"Images, WIDTHxHEIGHT,... or text ({_by_preset('image_sizes')}).",
            type=str,
            panel=_SPEED,
            show_default=False,
            asked=_listed(written),
        ),
    ] = _FULL["image_sizes"]
    images_per_request: Annotated[
        Lengths,
        Option(
            f"Images of a request: 2, or 1-4 (default {_FULL['images_per_request']}).",
            type=str,
            panel=_SPEED,
            show_default=False,
        ),
    ] = _FULL["images_per_request"]
    prompt_tokens: Annotated[
        Lengths,
        Option(
            f"Length of prompts: 64, 32-128 (uniform), or lognormal:MEDIAN:SIGMA (default {_FULL['prompt_tokens']}).",
            type=str,
            panel=_SPEED,
            show_default=False,
        ),
    ] = _FULL["prompt_tokens"]
    output_tokens: Annotated[
        Lengths,
        Option(
            f"Exact length of answers, likewise ({_by_preset('output_tokens')}).",
            type=str,
            panel=_SPEED,
            show_default=False,
        ),
    ] = _FULL["output_tokens"]

    turns: Annotated[
        int,
        Option("Turns of a chat, each with the earlier ones before it.", panel=_SPEED, least=1, asked=False),
    ] = 1
    shared_prefix: Annotated[
        int,
        Option("Tokens of a system prompt that all requests begin with.", panel=_SPEED, least=0, asked=False),
    ] = 0

    exports: Annotated[
        tuple[Literal["csv", "parquet"], ...],
        Option(
            "Write each request under load to requests.csv, requests.parquet beside the report: csv, parquet or both.",
            name="--export",
            type=str,
            panel=_SPEED,
            asked=False,
        ),
    ] = ()
    price: Annotated[
        float | None,
        Option("What the server's machine costs an hour: shown as cost per million tokens.", panel=_SPEED, asked=False),
    ] = None
    timeout_s: Annotated[
        float, Option("Seconds a request may take.", name="--timeout", panel=_SERVERS, asked=_number)
    ] = 120.0
    api_key: Annotated[
        str | None,
        _key("Key for servers given by URL.", "QVL_API_KEY"),
        Field(repr=False),
    ] = None
    baseline_key: Annotated[
        str | None,
        _key("Key of the baseline's server alone.", "QVL_BASELINE_KEY"),
        Field(repr=False),
    ] = None
    candidate_key: Annotated[
        str | None,
        _key("Key of the candidate's server alone.", "QVL_CANDIDATE_KEY"),
        Field(repr=False),
    ] = None
    baseline_model: Annotated[
        str | None,
        Option("Which of its models, by its name there, where the baseline is a URL.", panel=_SERVERS, asked=False),
    ] = None
    candidate_model: Annotated[
        str | None,
        Option("Which of its models, by its name there, where the candidate is a URL.", panel=_SERVERS, asked=False),
    ] = None
    sequential: Annotated[bool, Option("One server at a time, when both do not fit.", panel=_SERVERS)] = False
    port: Annotated[
        int | None,
        Option("First port of servers started here (default: free ones).", panel=_SERVERS, asked=False),
    ] = None
    serve_arguments: Annotated[
        tuple[str, ...],
        Option(
            "vLLM argument of servers started here, such as --serve-arg=--max-num-seqs=16. Repeatable.",
            name="--serve-arg",
            metavar="ARG",
            panel=_SERVERS,
            asked=lambda arguments: " ".join(arguments) or NONE,
        ),
    ] = ()

    # No options:
    sweep_rates: int = _FULL["sweep_rates"]
    top_k: int = 20
    fidelity_tokens: int = 64
    nonce: str = Field(default_factory=lambda: secrets.token_hex(8))

    # --- reading ------------------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Take what was not given from the presets."""
        values = presets.load("quick").copy() if given.get("quick") else {}
        values |= presets.workload(given["preset"]) if given.get("preset") is not None else {}
        if given.get("rates") or given.get("sweep") or given.get("replays"):
            values["concurrencies"] = ()
        if given.get("burstiness", 1.0) != 1.0:
            values["arrivals"] = "gamma"
        if given.get("traffic") is not None:
            made = [field for field in _MADE if field in given]
            if made:
                raise BenchError(f"--traffic has requests of its own: leave out {', '.join(map(cls.option, made))}")
        if given.get("images") is not None:
            values["tasks"] = NONE
        if given.get("scoring") == "lmms-eval":
            limit = CAPS.get(re.split("[:@]", str(given.get("tasks", "")))[0])
            values |= {"answer_tokens": limit} if limit else {}
        return values | given

    @field_validator("exports", mode="before")
    @classmethod
    def _read_exports(cls, value: Any) -> Any:
        kinds = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
        if not set(kinds) <= {"csv", "parquet"}:
            raise BenchError(f"--export {value!r}: write csv, parquet or csv,parquet")
        return kinds

    @field_validator("concurrencies", "rates", "replays", "slos", "image_sizes", mode="before")
    @classmethod
    def _read_list(cls, value: Any, field: Any) -> Any:
        read = {
            "concurrencies": parse_concurrencies,
            "rates": _parse_rates,
            "replays": _parse_speeds,
            "slos": parse_slos,
            "image_sizes": parse_sizes,
        }
        return read[field.field_name](value) if isinstance(value, str) else value

    @field_validator("images_per_request", "prompt_tokens", "output_tokens", mode="before")
    @classmethod
    def _read_lengths(cls, value: Any, field: Any) -> Any:
        least = 2 if field.field_name == "output_tokens" else 1
        return parse_lengths(value, cls.option(field.field_name), least=least) if isinstance(value, str) else value

    @field_validator("arrivals", mode="before")
    @classmethod
    def _read_arrivals(cls, value: Any) -> Any:
        if value not in ("poisson", "constant", "gamma"):
            raise BenchError(f"--arrivals {value!r}: write poisson or constant")
        return value

    @field_validator("scoring", mode="before")
    @classmethod
    def _read_scoring(cls, value: Any) -> Any:
        if value not in ("paper", "lmms-eval"):
            raise BenchError(f"--scoring {value!r}: write paper or lmms-eval")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in (
            "requests", "rounds", "answer_tokens", "question_concurrency", "timeout_s", "sweep_concurrency"
        ):  # fmt: skip
            if getattr(self, field) <= 0:
                raise BenchError(f"{self.option(field)} {getattr(self, field)}: must be at least 1")
        if self.output_tokens.low < 2:
            raise BenchError(
                f"--output-tokens {self.output_tokens}: must be at least 2, one token has no time per output token"
            )
        if any(concurrency < 1 for concurrency in self.concurrencies):
            raise BenchError("--concurrency: each must be at least 1")
        if not all(rate > 0 and math.isfinite(rate) for rate in self.rates):
            raise BenchError("--rate: each must be more than 0 requests/s")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise BenchError(f"--duration {self.duration_s:g}: must be more than 0 s")
        if not 0 <= self.ramp_s < math.inf:
            raise BenchError(f"--ramp {self.ramp_s:g}: must be 0 s or more")
        if self.price is not None and not 0 < self.price < math.inf:
            raise BenchError(f"--price {self.price:g}: must be more than 0 an hour")
        self._check_traffic()
        if not 0.0 < self.margin < 100.0:
            raise BenchError(
                f"--margin {self.margin:g}: must be above 0 and below 100 points; no number of questions rules "
                "out every loss"
            )
        if self.fidelity < 0:
            raise BenchError(f"--fidelity {self.fidelity}: must be 0 or more")
        return self

    def _check_traffic(self) -> None:
        if not (self.burstiness > 0 and math.isfinite(self.burstiness)):
            raise BenchError(f"--burstiness {self.burstiness:g}: must be more than 0; 1 is poisson, less is burstier")
        if self.burstiness != 1.0 and self.arrivals != "gamma":
            raise BenchError(f"--burstiness {self.burstiness:g} with --arrivals {self.arrivals}: give one of the two")
        if self.arrivals == "gamma" and self.burstiness == 1.0:
            raise BenchError("--arrivals gamma: give --burstiness, e.g. 0.5")
        if self.burstiness != 1.0 and not (self.rates or self.sweep):
            raise BenchError("--burstiness is of arrivals under a rate: give --rate or --sweep too")
        if not all(speed > 0 and math.isfinite(speed) for speed in self.replays):
            raise BenchError("--replay: each speed must be more than 0; 1 is as fast as recorded")
        if self.replays and self.traffic is None:
            raise BenchError("--replay without --traffic: give the recorded trace")
        if self.turns > 1 and (self.rates or self.sweep):
            raise BenchError(
                f"--turns {self.turns}: a next turn is due when the last was answered, which neither --rate nor "
                "--sweep waits for; give --concurrency"
            )
        self.inputs("")

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for role, source in self.sources.items():
            if self.models[role] is not None and not is_url(source):
                raise BenchError(f"--{role}-model: {source} is no URL: a server that is booted here has one model")
        return self

    # --- what follows from it -----------------------------------------------------------------------------------------

    def asked(self) -> dict[str, str]:
        """Return what decides the measurement, by the names of the options."""
        found = super().asked()
        found |= {f"--{role}-model": model for role, model in self.models.items() if model}
        if self.sweep:
            found["--sweep"] = f"{self.sweep_rates} rates up to {self.sweep_concurrency} in flight"
        else:
            found["--sweep"] = NONE
        # Only where they were given: a run that was begun before there were such options goes on.
        more: dict[str, Callable[[Any], str]] = {
            "burstiness": _number,
            "traffic": str,
            "replays": _listed(_number),
            "turns": str,
            "shared_prefix": str,
        }
        for field, write in more.items():
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                found[self.option(field)] = write(value)
        return found

    @property
    def sources(self) -> dict[Role, str]:
        """What each system is given by."""
        return {"baseline": self.baseline, "candidate": self.candidate}

    @property
    def models(self) -> dict[Role, str | None]:
        """The name of each model on its server; None: the first."""
        return {"baseline": self.baseline_model, "candidate": self.candidate_model}

    def key(self, role: Role) -> str | None:
        """Return the key of a server that is given by URL."""
        own = {"baseline": self.baseline_key, "candidate": self.candidate_key}[role]
        return own if own is not None else self.api_key

    @property
    def measures_speed(self) -> bool:
        """Whether there is any point of speed to measure."""
        return bool(self.concurrencies or self.rates or self.replays or self.sweep)

    @property
    def round_requests(self) -> int:
        """Requests of a point and system in one round, at least."""
        return -(-self.requests // self.rounds)

    @property
    def loads(self) -> list[Load]:
        """The closed and open loops and the replays, in order."""
        rates = [Load.at_rate(rate, self.arrivals) for rate in sorted(self.rates)]
        return [*map(Load.in_flight, self.concurrencies), *rates, *map(Load.replayed, sorted(self.replays))]

    @property
    def units(self) -> list[str]:
        """What is measured of each system in each round, in order; the sweep is one."""
        return [*(load.name for load in self.loads), *([SWEEP] if self.sweep else [])]

    def block_requests(self, concurrency: int, turns: int | None = None) -> int:
        """Requests of one block: one system, one concurrency, one round.

        At least `WAVES` times as many as are in flight: a single wave would be a burst, not a load. Of chats as many as
        are in flight, and whole ones.

        Args:
            turns: most of a chat, where that is not ``self.turns``.
        """
        turns = self.turns if turns is None else turns
        count = max(self.round_requests, max(WAVES, turns) * concurrency)
        return -(-count // self.turns) * self.turns

    def inputs(self, nonce: str) -> SpeedInputs:
        """Return what makes the requests of speed runs where there is no ``traffic``."""
        from bench.load.inputs import SpeedInputs

        return SpeedInputs(
            nonce,
            self.image_sizes,
            self.output_tokens,
            self.prompt_tokens,
            self.images_per_request,
            self.turns,
            self.shared_prefix,
        )
