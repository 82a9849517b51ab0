"""What the reader of a report sees, said once: headings, rows, cells and sentences as text. `bench.report.render` lays
them out as markdown, HTML and in the terminal, and adds nothing but plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.questions.scoring import RIGHT
from bench.report import fidelity, words
from bench.report.schema import (
    Answer,
    Difference,
    Distribution,
    FidelityItem,
    Item,
    Report,
    ServerCounters,
    Share,
    SpeedFigure,
    SpeedPoint,
    TaskAccuracy,
)
from bench.roles import ROLES, Role

__all__ = [
    "FIGURES",
    "HEADINGS",
    "AccuracyRow",
    "Card",
    "Cell",
    "Counted",
    "Drifted",
    "Flip",
    "Flips",
    "Ratios",
    "Said",
    "Size",
    "SpeedRow",
    "Spread",
    "Verdict",
    "View",
    "accuracy_row",
    "view",
    "workload_text",
]

#: Of the sections that every format has.
HEADINGS = {
    "failures": "Failed requests",
    "accuracy": "Accuracy",
    "flips": "Answers that changed between right and wrong",
    "fidelity": "Fidelity",
    "speed": "Speed",
}
#: What is compared under a load, as it is called at the head of a column.
FIGURES: dict[SpeedFigure, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "goodput_per_s": "goodput",
}
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and its 95% interval, which is empty where there is none to show."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


@dataclass(frozen=True, slots=True)
class View:
    """A whole report.

    Attributes:
        title: what is compared with what.
        labels: of the systems, the baseline's first.
        created: date and time, UTC, to the minute.
        duration: seconds of the whole run, without a unit.
        machine: its GPUs, its CPU where it has none.
        cards: the numbers that matter most; none for a failed run.
        failures: system, phase, kind, count and message of each.
        accuracy: a row a task, all of them together last.
        margin: what verdicts on accuracy are against.
        drift: name of each measure of fidelity, and its value for the candidate and for the baseline asked again.
        fidelity: what was asked for it, in a sentence; empty where it was not measured.
        workload: what was asked, in a few sentences.
    """

    title: str
    labels: tuple[str, str]
    created: str
    duration: str
    machine: str
    verdict: Verdict
    cards: list[Card]
    failures: list[list[str]]
    accuracy: list[AccuracyRow]
    margin: str
    flips: list[Flip]
    drift: list[tuple[str, list[str]]]
    fidelity: str
    drifted: list[Drifted]
    speed: list[SpeedRow]
    ratios: Ratios
    counted: Counted
    sizes: list[Size]
    workload: str

    @property
    def loads(self) -> list[list[SpeedRow]]:
        """The rows of `speed` by load, the baseline's first."""
        found: dict[str, list[SpeedRow]] = {}
        for row in self.speed:
            found.setdefault(row.load, []).append(row)
        return [sorted(rows, key=lambda row: ROLES.index(row.role)) for rows in found.values()]

    @property
    def flips_by_task(self) -> list[Flips]:
        """The answers that flipped by task, in the report's order; tasks without any are left out."""
        found = []
        for task in (row.task for row in self.accuracy if not row.total):
            here = [flip for flip in self.flips if flip.task == task]
            if here:
                found.append(Flips(task, [f for f in here if f.flip == "lost"], [f for f in here if f.flip == "won"]))
        return found


def view(report: Report) -> View:
    """Return what a reader sees of a report."""
    base, cand = (report.systems[role].label for role in ROLES)
    accuracy = report.accuracy
    return View(
        title=f"{cand} against {base}",
        labels=(base, cand),
        created=f"{report.created:%Y-%m-%d %H:%M}",
        duration=f"{report.duration_s:.0f}",
        machine="; ".join(report.environment.gpus) or report.environment.cpu,
        verdict=_verdict(report),
        cards=[] if report.status == "failed" else cards(report),
        failures=[[f.role, f.phase, f.kind, str(f.count), f.message] for f in report.failures],
        accuracy=[*map(accuracy_row, accuracy.tasks), accuracy_row(accuracy.overall, total=True)] if accuracy else [],
        margin=words.limit(report.verdict.margin),
        flips=[_flip(item, report, accuracy.thumbnails) for item in accuracy.flipped] if accuracy else [],
        drift=words.drift_rows(report.fidelity) if report.fidelity else [],
        fidelity=_fidelity(report),
        drifted=_drifted(report),
        speed=[_speed(point, report) for point in report.speed],
        ratios=_ratios(report),
        counted=_counted(report),
        sizes=_sizes(report),
        workload=workload_text(report),
    )


