"""The schema of a report. Everything shown in markdown, HTML and the terminal is read from here.

Units are in the names: ``_ms`` milliseconds, ``_s`` seconds, ``_bytes`` bytes. Accuracies and their differences are
fractions of 1. ``schema_version`` grows when a reader of the old shape would misread the new one;
`bench.report.render.json_file` reads all of them:

- 5: loads may be replays, arrivals gamma-distributed, requests the user's own, chats of several turns; the share of
  prompt tokens that images are; when a closed loop's throughput had settled, which its steady figures begin at.
- 4: an item's ``images`` (``pictures`` before). Whose rules answers are scored by. Figures and ratios by shape of
  request; headlines with p adjusted for their number; rates that are kept, without ratios of throughput; throughput
  without a round's end by round.
- 3: a speed point belongs to a load (so many in flight, a rate, a step of a sweep) and has p95, figures by round with
  intervals, goodput, errors by kind, what the server counted; ratios are over rounds; fidelity; partial reports.
- 2: clusters, recovery, and a verdict for each task; grades with notes; images of the answers that flipped.
- 1: the first. It is read by scoring its answers anew.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from bench.load.workload import Arrivals
from bench.questions.scoring import RIGHT, Scoring
from bench.roles import ROLES, Role
from bench.run.loads import PART, WAVES, Load, LoadKind
from bench.run.systems import Memory, SystemInfo

__all__ = [
    "ROLES",
    "SCHEMA_VERSION",
    "Accuracy",
    "Answer",
    "Difference",
    "Distribution",
    "Drift",
    "Environment",
    "Estimate",
    "Failed",
    "Fidelity",
    "FidelityItem",
    "Goodput",
    "Item",
    "Judgement",
    "Load",
    "LoadKind",
    "Memory",
    "Report",
    "Role",
    "ServerCounters",
    "Share",
    "SpeedFigure",
    "SpeedPoint",
    "SpeedRatio",
    "SystemInfo",
    "TaskAccuracy",
    "Verdict",
    "Workload",
]


SCHEMA_VERSION: Literal[5] = 5

Judgement = Literal["no worse", "worse", "can't tell"]
#: What is told by round and compared; latencies by their median.
SpeedFigure = Literal[
    "ttft",
    "tpot",
    "itl",
    "e2e",
    "requests_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "goodput_per_s",
    "steady_requests_per_s",
    "steady_output_tokens_per_s",
]


class Model(BaseModel):
    """Base of all parts: unknown keys are refused, so that a typo can't pass as a missing value."""

    model_config = PART


class Distribution(Model):
    """How the samples of all rounds together are spread, in the unit of the field that holds it.

    Attributes:
        p95: None in reports of schema versions 1 and 2.
        cdf: the 0th, 1st, ... 100th percentile; empty where it is not drawn.
    """

    p50: float
    p90: float
    p95: float | None = None
    p99: float
    mean: float
    n: int
    cdf: list[float] = []


class Estimate(Model):
    """A figure over the rounds: their median, with a 95% interval.

    Attributes:
        low: None, as ``high``, where there is no interval: one round, or a round with a figure of 0.
        rounds: the figure of each round that has it, in their order; empty in reports of schema versions 1 and 2.
    """

    value: float
    low: float | None
    high: float | None
    rounds: list[float]


class Goodput(Model):
    """Requests that completed and met every objective: a second, and as a share of all that were due."""

    per_s: float
    share: float


class ServerCounters(Model):
    """What the server counted over the point, by its own ``/metrics``; None: it has no such metric, or no such page.

    Attributes:
        prefix_cache_share: of the prompt tokens looked up, those its prefix cache had.
        image_cache_share: of the images looked up, those whose embedding it had.
        preemptions: of running requests.
        queue_mean_ms: mean time in the server's queue.
        finished: requests that ended there; more than ``SpeedPoint.requests``: others use the server too.
        accepted_share: of the tokens that a draft guessed, those that the model took; None: there was no draft.
        tokens_per_step: that a step gave a request with them: 1 + accepted / drafts.
    """

    prefix_cache_share: float | None = None
    image_cache_share: float | None = None
    preemptions: int | None = None
    queue_mean_ms: float | None = None
    finished: int | None = None
    accepted_share: float | None = None
    tokens_per_step: float | None = None


