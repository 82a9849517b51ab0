"""The schema of a report. Everything shown in markdown, HTML and the terminal is read from here.

Units are in the names: ``_ms`` milliseconds, ``_s`` seconds, ``_bytes`` bytes. Accuracies and their differences are
fractions of 1. ``schema_version`` grows when a reader of the old shape would misread the new one:

- 2: clusters, recovery, and a verdict for each task; grades with notes; pictures of the answers that flipped.
- 1: the first. `bench.report.json` reads it by scoring its answers anew.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.scoring import RIGHT

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "Answer",
    "Difference",
    "Distribution",
    "Environment",
    "Failed",
    "Item",
    "Judgement",
    "Memory",
    "Report",
    "Role",
    "Share",
    "SpeedPoint",
    "SpeedRatio",
    "SystemInfo",
    "TaskAccuracy",
    "Verdict",
    "Workload",
]


SCHEMA_VERSION: Literal[2] = 2

Role = Literal["baseline", "candidate"]
Judgement = Literal["no worse", "worse", "can't tell"]


class Model(BaseModel):
    """Base of all parts: unknown keys are refused, so that a typo can't pass as a missing value."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Distribution(Model):
    """Percentiles, mean and number of samples, in the unit of the field that holds it."""

    p50: float
    p90: float
    p99: float
    mean: float
    n: int


class SpeedPoint(Model):
    """One system at one concurrency, all rounds pooled. None: the server did not report what the metric needs."""

    role: Role
    concurrency: int
    requests: int
    wall_s: float
    ttft_ms: Distribution
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution
    client_lag_ms: Distribution
    requests_per_s: float
    output_tokens_per_s: float | None
    output_tokens: int | None
    prompt_tokens: int | None


class SpeedRatio(Model):
    """Candidate / baseline of a median latency at one concurrency, with its 95% interval."""

    metric: Literal["ttft", "tpot", "e2e"]
    concurrency: int
    ratio: float
    low: float
    high: float


class Share(Model):
    """A mean score as a fraction of 1, or the share of the baseline's that the candidate keeps; a 95% interval."""

    value: float
    low: float
    high: float


class Difference(Model):
    """Candidate - baseline of a mean score, paired by item.

    Attributes:
        method: ``tango`` for right/wrong scores, ``bootstrap`` for graded ones.
        p_value: of the sign-flip test by cluster: exact McNemar for right/wrong scores when no items share a cluster.
        lost: items right before and wrong now (right: a score of at least 0.5).
        won: items wrong before and right now.
        design_effect: n items tell as much as n / design_effect independent ones; 1 when none share a cluster.
        smallest_detectable: what this number of items could have shown (80% power), as a fraction of 1.
    """

    value: float
    low: float
    high: float
    method: Literal["tango", "bootstrap"]
    p_value: float
    lost: int
    won: int
    design_effect: float
    smallest_detectable: float


class TaskAccuracy(Model):
    """One task, or all of them together under the name ``all``.

    Attributes:
        clusters: groups of items that share a picture or document; n when every item stands alone.
        recovery: candidate's mean score / baseline's; None when the baseline scored next to nothing.
        verdict: against the report's margin; see `Verdict.accuracy`.
        p_adjusted: the p-value of the difference, adjusted by Holm for there being several tasks; ``all`` is not one of
            them and keeps its own.
        items_needed: with ``can't tell``: how many items like these would settle it with 80% power.
    """

    task: str
    metric: str
    n: int
    clusters: int
    baseline: Share
    candidate: Share
    difference: Difference
    recovery: Share | None
    verdict: Judgement
    p_adjusted: float
    items_needed: int | None


class Answer(Model):
    """What a system answered to one question.

    Attributes:
        note: what to know about the score, such as an answer that names several options.
    """

    text: str
    score: float
    note: str | None
    finish_reason: str | None