# --- verdict and cards ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer.

    Attributes:
        word: ``no worse``, ``worse`` or ``can't tell``; empty where accuracy was not measured.
        status: the same, or ``failed`` or ``partial``: key of what a badge says.
        worse_tasks: those that are worse, of several.
        sentence: what a reader should take away.
        speed: the same of speed; empty where it has no ratio.
    """

    word: str
    status: str
    worse_tasks: list[str]
    sentence: str
    speed: str


def _verdict(report: Report) -> Verdict:
    tasks = report.accuracy.tasks if report.accuracy else []
    word = report.verdict.accuracy or ""
    return Verdict(
        word=word,
        status=word if report.status == "ok" else report.status,
        worse_tasks=[row.task for row in tasks if row.verdict == "worse"] if len(tasks) > 1 else [],
        sentence=report.verdict.sentence,
        speed=report.verdict.speed or "",
    )


#: The first screen has so many numbers.
CARDS = 4


@dataclass(frozen=True, slots=True)
class Card:
    """One of the numbers at the top."""

    name: str
    value: str
    detail: str


def cards(report: Report) -> list[Card]:
    """The numbers that matter most, of those that were measured."""
    found = [*_quality_cards(report), *_speed_cards(report), *_size_cards(report)]
    # Accuracy, speed and size each answer another question; a second number of one of them gives way.
    if len(found) > CARDS:
        spare = [card for card in found if card.name in SPARE]
        found = [card for card in found if card not in spare[CARDS - len(found) :]]
    return found[:CARDS]


#: Cards that give way when there are too many, the last first.
SPARE = ("Time to first token", "Drift from the baseline")


def _quality_cards(report: Report) -> list[Card]:
    found = []
    if report.accuracy:
        row = report.accuracy.overall
        found.append(
            Card(
                "Accuracy",
                f"{words.points(row.difference.value)} pt",
                f"{words.percent(row.candidate.value)} against {words.percent(row.baseline.value)} "
                f"(95%: {words.interval(row.difference)})",
            )
        )
    drift = report.fidelity and report.fidelity.candidate
    if drift and drift.mean_kl:
        found.append(
            Card(
                "Drift from the baseline",
                words.nats(drift.mean_kl.value),
                f"nats a token, mean KL (95%: {words.small_interval(drift.mean_kl)})",
            )
        )
    return found


def _speed_cards(report: Report) -> list[Card]:
    found = []
    first = {ratio.metric: ratio for ratio in reversed(report.speed_ratios)}
    for metric, name in (("tpot", "Time per token"), ("ttft", "Time to first token")):
        ratio = first.get("tpot" if metric == "tpot" else "ttft")
        if ratio:
            shown = words.ratio_interval(ratio.low, ratio.high)
            found.append(Card(name, words.ratio(ratio.ratio), f"{ratio.load} (95%: {shown})"))
    most = words.throughput(report.speed_ratios)
    if most:
        values = []
        for role in ROLES:
            estimate = next(p.by_round[most.metric] for p in report.speed if (p.role, p.load.name) == (role, most.load))
            values.append(words.number(estimate.value))
        name = "Output tokens/s" if most.metric == "output_tokens_per_s" else "Requests/s"
        found.append(Card(name, words.ratio(most.ratio), f"{values[1]} against {values[0]}, {most.load}"))
    return found


def _size_cards(report: Report) -> list[Card]:
    base, cand = report.systems["baseline"], report.systems["candidate"]
    if not (base.disk_bytes and cand.disk_bytes):
        return []
    detail = f"{words.gib(cand.disk_bytes)} against {words.gib(base.disk_bytes)}"
    return [Card("Size on disk", words.ratio(cand.disk_bytes / base.disk_bytes), detail)]


# --- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """Both systems in one task, or in all of them together.

    Attributes:
        needs: how many questions would settle the verdict; empty where it is settled.
        n: questions.
        clusters: groups of questions that share a picture; None where every question stands alone.
        total: whether it is the row of all tasks.
    """

    task: str
    metric: str
    verdict: str
    needs: str
    n: int
    clusters: int | None
    baseline: Cell
    candidate: Cell
    difference: Cell
    recovery: Cell
    lost: int
    won: int
    p: str
    total: bool


def _share(part: Share) -> Cell:
    return Cell(words.percent(part.value), words.interval(part))


def _difference(part: Difference) -> Cell:
    return Cell(words.points(part.value), words.interval(part))


def accuracy_row(row: TaskAccuracy, total: bool = False) -> AccuracyRow:
    """Return the row of a task, or with ``total`` that of all together."""
    return AccuracyRow(
        task=row.task,
        metric=row.metric,
        verdict=row.verdict,
        needs=words.questions(row.items_needed) if row.items_needed else "",
        n=row.n,
        clusters=row.clusters if row.clusters < row.n else None,
        baseline=_share(row.baseline),
        candidate=_share(row.candidate),
        difference=_difference(row.difference),
        recovery=_share(row.recovery) if row.recovery else Cell(NOTHING),
        lost=row.difference.lost,
        won=row.difference.won,
        p=words.p_value(row.p_adjusted),
        total=total,
    )


@dataclass(frozen=True, slots=True)
class Said:
    """What a system answered.

    Attributes:
        remarks: whether it is right, its score where that is neither 0 nor 1, and what else is to know of it.
        brief: the answer with what is to know of it but its score.
        long: whether it is too long to stand on a page whole.
    """

    system: str
    text: str
    remarks: str
    brief: str
    long: bool


#: Characters of an answer that a page shows whole.
_LONG = 240


def _said(given: Answer, system: str) -> Said:
    remarks = "right" if given.score >= RIGHT else "wrong"
    if given.score not in (0.0, 1.0):
        remarks += f", score {given.score:.2f}"
    if given.note:
        remarks += f"; {given.note}"
    if given.finish_reason == "length":
        remarks += "; cut at the token limit"
    return Said(system, given.text.strip() or "(empty)", remarks, words.answer(given), len(given.text) > _LONG)


@dataclass(frozen=True, slots=True)
class Flip:
    """A question whose answer went from right to wrong (``lost``) or back (``won``).

    Attributes:
        right: the right answer.
        images: data URLs of its pictures, those that the report holds.
        missing: which of them it does not hold, in words.
        said: what both systems answered, the baseline first.
    """

    id: str
    task: str
    flip: str
    question: str
    right: str
    images: list[str]
    missing: str
    said: list[Said]


@dataclass(frozen=True, slots=True)
class Flips:
    """The answers of one task that flipped."""

    task: str
    lost: list[Flip]
    won: list[Flip]


def _flip(item: Item, report: Report, thumbnails: Mapping[str, str]) -> Flip:
    images = [url for sha in item.pictures if (url := thumbnails.get(sha))]
    missing = ""
    if len(item.pictures) > len(images):
        missing = f"{'its picture is' if len(item.pictures) == 1 else 'some of its pictures are'} not kept"
    return Flip(
        id=item.id,
        task=item.task,
        flip=item.flip or "",
        question=item.question,
        right=words.golds(item),
        images=images,
        missing=missing,
        said=[_said(getattr(item, role), report.systems[role].label) for role in ROLES],
    )


# --- fidelity ---------------------------------------------------------------------------------------------------------


def _fidelity(report: Report) -> str:
    found = report.fidelity
    if found is None:
        return ""
    return (
        f"{len(found.items)} prompts ({found.source}), answers of at most {found.answer_tokens} tokens, the "
        f"{found.top_k} likeliest tokens at each place. The last column is the baseline's drift from itself."
    )


@dataclass(frozen=True, slots=True)
class Drifted:
    """One of the answers that drifted most.

    Attributes:
        kl: nats a token.
        images: data URLs of its pictures, those that the report holds.
        fate: where the candidate's answer parts from the baseline's.
    """

    id: str
    kl: str
    tokens: int
    prompt: str
    images: list[str]
    baseline: str
    candidate: str
    fate: str


def _drifted(report: Report) -> list[Drifted]:
    if report.fidelity is None:
        return []
    known = report.fidelity.thumbnails
    return [_drifted_item(item, known) for item in fidelity.worst(report.fidelity.items)]


def _drifted_item(item: FidelityItem, thumbnails: Mapping[str, str]) -> Drifted:
    fate = "other"
    if item.identical:
        fate = "the same"
    elif item.diverges_at is not None:
        fate = f"parts after {item.diverges_at} tokens"
    return Drifted(
        id=item.id,
        kl=words.nats(item.mean_kl or 0.0),
        tokens=item.tokens,
        prompt=item.prompt,
        images=[url for sha in item.pictures if (url := thumbnails.get(sha))],
        baseline=item.baseline or "(empty)",
        candidate=item.candidate or "(empty)",
        fate=fate,
    )


# --- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a latency, ms; p95 is empty where the report does not say."""

    p50: str
    p90: str
    p95: str
    p99: str


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One system under one load.

    Attributes:
        latencies: TTFT, TPOT, ITL and E2E; None where there is none.
        completed: requests.
        marks: what is wrong with the point; empty when nothing is.
    """

    load: str
    system: str
    role: Role
    latencies: list[Spread | None]
    tokens_per_s: str
    requests_per_s: str
    completed: int
    marks: str


def _spread(found: Distribution | None) -> Spread | None:
    if found is None:
        return None
    p95 = "" if found.p95 is None else words.number(found.p95)
    return Spread(words.number(found.p50), words.number(found.p90), p95, words.number(found.p99))


def _speed(point: SpeedPoint, report: Report) -> SpeedRow:
    tokens = point.output_tokens_per_s
    return SpeedRow(
        load=point.load.name,
        system=report.systems[point.role].label,
        role=point.role,
        latencies=[_spread(each) for each in (point.ttft_ms, point.tpot_ms, point.itl_ms, point.e2e_ms)],
        tokens_per_s=NOTHING if tokens is None else words.number(tokens),
        requests_per_s=words.number(point.requests_per_s),
        completed=point.completed,
        marks=words.marks(point),
    )


@dataclass(frozen=True, slots=True)
class Ratios:
    """Candidate / baseline: a column a figure of `FIGURES` that some load has, a row a load."""

    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def _ratios(report: Report) -> Ratios:
    metrics = [name for name in FIGURES if any(ratio.metric == name for ratio in report.speed_ratios)]
    rows = []
    for load in dict.fromkeys(ratio.load for ratio in report.speed_ratios):
        found = [report.ratio(metric, load) for metric in metrics]
        cells = [Cell(words.ratio(r.ratio), words.ratio_interval(r.low, r.high)) if r else Cell(NOTHING) for r in found]
        rows.append((load, cells))
    return Ratios([FIGURES[metric] for metric in metrics], rows)


@dataclass(frozen=True, slots=True)
class Counted:
    """Goodput, and what the servers and the GPUs counted: the columns that some point has, and each point's cells."""

    head: list[str]
    rows: list[tuple[SpeedRow, list[str]]]


