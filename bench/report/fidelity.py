"""What `bench.judge.fidelity` found out, as a report holds it: the drift, every item, images of those that drifted
most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.judge import fidelity
from bench.judge.stats import Interval
from bench.questions import observe
from bench.questions.observe import Item, Observed
from bench.report.schema import Drift, Fidelity, FidelityItem, Share
from bench.report.thumbnails import thumbnails
from bench.run.config import BenchConfig
from bench.run.measured import Observer

__all__ = ["DEFINITIONS", "doubts", "found", "worst"]

#: Items that are shown with their images, and characters of data URLs they may take.
SHOWN, BUDGET = 8, 2**20

DEFINITIONS = {
    "kl": "KL = sum of p log(p/q) over tokens that both systems list, all others as one bucket, in nats a token, on "
    "the baseline's own greedy answers, p of the baseline, q of the candidate: a lower bound of the whole one.",
    "geometric_kl": "Trimmed KL = without the hundredth of the answers that drifted most. Geometric KL = geometric "
    "mean over answers of an answer's nats a token: what is usual, where the mean is mostly that of the worst few.",
    "top1_agreement": "Top-1 agreement = share of those tokens at which both find the same one likeliest.",
    "delta_p": "delta-p = q - p of the token that the baseline chose.",
    "perplexity_ratio": "Perplexity ratio = exp of the mean negative log-likelihood of the baseline's tokens, "
    "candidate / baseline.",
    "first_divergence": "First divergence = median, over answers that differ, of the tokens in common before they "
    "part.",
    "noise": "Noise = the same measures of the baseline against itself, asked again. Intervals: bootstrap over items "
    "that share no image.",
}


def found(
    items: Sequence[Item], observed: Mapping[Observer, Observed], config: BenchConfig, *, source: str
) -> Fidelity:
    """Compare what the systems did with ``items``; their images may be read once more."""
    result = fidelity.compare(
        items,
        observed["baseline"],
        observed["candidate"],
        observed.get("again"),
        top_k=config.top_k,
        seed=config.seed,
    )
    rows = [_item(drift) for drift in result.items]
    most = {row.id for row in worst(rows)}
    small = thumbnails([image for item in items if item.id in most for image in item.images], BUDGET)
    return Fidelity(
        source=source,
        items_sha256=observe.digest(items),
        top_k=result.top_k,
        answer_tokens=config.fidelity_tokens,
        candidate=_drift(result.candidate),
        noise=_drift(result.noise) if result.noise else None,
        items=rows,
        missing=list(result.missing),
        failed=result.failed,
        prompts_differ=result.prompts_differ,
        thumbnails=small.urls,
    )


def worst(rows: Sequence[FidelityItem]) -> list[FidelityItem]:
    """Return the items that drifted most, the first the most, those alone of which drift is known."""
    known = [row for row in rows if row.mean_kl]
    return sorted(known, key=lambda row: row.mean_kl or 0.0, reverse=True)[:SHOWN]


def _item(drift: fidelity.ItemDrift) -> FidelityItem:
    return FidelityItem(
        id=drift.item.id,
        prompt=drift.item.text,
        images=[image.sha256 for image in drift.item.images],
        baseline=drift.baseline.text if drift.baseline else None,
        candidate=drift.candidate.text if drift.candidate else None,
        mean_kl=drift.mean_kl,
        tokens=len(drift.tokens),
        identical=drift.identical,
        diverges_at=drift.diverges_at,
        failure=drift.failure,
    )


def _share(interval: Interval | None) -> Share | None:
    return Share(value=interval.value, low=interval.low, high=interval.high) if interval else None


def _drift(drift: fidelity.Drift) -> Drift:
    return Drift(
        tokens=drift.tokens,
        scored=drift.scored,
        mean_kl=_share(drift.mean_kl),
        p99_kl=_share(drift.p99_kl),
        trimmed_kl=_share(drift.trimmed_kl),
        geometric_kl=_share(drift.geometric_kl),
        coverage=drift.coverage,
        top1_agreement=_share(drift.top1_agreement),
        delta_p={
            str(at): Share(value=found.value, low=found.low, high=found.high) for at, found in drift.delta_p.items()
        },
        perplexity=_share(drift.perplexity),
        perplexity_ratio=_share(drift.perplexity_ratio),
        greedy=drift.greedy,
        answered=drift.answered,
        identical=_share(drift.identical),
        first_divergence=_share(drift.first_divergence),
    )


def doubts(of: Fidelity) -> list[str]:
    """Return what a reader should know about it."""
    notes = [f"fidelity: not measured: {reason}" for reason in of.missing]
    if of.failed:
        first = next(item.failure for item in of.items if item.failure)
        notes.append(f"fidelity: {of.failed} of {len(of.items)} items failed and are left out; first: {first}")
    if of.prompts_differ:
        notes.append(f"fidelity: the systems saw {of.prompts_differ} items as other prompt tokens")
    if of.candidate.greedy is not None and of.candidate.greedy < 0.9:
        notes.append(
            f"fidelity: the baseline finds only {of.candidate.greedy:.0%} of its own tokens likeliest when it reads "
            "them; it does not read what it answered, and the drift is not to be trusted"
        )
    return notes
