"""Drift from the baseline: what was asked, and the answers that drifted most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.report import words
from bench.report.fidelity import worst
from bench.report.schema import FidelityItem, Report

__all__ = ["Drifted", "drifted", "fidelity_text"]


def fidelity_text(report: Report) -> str:
    """Return what was asked for it, in a sentence; empty where it was not measured."""
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
        images: data URLs of its images, those that the report holds.
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


def drifted(report: Report) -> list[Drifted]:
    """Return the answers that drifted most, the first the most."""
    if report.fidelity is None:
        return []
    known = report.fidelity.thumbnails
    return [_drifted_item(item, known) for item in worst(report.fidelity.items)]


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
        images=[url for sha in item.images if (url := thumbnails.get(sha))],
        baseline=item.baseline or "(empty)",
        candidate=item.candidate or "(empty)",
        fate=fate,
    )
