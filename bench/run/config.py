"""What `qvl bench` was told."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.load.inputs import ImageSize, Lengths, SpeedInputs
from bench.load.loops import Arrivals
from bench.load.metrics import Slo
from bench.questions import observe, tasks
from bench.questions.observe import Item
from bench.questions.tasks import Question
from bench.roles import Role
from bench.run.measured import SWEEP, Load
from toolkit.errors import BenchError

__all__ = ["NONE", "Plan", "Settings", "is_url"]

NONE = "none"
#: Requests of a block for each that is in flight, at least.
WAVES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        concurrencies: requests kept in flight, one speed point each.
        rates: requests/s in an open loop, one speed point each.
        arrivals: of open loops.
        sweep: open-loop rates of a sweep, which each system runs up to its own saturation; 0 for none.
        sweep_concurrency: requests in flight that saturate a server, in a sweep.
        requests: measured requests a point and system, over all rounds; more at high concurrency.
        duration_s: seconds that a point is measured in each round, instead of so many requests.
        ramp_s: seconds in which a load grows before it is measured.
        rounds: each point is measured so often, the two systems taking turns in alternating order.
        output_tokens: exact length of each answer in speed runs, at least 2 (one token has no TPOT).
        prompt_tokens: of each prompt in speed runs, without its pictures.
        images: pictures of each request in speed runs.
        image_sizes: their sizes.
        preset: the workload's name, where it has one.
        slos: for goodput.
        answer_tokens: longest answer to a question.
        question_concurrency: questions in flight.
        top_k: likeliest tokens per position, for fidelity.
        fidelity_tokens: longest answer that is read for fidelity.
        timeout_s: seconds a request may take.
        nonce: makes this run's speed inputs new to a server that outlives it.
    """

    concurrencies: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = ()
    arrivals: Arrivals = "poisson"
    sweep: int = 0
    sweep_concurrency: int = 64
    requests: int = 96
    duration_s: float | None = None
    ramp_s: float = 0.0
    rounds: int = 3
    output_tokens: Lengths = Lengths.fixed(128)  # noqa: RUF009  # frozen
    prompt_tokens: Lengths = Lengths.fixed(16)  # noqa: RUF009
    images: Lengths = Lengths.fixed(1)  # noqa: RUF009
    image_sizes: tuple[ImageSize, ...] = ((448, 448),)
    preset: str | None = None
    slos: tuple[Slo, ...] = ()
    answer_tokens: int = 64
    question_concurrency: int = 4
    top_k: int = 20
    fidelity_tokens: int = 64
    timeout_s: float = 120.0
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        positive = {
            "--requests": self.requests,
            "--rounds": self.rounds,
            "--answer-tokens": self.answer_tokens,
            "--question-concurrency": self.question_concurrency,
            "--timeout": self.timeout_s,
            "--sweep-concurrency": self.sweep_concurrency,
        }
        for name, value in positive.items():
            if value <= 0:
                raise BenchError(f"{name} {value}: must be at least 1")
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
        self.inputs("")

    @property
    def measures_speed(self) -> bool:
        """Whether there is any point of speed to measure."""
        return bool(self.concurrencies or self.rates or self.sweep)

    @property
    def round_requests(self) -> int:
        """Requests of a point and system in one round, at least."""
        return -(-self.requests // self.rounds)

    @property
    def units(self) -> list[str]:
        """What is measured of each system in each round, in order; the sweep is one."""
        return [*(load.name for load in self.loads), *([SWEEP] if self.sweep else [])]

    @property
    def loads(self) -> list[Load]:
        """The closed and open loops, in order."""
        rates = [Load.at_rate(rate, self.arrivals) for rate in sorted(self.rates)]
        return [*map(Load.in_flight, self.concurrencies), *rates]

    def block_requests(self, concurrency: int) -> int:
        """Requests of one block: one system, one concurrency, one round.

        At least `WAVES` times as many as are in flight: a single wave would be a burst, not a load.
        """
        return max(self.round_requests, WAVES * concurrency)

    def inputs(self, nonce: str) -> SpeedInputs:
        """Return what makes the requests of speed runs."""
        return SpeedInputs(nonce, self.image_sizes, self.output_tokens, self.prompt_tokens, self.images)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `qvl bench` was told.

    Attributes:
        sources: of each system a directory, a hub id, ``demo``, or the URL of a server.
        tasks: ``demo``, ``none``, a file of questions, or a set of `datasets.LAYOUTS` as ``NAME[:SOURCE][@SPLIT]``.
        per_task: at most so many questions of each task; None takes all.
        images: a directory of pictures that fidelity is measured on, instead of on the questions.
        image_prompt: what is asked about each of them.
        fidelity: so many of the questions are taken for fidelity; 0 for none.
        margin: a loss of accuracy that would not matter, as a fraction of 1, above 0.
        seed: of sampling questions and of resampling.
        side_by_side: whether servers that this run starts live at the same time.
        serve_arguments: passed on to the servers.
    """

    sources: dict[Role, str]
    plan: Plan
    tasks: str
    per_task: int | None
    images: Path | None
    image_prompt: str
    fidelity: int
    margin: float
    seed: int
    side_by_side: bool
    api_key: str | None
    serve_arguments: tuple[str, ...]
    command: str

    def __post_init__(self) -> None:
        if not 0.0 < self.margin < 1.0:
            raise BenchError(
                f"--margin {100 * self.margin:g}: must be above 0 and below 100 points; no number of questions rules "
                "out every loss"
            )
        if self.fidelity < 0:
            raise BenchError(f"--fidelity {self.fidelity}: must be 0 or more")

    def asked(self, questions: Sequence[Question], items: Sequence[Item]) -> dict[str, str]:
        """Return what decides the measurement, by the names of the options: a run goes on only where all is equal."""
        plan = self.plan
        return {
            "--baseline": self.sources["baseline"],
            "--candidate": self.sources["candidate"],
            "--tasks": self.tasks,
            "the questions' SHA-256": tasks.digest(questions) if questions else NONE,
            "--images": str(self.images),
            "the SHA-256 of what fidelity is measured on": observe.digest(items),
            "--per-task": str(self.per_task),
            "--answer-tokens": str(plan.answer_tokens),
            "--margin": f"{100 * self.margin:g}",
            "--seed": str(self.seed),
            "--concurrency": ",".join(map(str, plan.concurrencies)) or NONE,
            "--rate": ",".join(f"{rate:g}" for rate in sorted(plan.rates)) or NONE,
            "--arrivals": plan.arrivals,
            "--sweep": f"{plan.sweep} rates up to {plan.sweep_concurrency} in flight" if plan.sweep else NONE,
            "--requests": str(plan.requests),
            "--duration": str(plan.duration_s),
            "--ramp": f"{plan.ramp_s:g}",
            "--rounds": str(plan.rounds),
            "--output-tokens": str(plan.output_tokens),
            "--prompt-tokens": str(plan.prompt_tokens),
            "--images-per-request": str(plan.images),
            "--image-sizes": ",".join("text" if size is None else f"{size[0]}x{size[1]}" for size in plan.image_sizes),
            "--slo": ",".join(map(str, plan.slos)) or NONE,
            "--timeout": f"{plan.timeout_s:g}",
            "--question-concurrency": str(plan.question_concurrency),
            "--sequential": str(not self.side_by_side),
            "--serve-arg": " ".join(self.serve_arguments) or NONE,
        }


def is_url(source: str) -> bool:
    """Whether a system is given by the URL of its server."""
    return source.startswith(("http://", "https://"))
