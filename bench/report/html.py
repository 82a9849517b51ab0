"""report.html: one file that needs nothing else, in light and dark, on a phone and on paper."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.report import markdown, plots, words
from bench.report.model import Item, Report, Role

__all__ = ["render"]

ROLES: tuple[Role, ...] = ("baseline", "candidate")

#: verdict -> CSS class, sign, heading. The sign and the words carry the meaning, colour only repeats it.
BADGES = {
    "no worse": ("good", "✓", "No worse"),
    "worse": ("bad", "✗", "Worse"),
    "can't tell": ("open", "?", "Can’t tell"),
    "failed": ("bad", "!", "Run failed"),
    None: ("open", "–", "Accuracy not measured"),
}


@dataclass(frozen=True, slots=True)
class Card:
    """One of the numbers at the top."""

    name: str
    value: str
    detail: str


def cards(report: Report) -> list[Card]:
    """The numbers that matter most, those that were measured."""
    found = []
    base, cand = report.systems["baseline"], report.systems["candidate"]
    if report.accuracy:
        row = report.accuracy.overall
        found.append(
            Card(
                "Accuracy",
                f"{words.points(row.difference.value)} pt",
                f"{words.percent(row.candidate.value)} against {words.percent(row.baseline.value)}",
            )
        )
    for metric, name in (("ttft", "Time to first token"), ("tpot", "Time per token")):
        ratio = next((r for r in report.speed_ratios if r.metric == metric), None)
        if ratio:
            found.append(
                Card(
                    name,
                    words.ratio(ratio.ratio),
                    f"{ratio.concurrency} in flight (95%: {ratio.low:.2f}–{ratio.high:.2f})",
                )
            )
    if report.workload.concurrencies:
        most = max(report.workload.concurrencies)
        before, after = report.point("baseline", most), report.point("candidate", most)
        if before and after and before.output_tokens_per_s and after.output_tokens_per_s:
            found.append(
                Card(
                    "Output tokens/s",
                    words.ratio(after.output_tokens_per_s / before.output_tokens_per_s),
                    f"{words.number(after.output_tokens_per_s)} against {words.number(before.output_tokens_per_s)}, "
                    f"{most} in flight",
                )
            )
    if base.disk_bytes and cand.disk_bytes:
        found.append(
            Card(
                "Size on disk",
                words.ratio(cand.disk_bytes / base.disk_bytes),
                f"{words.gib(cand.disk_bytes)} against {words.gib(base.disk_bytes)}",
            )
        )
    return found


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
        loader=PackageLoader("bench.report", ""),
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
        "gib": words.gib,
        "limit": words.limit,
        "questions": words.questions,
        "golds": words.golds,
        "picture_of": (report.accuracy.thumbnails if report.accuracy else {}).get,
    }
    tasks = report.accuracy.tasks if report.accuracy else []
    return environment.get_template("report.html.j2").render(
        report=report,
        roles=ROLES,
        badges=BADGES,
        badge=BADGES["failed" if report.status == "failed" else report.verdict.accuracy],
        worse_tasks=[row.task for row in tasks if row.verdict == "worse"] if len(tasks) > 1 else [],
        cards=[] if report.status == "failed" else cards(report),
        flips=flips(report),
        accuracy_plot=Markup(plots.accuracy_plot(tasks)) if report.accuracy else None,
        difference_plot=Markup(plots.difference_plot(report.accuracy, report.verdict.margin))
        if report.accuracy
        else None,
        speed_plots=[(title, reading, Markup(svg)) for title, reading, svg in plots.speed_plots(report)],
        workload_text=markdown.workload_text(report),
    )