class SpeedPoint(Model):
    """One system under one load, all rounds pooled. Latencies are those of completed requests, counted from the moment
    they were due. None: the server did not report what the metric needs, or nothing was completed.

    Attributes:
        rounds: in which it was measured.
        requests: that ended, failed ones too; those of a ramp are in no figure.
        errors: failed requests by kind.
        unsent: requests that were due when the point was stopped, and never sent.
        held: requests that were due while as many as allowed were in flight.
        uncounted: completed requests whose tokens the server did not count.
        offered_per_s: of an open loop, requests due each second; of a sweep the median over its rounds.
        achieved_per_s: of an open loop, requests that it answers a second (`bench.load.metrics.achieved_per_s`).
        kept: of an open loop, whether the server kept up with the rate; None: the report does not say.
        retries: times that a request was sent again because the server was busy.
        tokens_per_chunk: mean; above 1 where chunks are not tokens.
        queueing_ms: in the client; part of every latency.
        server_queueing_ms: by the usage of each answer.
        loop_lag_ms: how late the client's event loop was.
        by_round: medians over the rounds, with intervals: what to quote.
        by_shape: the same of latencies by the requests' shape (`text`, the size of its image, `3 images`); empty where
            all have the same.
        steady_requests_per_s: of closed loops, throughput from when it had settled, without each round's end, when
            fewer and fewer are in flight.
        settled_s: of closed loops, after so many seconds of a round throughput had settled
            (`bench.load.metrics.settled`); None: it had not in the first half, or there was too little to tell.
        image_tokens: of the prompt tokens, those that images became, by a family's rule (`toolkit.models.image_rule`)
            which the server's own counts agreed with; None: none did, or there were no images.
        energy_j_per_token: of the GPUs, for each output token.
        invalid: why no figure is to be read from this point: it measures the client.
        stopped: why rounds ended before all was sent; figures are then of a server that did not keep up.
    """

    role: Role
    load: Load
    rounds: int
    requests: int
    completed: int
    errors: dict[str, int] = {}
    unsent: int = 0
    held: int = 0
    uncounted: int = 0
    wall_s: float
    offered_per_s: float | None = None
    achieved_per_s: float | None = None
    kept: bool | None = None
    retries: int = 0
    tokens_per_chunk: float | None = None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    queueing_ms: Distribution | None = None
    server_queueing_ms: Distribution | None = None
    client_lag_ms: Distribution | None
    loop_lag_ms: Distribution | None = None
    requests_per_s: float
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None = None
    steady_requests_per_s: float | None = None
    steady_output_tokens_per_s: float | None = None
    goodput: Goodput | None = None
    by_round: dict[SpeedFigure, Estimate] = {}
    by_shape: dict[str, dict[SpeedFigure, Estimate]] = {}
    settled_s: float | None = None
    output_tokens: int | None
    prompt_tokens: int | None
    image_tokens: int | None = None
    server: ServerCounters | None = None
    energy_j_per_token: float | None = None
    invalid: str | None = None
    stopped: list[str] = []

    @property
    def concurrency(self) -> int | None:
        """Requests kept in flight, where that is the load; None for open loops and sweeps."""
        return self.load.concurrency if self.load.kind == "closed" else None

    @property
    def burst(self) -> bool:
        """Whether it had fewer than `WAVES` requests a round for each in flight: most were sent at once, and the end
        of the round, when fewer and fewer are in flight, is most of it."""
        many = self.load.concurrency
        return many is not None and self.requests < WAVES * many * self.rounds

    def figure(self, name: SpeedFigure) -> float | None:
        """Return a figure as it is quoted everywhere: the median of its rounds, of latencies of their p50, in ms;
        pooled over the rounds where it is not known by round."""
        if name in self.by_round:
            return self.by_round[name].value
        if name in ("ttft", "tpot", "itl", "e2e"):
            found: Distribution | None = getattr(self, f"{name}_ms")
            return found.p50 if found else None
        if name == "goodput_per_s":
            return self.goodput.per_s if self.goodput else None
        rate: float | None = getattr(self, name)
        return rate

    def throughput(self, of: Literal["output_tokens_per_s", "requests_per_s"]) -> float | None:
        """Return a throughput as it is quoted everywhere: without the rounds' ends where that is known by round."""
        steady: SpeedFigure = "steady_requests_per_s" if of == "requests_per_s" else "steady_output_tokens_per_s"
        return self.figure(steady if steady in self.by_round else of)