def _counted(report: Report) -> Counted:
    slos = f" under {', '.join(report.workload.slos)}" if report.workload.slos else ""
    columns: dict[str, Callable[[SpeedPoint, ServerCounters], str]] = {
        f"Goodput{slos}, requests/s": lambda point, _: (
            f"{words.number(point.goodput.per_s)} ({words.percent(point.goodput.share)})" if point.goodput else NOTHING
        ),
        "Cached tokens": lambda _, server: words.percent(server.prefix_cache_share),
        "Cached images": lambda _, server: words.percent(server.image_cache_share),
        "Preemptions": lambda _, server: words.count(server.preemptions),
        "Queue, mean": lambda _, server: words.milliseconds(server.queue_mean_ms),
        "Energy a token": lambda point, _: (
            NOTHING if point.energy_j_per_token is None else f"{words.number(point.energy_j_per_token)} J"
        ),
    }
    cells = {
        name: [of(point, point.server or ServerCounters()) for point in report.speed] for name, of in columns.items()
    }
    shown = [name for name, column in cells.items() if set(column) != {NOTHING}]
    if not shown:
        return Counted([], [])
    rows = [(_speed(point, report), [cells[name][at] for name in shown]) for at, point in enumerate(report.speed)]
    return Counted(shown, rows)