class Item(Model):
    """One question with both answers, and all it takes to score them again.

    Attributes:
        question: as it was asked, options included.
        answers: the right ones; letters for multiple choice.
        choices: the options' texts, for multiple choice alone.
        cluster: equal for items that are resampled together.
        pictures: SHA-256 of each as it was sent.
    """

    id: str
    task: str
    question: str
    answers: list[str]
    metric: str
    choices: list[str]
    cluster: str
    pictures: list[str]
    baseline: Answer
    candidate: Answer

    @property
    def flip(self) -> Literal["lost", "won"] | None:
        """``lost``: right in the baseline, wrong in the candidate; ``won``: the other way."""
        before, after = self.baseline.score >= RIGHT, self.candidate.score >= RIGHT
        return None if before == after else "lost" if before else "won"


class Accuracy(Model):
    """Answers to the same questions by both systems."""

    overall: TaskAccuracy
    tasks: list[TaskAccuracy]
    items: list[Item]
    thumbnails: dict[str, str] = Field(
        description="data URLs of the pictures of items that flipped, scaled down, by the SHA-256 of the original"
    )
    cut_answers: dict[Role, int] = Field(description="answers that hit max_tokens before they ended")

    @property
    def flipped(self) -> list[Item]:
        """The items that changed between right and wrong, in the order they were asked."""
        return [item for item in self.items if item.flip]


class Memory(Model):
    """Memory of a server that this run started; None where it can't be known."""

    host_bytes: int | None = None
    host_kind: Literal["pss", "uss"] | None = None
    gpu_bytes: int | None = None
    weights_bytes: int | None = None


class SystemInfo(Model):
    """Who was measured."""

    role: Role
    label: str
    source: str = Field(description="as given on the command line")
    booted: bool = Field(description="whether this run started the server")
    model: str
    url: str
    server_version: str | None = None
    quantization: str | None = None
    disk_bytes: int | None = None
    disk_weights_bytes: int | None = None
    memory: Memory = Memory()
    serve_arguments: list[str] = []


class Workload(Model):
    """What was asked. Two reports can be compared when these are equal."""

    tasks_source: str | None
    questions: int
    questions_sha256: str | None
    answer_tokens: int
    question_concurrency: int
    concurrencies: list[int]
    requests: list[int] = Field(description="requests of each point and system, in the order of concurrencies")
    rounds: int
    output_tokens: int
    image_sizes: list[str]
    interleaved: bool
    timeout_s: float
    seed: int


class Environment(Model):
    """On what it ran."""

    platform: str
    cpu: str
    gpus: list[str]
    versions: dict[str, str]
    command: str


class Failed(Model):
    """Requests that failed in the same way."""

    role: Role
    phase: str
    kind: str
    message: str
    count: int


class Verdict(Model):
    """The answer in a sentence.

    Attributes:
        accuracy: over all items. ``no worse``: the 95% interval of the difference lies above -margin; ``worse``: not
            so, it lies below 0, and p is below 5%; ``can't tell``: neither; None when accuracy was not measured.
        margin: the loss that would not matter, as a fraction of 1.
        sentence: what a reader should take away.
    """

    accuracy: Judgement | None
    margin: float
    sentence: str


class Report(Model):
    """Everything one `qvl bench` found out. A failed run has no figures: neither accuracy nor speed, only failures."""

    schema_version: Literal[2] = SCHEMA_VERSION
    status: Literal["ok", "failed"]
    created: datetime
    duration_s: float
    verdict: Verdict
    systems: dict[Role, SystemInfo]
    workload: Workload
    accuracy: Accuracy | None
    speed: list[SpeedPoint]
    speed_ratios: list[SpeedRatio]
    failures: list[Failed]
    warnings: list[str]
    environment: Environment
    definitions: dict[str, str]

    def point(self, role: Role, concurrency: int) -> SpeedPoint | None:
        """Return the speed of ``role`` at ``concurrency``, None when it was not measured."""
        return next((p for p in self.speed if (p.role, p.concurrency) == (role, concurrency)), None)
