"""report.html: one file that needs nothing else, in light and dark, on a phone and on paper."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.report import fidelity, words
from bench.report.render import markdown, plots
from bench.report.schema import Item, Report
from bench.roles import ROLES

__all__ = ["render"]


#: verdict -> CSS class, sign, heading. The sign and the words carry the meaning, colour only repeats it.
BADGES = {
    "no worse": ("good", "✓", "No worse"),
    "worse": ("bad", "✗", "Worse"),
    "can't tell": ("open", "?", "Can’t tell"),
    "failed": ("bad", "!", "Run failed"),
    "partial": ("open", "…", "Not complete"),
    None: ("open", "–", "Accuracy not measured"),
}


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


@dataclass(frozen=True, slots=True)
class Flips:
    """The answers of one task that flipped, the lost ones first."""

    task: str
    lost: list[Item]
    won: list[Item]


def flips(report: Report) -> list[Flips]:
    """The answers that flipped by task, in the report's order; tasks without any are left out."""
    if not report.accuracy:
        return []
    flipped = report.accuracy.flipped
    groups = [
        Flips(
            row.task,
            [item for item in flipped if (item.task, item.flip) == (row.task, "lost")],
            [item for item in flipped if (item.task, item.flip) == (row.task, "won")],
        )
        for row in report.accuracy.tasks
    ]
    return [group for group in groups if group.lost or group.won]


def render(report: Report) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(
        loader=PackageLoader("bench.report.render", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "points": words.points,
        "interval": words.interval,
        "p_value": words.p_value,
        "number": words.number,
        "ratio": words.ratio,
        "nats": words.nats,
        "count": words.count,
        "gib": words.gib,
        "limit": words.limit,
        "questions": words.questions,
        "golds": words.golds,
        "drift_picture_of": (report.fidelity.thumbnails if report.fidelity else {}).get,
        "picture_of": (report.accuracy.thumbnails if report.accuracy else {}).get,
    }
    tasks = report.accuracy.tasks if report.accuracy else []
    return environment.get_template("report.html.j2").render(
        report=report,
        roles=ROLES,
        badges=BADGES,
        badge=BADGES[report.verdict.accuracy if report.status == "ok" else report.status],
        worse_tasks=[row.task for row in tasks if row.verdict == "worse"] if len(tasks) > 1 else [],
        cards=[] if report.status == "failed" else cards(report),
        flips=flips(report),
        accuracy_plot=Markup(plots.accuracy_plot(tasks)) if report.accuracy else None,
        difference_plot=Markup(plots.difference_plot(report.accuracy, report.verdict.margin))
        if report.accuracy
        else None,
        speed_curves=[(title, reading, Markup(svg)) for title, reading, svg in plots.speed_curves(report)],
        cdf_plots=[(title, reading, Markup(svg)) for title, reading, svg in plots.cdf_plots(report)],
        figures={
            name: shown
            for name, shown in markdown.FIGURES.items()
            if any(r.metric == name for r in report.speed_ratios)
        },
        ratio_interval=words.ratio_interval,
        marks=words.marks,
        counted=markdown.counted(report),
        drift_rows=words.drift_rows(report.fidelity) if report.fidelity else [],
        fidelity_text=markdown.fidelity_text(report.fidelity) if report.fidelity else "",
        drifted=fidelity.worst(report.fidelity.items) if report.fidelity else [],
        workload_text=markdown.workload_text(report),
    )