# --- size and workload ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """Disk or memory of both systems, the baseline's first.

    Attributes:
        short: what it is called where there is little room; empty: it is left out there.
        within: whether it is a part of the row above.
        always: whether it is shown although it is known of neither.
    """

    name: str
    short: str
    values: list[str]
    within: bool = False
    always: bool = False

    @property
    def known(self) -> bool:
        """Whether it is known of one system at least."""
        return set(self.values) != {NOTHING}


def _sizes(report: Report) -> list[Size]:
    systems = [report.systems[role] for role in ROLES]
    weights = [words.gib(s.disk_weights_bytes) for s in systems]
    return [
        Size("stored as", "stored as", [s.quantization or NOTHING for s in systems], always=True),
        Size("checkpoint on disk", "on disk", [words.gib(s.disk_bytes) for s in systems], always=True),
        Size("of it weights", "", weights, within=True),
        Size("server, host memory", "host memory", [words.gib(s.memory.host_bytes) for s in systems], always=True),
        Size("server, GPU memory", "GPU memory", [words.gib(s.memory.gpu_bytes) for s in systems]),
        Size("weights in memory", "weights in memory", [words.gib(s.memory.weights_bytes) for s in systems]),
        Size("KV cache, tokens", "KV cache, tokens", [words.count(s.memory.kv_cache_tokens) for s in systems]),
    ]


def _counts(counts: Sequence[int]) -> str:
    """``24``, or ``96 to 288``."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def workload_text(report: Report) -> str:
    """What was asked, in a few sentences."""
    work = report.workload
    text = []
    if work.questions:
        text.append(
            f"{work.questions} questions ({work.tasks_source}), temperature 0, natural end, "
            f"at most {work.answer_tokens} tokens, {work.question_concurrency} in flight."
        )
    loads = []
    if work.concurrencies:
        bound = f"{work.duration_s:g} s" if work.duration_s else f"{_counts(work.requests)} requests"
        loads.append(f"closed loops ({bound} a point and system)")
    if work.rates:
        loads.append(f"open loops at {', '.join(f'{rate:g}' for rate in work.rates)} requests/s ({work.arrivals})")
    if work.sweep:
        loads.append(
            f"a sweep (one at a time, {work.sweep_concurrency} in flight, {work.sweep} rates between, {work.arrivals})"
        )
    if loads:
        ramp = f", after a ramp of {work.ramp_s:g} s" if work.ramp_s else ""
        prompt = f"prompts of {work.prompt_tokens} tokens, " if work.prompt_tokens else ""
        pictures = f"pictures of {', '.join(work.image_sizes)}"
        if work.images_per_request != "1":
            pictures += f", {work.images_per_request} a request"
        preset = f"Preset {work.preset}: " if work.preset else "Requests: "
        text.append(
            f"Load: {'; '.join(loads)}, in {work.rounds} rounds{ramp}. {preset}{prompt}{pictures}, exactly "
            f"{work.output_tokens} output tokens (end-of-text is ignored). "
            "Every picture and prompt is new to the server, warm-up inputs are others."
        )
    turns = "in turns, a few questions or one block of load each" if work.interleaved else "one after the other"
    text.append(f"The systems were measured {turns}. Seed {work.seed}.")
    return " ".join(text)
