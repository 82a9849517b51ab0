"""The numbers at the top: those that matter most, of those that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import words
from bench.report.headlines import throughput
from bench.report.schema import Report, SpeedFigure
from bench.roles import ROLES

__all__ = ["CARDS", "Card", "cards"]

#: The first screen has so many numbers.
CARDS = 4


@dataclass(frozen=True, slots=True)
class Card:
    """One of the numbers at the top.

    Attributes:
        said: ``better``, ``worse`` or ``not told apart``; empty where the number has no interval to tell by.
    """

    name: str
    value: str
    detail: str
    said: str = ""


def cards(report: Report) -> list[Card]:
    """The numbers that matter most, of those that were measured."""
    found = [*_quality_cards(report), *_speed_cards(report), *_size_cards(report)]
    # Accuracy, speed and size each answer another question; a second number of one of them gives way.
    if len(found) > CARDS:
        spare = [card for card in found if card.name in SPARE]
        found = [card for card in found if card not in spare[CARDS - len(found) :]]
    return found[:CARDS]


#: Latencies that have a card.
TIMES: dict[SpeedFigure, str] = {
    "tpot": "Time per token",
    "e2e": "End-to-end latency",
    "ttft": "Time to first token",
}
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
                row.verdict,
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
    chosen = [ratio for ratio in report.speed_ratios if ratio.headline]
    first = {ratio.metric: ratio for ratio in chosen}
    for metric, name in TIMES.items():
        if ratio := first.get(metric):
            shown = words.ratio_interval(ratio.low, ratio.high)
            found.append(Card(name, words.ratio(ratio.ratio), f"{ratio.load} (95%: {shown})", words.told(ratio)))
    most = throughput(chosen)
    if most:
        values = [
            words.number(point.figure(most.metric) or 0.0)
            for role in ROLES
            if (point := report.point(role, most.load)) is not None
        ]
        name = "Output tokens/s" if "tokens" in most.metric else "Requests/s"
        shown = words.ratio_interval(most.low, most.high)
        detail = f"{values[1]} against {values[0]}, {most.load} (95%: {shown})"
        found.append(Card(name, words.ratio(most.ratio), detail, words.told(most)))
    return found


def _size_cards(report: Report) -> list[Card]:
    base, cand = report.systems["baseline"], report.systems["candidate"]
    if not (base.disk_bytes and cand.disk_bytes):
        return []
    detail = f"{words.gib(cand.disk_bytes)} against {words.gib(base.disk_bytes)}"
    return [Card("Size on disk", words.ratio(cand.disk_bytes / base.disk_bytes), detail)]