class SpeedRatio(Model):
    """Candidate / baseline under one load, round by round.

    Attributes:
        load: its name.
        shape: of the requests it is of; empty: of all.
        low: None, as ``high``, where there is no interval.
        rounds: the ratio of each round that both have.
        p_value: of Student's test that the ratio is 1, on the rounds' logarithms; None without an interval.
        headline: whether it is one of the few that the verdict and the first numbers are made of.
        p_adjusted: of a headline, the p-value adjusted by Holm for there being several.
    """

    metric: SpeedFigure
    load: str
    shape: str = ""
    ratio: float
    low: float | None
    high: float | None
    rounds: list[float] = []
    p_value: float | None = None
    headline: bool = False
    p_adjusted: float | None = None

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves out 1; of a headline, also when there are several."""
        if self.low is None or self.high is None:
            return False
        return not self.low <= 1.0 <= self.high and (self.p_adjusted is None or self.p_adjusted < 0.05)


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
        clusters: groups of items that share an image or document; n when every item stands alone.
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
        images: SHA-256 of each as it was sent.
    """

    id: str
    task: str
    question: str
    answers: list[str]
    metric: str
    choices: list[str]
    cluster: str
    images: list[str]
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
        description="data URLs of the images of items that flipped, scaled down, by the SHA-256 of the original"
    )
    cut_answers: dict[Role, int] = Field(description="answers that hit max_tokens before they ended")

    @property
    def flipped(self) -> list[Item]:
        """The items that changed between right and wrong, in the order they were asked."""
        return [item for item in self.items if item.flip]


class Drift(Model):
    """How far a system's tokens are from the baseline's, on the baseline's own greedy answers; the measures are defined
    in `bench.judge.fidelity.Drift`. None: could not be measured. Intervals are 95%.

    Attributes:
        delta_p: by percentile, as text: 1, 5, 25, 50, 75, 95, 99.
    """

    tokens: int = 0
    scored: int = 0
    mean_kl: Share | None = None
    p99_kl: Share | None = None
    trimmed_kl: Share | None = None
    geometric_kl: Share | None = None
    coverage: float | None = None
    top1_agreement: Share | None = None
    delta_p: dict[str, Share] = {}
    perplexity: Share | None = None
    perplexity_ratio: Share | None = None
    greedy: float | None = None
    answered: int = 0
    identical: Share | None = None
    first_divergence: Share | None = None


class FidelityItem(Model):
    """One prompt, and how far the candidate is from the baseline on it.

    Attributes:
        mean_kl: nats a token; None when the answer could not be scored.
        tokens: of the baseline's answer that were scored.
        identical: whether both answered the same; None when one failed.
        diverges_at: tokens in common before the two answers part; None when they don't, or can't be told.
        failure: what failed, and whose.
    """

    id: str
    prompt: str
    images: list[str]
    baseline: str | None
    candidate: str | None
    mean_kl: float | None
    tokens: int
    identical: bool | None
    diverges_at: int | None
    failure: str | None


class Fidelity(Model):
    """The candidate's drift from the baseline, and the baseline's from itself: the noise floor.

    Attributes:
        source: what was asked about: the questions, or a directory of images.
        items_sha256: of the prompts and images; equal: the same was asked.
        top_k: likeliest tokens listed at each position.
        missing: what could not be measured and why, a line each.
        failed: items with a failed request or a mismatch; they are left out of what they lack.
        prompts_differ: items that the two systems saw as different prompt tokens.
        thumbnails: data URLs of the images of the items that drifted most, by the SHA-256 of the original.
    """

    source: str
    items_sha256: str
    top_k: int
    answer_tokens: int
    candidate: Drift
    noise: Drift | None
    items: list[FidelityItem]
    missing: list[str]
    failed: int
    prompts_differ: int
    thumbnails: dict[str, str] = {}


class Workload(Model):
    """What was asked. Two reports can be compared when these are equal.

    Attributes:
        requests: of each closed loop, a system, over all rounds; more than asked for at high concurrency.
        rates: of open loops, requests/s.
        sweep: open-loop rates of the sweep; 0 without one.
        sweep_concurrency: requests in flight that saturate a server, in a sweep.
        scoring: whose rules answers are scored by (`bench.questions.scoring`).
        duration_s: of each point and round, where that bounds it and not a number of requests.
        output_tokens: a number, or a distribution as on the command line; likewise the next two.
        prompt_tokens: without the images'; None: schema versions 1 and 2 do not say.
        burstiness: shape of the gamma distribution of the gaps between arrivals.
        traffic: the user's own requests, in words; None: requests were made.
        traffic_sha256: of those; empty: requests were made.
        replays: speeds at which a recorded trace was replayed.
        turns: of each chat that was made.
        shared_prefix: tokens of a system's message that all requests that were made begin with.
        slos: what goodput is held against.
        price: of each server's machine, an hour.
    """

    tasks_source: str | None
    questions: int
    questions_sha256: str | None
    answer_tokens: int
    scoring: Scoring = "paper"
    question_concurrency: int
    concurrencies: list[int]
    requests: list[int]
    rates: list[float] = []
    arrivals: Arrivals | None = None
    burstiness: float = 1.0
    traffic: str | None = None
    traffic_sha256: str = ""
    replays: list[float] = []
    turns: int = 1
    shared_prefix: int = 0
    sweep: int = 0
    sweep_concurrency: int | None = None
    rounds: int
    duration_s: float | None = None
    ramp_s: float = 0.0
    preset: str | None = None
    price: float | None = None
    output_tokens: str
    prompt_tokens: str | None = None
    images_per_request: str = "1"
    image_sizes: list[str]
    slos: list[str] = []
    interleaved: bool
    timeout_s: float
    seed: int


class Environment(Model):
    """On what it ran.

    Attributes:
        commit: of qvl's own source, where it runs from a checkout; with ``+`` when files were changed.
    """

    platform: str
    cpu: str
    gpus: list[str]
    versions: dict[str, str]
    commit: str | None = None
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
        speed: the same of the candidate's speed; None where it has no ratio to the baseline's.
    """

    accuracy: Judgement | None
    margin: float
    sentence: str
    speed: str | None = None


class Report(Model):
    """Everything one `qvl bench` found out.

    Attributes:
        status: ``ok``. ``partial``: the run was interrupted, and holds what was measured until then. ``failed``:
            requests failed that must not; there are no figures, only failures.
        unfinished: of a partial report, what is missing.
        fidelity: None when it was not measured.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    status: Literal["ok", "partial", "failed"]
    unfinished: list[str] = []
    created: datetime
    duration_s: float
    verdict: Verdict
    systems: dict[Role, SystemInfo]
    workload: Workload
    accuracy: Accuracy | None
    fidelity: Fidelity | None = None
    speed: list[SpeedPoint]
    speed_ratios: list[SpeedRatio]
    failures: list[Failed]
    warnings: list[str]
    environment: Environment
    definitions: dict[str, str]

    @property
    def loads(self) -> list[Load]:
        """The loads that were measured, each once, in order."""
        return list({point.load.name: point.load for point in self.speed}.values())

    def point(self, role: Role, load: str) -> SpeedPoint | None:
        """Return the speed of ``role`` under the load of that name, None when it was not measured."""
        return next((p for p in self.speed if (p.role, p.load.name) == (role, load)), None)

    def ratio(self, metric: SpeedFigure, load: str, shape: str = "") -> SpeedRatio | None:
        """Return candidate / baseline of a figure under the load of that name, None when there is none."""
        return next((r for r in self.speed_ratios if (r.metric, r.load, r.shape) == (metric, load, shape)), None)
