"""How far the candidate's tokens drift from the baseline's, without labels: on the baseline's own greedy answers to
images and prompts, what does the candidate think of each token?

Both read the baseline's answers in the same way (`bench.questions.observe`), so that both sides of every number come
from the
same code path, and the baseline does it all a second time: what it drifts from itself is the noise floor. A server that
can't read answers still has its own compared; `Fidelity.missing` says what could not be measured and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

from bench.judge.stats import CONFIDENCE, Interval, wilson
from bench.questions.observe import (
    IMAGE_PROMPT,
    Answer,
    Item,
    Observation,
    Observed,
    Position,
    items_from_images,
    items_from_questions,
    observe,
)

__all__ = [
    "DELTA_P_PERCENTILES",
    "IMAGE_PROMPT",
    "KL_FLOOR",
    "TAIL_FLOOR",
    "Answer",
    "Drift",
    "Fidelity",
    "Item",
    "ItemDrift",
    "Observed",
    "TokenDrift",
    "compare",
    "first_divergence",
    "items_from_images",
    "items_from_questions",
    "observe",
    "truncated_kl",
]

DELTA_P_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
RESAMPLES = 2000
#: Servers compute in float32, and the probabilities they list may add up to 1 + 1e-7: what is left for the rest of the
#: vocabulary is not known more exactly than this.
TAIL_FLOOR = 1e-6
#: An answer's nats a token below which servers' float32 tells nothing, and the share of answers that is trimmed.
KL_FLOOR, TRIMMED = 1e-8, 0.01

Floats = npt.NDArray[np.float64]

# --- measures ---------------------------------------------------------------------------------------------------------


def truncated_kl(baseline: Mapping[int, float], candidate: Mapping[int, float]) -> tuple[float, float]:
    """Return KL(baseline || candidate) in nats over the tokens that both list, and the baseline's probability of them.

    All other tokens are one bucket, with what probability is left. That is the divergence of two distributions again,
    and by the log sum inequality (Cover & Thomas, Elements of Information Theory, 2.7) never more than that over the
    whole vocabulary, up to `TAIL_FLOOR`.

    Args:
        baseline: log-probabilities by token, nats.
        candidate: likewise.
    """
    shared = baseline.keys() & candidate.keys()
    p, q = (math.fsum(math.exp(side[token]) for token in shared) for side in (baseline, candidate))
    rest_p, rest_q = max(1.0 - p, TAIL_FLOOR), max(1.0 - q, TAIL_FLOOR)
    terms = [math.exp(baseline[token]) * (baseline[token] - candidate[token]) for token in shared]
    return max(0.0, math.fsum([*terms, rest_p * math.log(rest_p / rest_q)])), min(1.0, p)


def first_divergence(baseline: Sequence[object], candidate: Sequence[object]) -> int | None:
    """Return how many tokens two answers have in common before they part; None when they are the same."""
    for at, (before, after) in enumerate(zip(baseline, candidate, strict=False)):
        if before != after:
            return at
    return None if len(baseline) == len(candidate) else min(len(baseline), len(candidate))


@dataclass(frozen=True, slots=True)
class TokenDrift:
    """What the two systems thought of one token of the baseline's answer.

    Attributes:
        token: id.
        text: of the token.
        baseline_logprob: nats.
        candidate_logprob: nats.
        kl: `truncated_kl` at its position, nats.
        coverage: the baseline's probability of the tokens over which ``kl`` is taken singly.
        agrees: whether both find the same token likeliest (ties agree).
        greedy: whether the baseline, reading, finds likeliest what it generated.
    """

    token: int
    text: str
    baseline_logprob: float
    candidate_logprob: float
    kl: float
    coverage: float
    agrees: bool
    greedy: bool

    @property
    def delta_p(self) -> float:
        """Probability, candidate - baseline."""
        return math.exp(self.candidate_logprob) - math.exp(self.baseline_logprob)


@dataclass(frozen=True, slots=True)
class ItemDrift:
    """One item's answers.

    Attributes:
        item: what was asked.
        baseline: its answer; None when it failed.
        candidate: its own greedy answer; None when it failed.
        identical: whether the two are the same, token by token (as texts, where a server does not tell the tokens);
            None when one failed.
        diverges_at: how many tokens they have in common before they part; None when they don't, or can't be told.
        tokens: of the baseline's answer; empty when it could not be scored.
        same_prompt: whether both saw the same prompt tokens (another image resolution makes others); None: not told.
        failure: what failed, and whose; None when nothing did.
    """

    item: Item
    baseline: Answer | None
    candidate: Answer | None
    identical: bool | None = None
    diverges_at: int | None = None
    tokens: tuple[TokenDrift, ...] = ()
    same_prompt: bool | None = None
    failure: str | None = None

    @property
    def mean_kl(self) -> float | None:
        """Nats a token; None without tokens."""
        return math.fsum(token.kl for token in self.tokens) / len(self.tokens) if self.tokens else None


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one system is from the baseline. Intervals are bootstrap intervals of `stats.CONFIDENCE`; clusters of
    items are what is resampled.

    Measured on the baseline's answers, over all their tokens; None where none could be scored:

    Attributes:
        tokens: how many were scored.
        scored: items they belong to.
        mean_kl: mean of `truncated_kl`, nats a token.
        p99_kl: its 99th percentile over tokens, nats.
        trimmed_kl: `mean_kl` without the hundredth of the answers that drifted most (none, of fewer than a hundred).
        geometric_kl: geometric mean over answers of an answer's nats a token, each `KL_FLOOR` at least: what is usual,
            where the mean is mostly that of the worst few. Its interval is much the narrowest.
        coverage: mean of `TokenDrift.coverage`: how little of the baseline's probability is in the bucket.
        top1_agreement: share of tokens at which both find the same one likeliest.
        delta_p: percentiles (`DELTA_P_PERCENTILES`) of candidate's - baseline's probability of the baseline's token.
        perplexity: of the baseline's answers under the baseline, exp of the mean negative log-likelihood a token.
        perplexity_ratio: candidate's perplexity of them / baseline's.
        greedy: share of tokens that the baseline, reading its answer, finds likeliest. Below 1 by the noise between
            generating and reading alone; far below it, the two are not the same chat and nothing here is to be trusted.

    Measured on the greedy answers of both; None where none could be compared:

    Attributes:
        answered: items that both answered.
        identical: share of answers that are the same.
        first_divergence: median, over those that are not, of the tokens in common before they part.
    """

    tokens: int = 0
    scored: int = 0
    mean_kl: Interval | None = None
    p99_kl: Interval | None = None
    trimmed_kl: Interval | None = None
    geometric_kl: Interval | None = None
    coverage: float | None = None
    top1_agreement: Interval | None = None
    delta_p: Mapping[int, Interval] = field(default_factory=dict)
    perplexity: Interval | None = None
    perplexity_ratio: Interval | None = None
    greedy: float | None = None
    answered: int = 0
    identical: Interval | None = None
    first_divergence: Interval | None = None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The candidate against the baseline, and the baseline against itself.

    Attributes:
        top_k: likeliest tokens that each system listed at each position.
        candidate: the drift.
        noise: the drift of the baseline from itself, asked again; None when it was not.
        items: in their order.
        missing: what could not be measured and why, a line each.
        failed: items with a failed request or a mismatch; these are left out of what they lack.
        prompts_differ: items that the two systems saw as different prompt tokens.
    """

    top_k: int
    candidate: Drift
    noise: Drift | None
    items: tuple[ItemDrift, ...]
    missing: tuple[str, ...]
    failed: int
    prompts_differ: int


def compare(
    items: Sequence[Item],
    baseline: Observed,
    candidate: Observed,
    again: Observed | None = None,
    *,
    top_k: int,
    seed: int = 0,
) -> Fidelity:
    """Compare what was observed.

    Args:
        again: the baseline, observed once more with itself as the reference.
        top_k: as it was observed with.
        seed: of the resampling.
    """
    drifts = [_item_drift(item, baseline, candidate, "candidate") for item in items]
    repeated = [_item_drift(item, baseline, again, "baseline, asked again") for item in items] if again else []
    systems = {"baseline": baseline, "candidate": candidate}
    missing = [
        f"KL, top-1 agreement, delta-p and perplexity: {name}: {system.missing}"
        for name, system in systems.items()
        if system.missing
    ]
    answered = [drift for drift in drifts if drift.baseline and drift.candidate]
    if answered and not any(_comparable(drift.baseline, drift.candidate) for drift in answered):
        missing.append("first divergence: answers are compared as texts, a server does not tell their tokens")
    return Fidelity(
        top_k=top_k,
        candidate=_drift(drifts, seed),
        noise=_drift(repeated, seed) if again else None,
        items=tuple(drifts),
        missing=tuple(missing),
        failed=sum(drift.failure is not None for drift in drifts),
        prompts_differ=sum(drift.same_prompt is False for drift in drifts),
    )


def _item_drift(item: Item, baseline: Observed, candidate: Observed, name: str) -> ItemDrift:
    nothing = Observation()
    before, after = baseline.items.get(item.id, nothing), candidate.items.get(item.id, nothing)
    failure = None
    for owner, failed in (("baseline", before.failure), (name, after.failure)):
        if failed and failure is None:
            failure = f"{owner}: {failed.message}"
    if before.answer is None or after.answer is None:
        return ItemDrift(item, before.answer, after.answer, failure=failure)
    pair = _comparable(before.answer, after.answer)
    apart = first_divergence(*pair) if pair else None
    prompts = before.answer.prompt, after.answer.prompt
    return ItemDrift(
        item=item,
        baseline=before.answer,
        candidate=after.answer,
        identical=apart is None if pair else before.answer.text == after.answer.text,
        diverges_at=apart,
        tokens=tuple(map(_token_drift, before.positions or (), after.positions or ())),
        same_prompt=None if None in prompts else prompts[0] == prompts[1],
        failure=failure,
    )


def _comparable(baseline: Answer | None, candidate: Answer | None) -> tuple[Sequence[object], Sequence[object]] | None:
    """Return both answers as sequences of the same kind of tokens: ids, else bytes; None when there are none."""
    if baseline is None or candidate is None:
        return None
    if baseline.tokens is not None and candidate.tokens is not None:
        return baseline.tokens, candidate.tokens
    if baseline.pieces is not None and candidate.pieces is not None:
        return baseline.pieces, candidate.pieces
    return None


def _token_drift(baseline: Position, candidate: Position) -> TokenDrift:
    kl, coverage = truncated_kl(baseline.logprobs, candidate.logprobs)
    likeliest = _likeliest(baseline)
    return TokenDrift(
        token=baseline.token,
        text=baseline.text,
        baseline_logprob=baseline.logprobs[baseline.token],
        candidate_logprob=candidate.logprobs[baseline.token],
        kl=kl,
        coverage=coverage,
        agrees=bool(likeliest & _likeliest(candidate)),
        greedy=baseline.token in likeliest,
    )


def _likeliest(position: Position) -> set[int]:
    """Several when they tie, which 16-bit logits often do."""
    most = max(position.logprobs.values())
    return {token for token, value in position.logprobs.items() if value == most}


# --- summary ----------------------------------------------------------------------------------------------------------


def _drift(drifts: Sequence[ItemDrift], seed: int) -> Drift:
    scored = [drift for drift in drifts if drift.tokens]
    answered = [drift for drift in drifts if drift.identical is not None]
    found: dict[str, Any] = {"scored": len(scored), "answered": len(answered)}
    if scored:
        found |= _over_tokens(scored, seed)
    if answered:
        same: Floats = np.array([drift.identical for drift in answered], dtype=np.float64)
        clusters = _Clusters([drift.item.cluster or drift.item.id for drift in answered], seed)
        found["identical"] = clusters.share(same)
        apart = [drift for drift in answered if drift.diverges_at is not None]
        if apart:
            some = _Clusters([drift.item.cluster or drift.item.id for drift in apart], seed)
            lengths: Floats = np.array([drift.diverges_at for drift in apart], dtype=np.float64)
            found["first_divergence"] = some.quantiles(lengths, [0.5])[0]
    return Drift(**found)


def _over_tokens(scored: Sequence[ItemDrift], seed: int) -> dict[str, Any]:
    clusters = _Clusters([drift.item.cluster or drift.item.id for drift in scored for _ in drift.tokens], seed)
    tokens = [token for drift in scored for token in drift.tokens]
    kl, delta_p, before, after, agrees = (
        np.array(column, dtype=np.float64)
        for column in zip(
            *((each.kl, each.delta_p, each.baseline_logprob, each.candidate_logprob, each.agrees) for each in tokens),
            strict=True,
        )
    )
    steps = [percentile / 100 for percentile in DELTA_P_PERCENTILES]
    return {
        "tokens": len(tokens),
        "mean_kl": clusters.mean(kl),
        "p99_kl": clusters.quantiles(kl, [0.99])[0],
        **_robust(scored, seed),
        "coverage": float(np.mean([token.coverage for token in tokens])),
        "top1_agreement": clusters.share(agrees),
        "delta_p": dict(zip(DELTA_P_PERCENTILES, clusters.quantiles(delta_p, steps), strict=True)),
        "perplexity": _exp(clusters.mean(-before)),
        "perplexity_ratio": _exp(clusters.mean(before - after)),
        "greedy": float(np.mean([token.greedy for token in tokens])),
    }


def _robust(scored: Sequence[ItemDrift], seed: int) -> dict[str, Any]:
    """Return the means over answers that the worst few don't decide."""
    means: Floats = np.array([drift.mean_kl for drift in scored], dtype=np.float64)
    names = [drift.item.cluster or drift.item.id for drift in scored]
    limit = np.sort(means)[-1 - int(TRIMMED * len(means))]
    kept = [drift for drift, mean in zip(scored, means, strict=True) if mean <= limit]
    tokens = _Clusters([drift.item.cluster or drift.item.id for drift in kept for _ in drift.tokens], seed)
    kl: Floats = np.array([token.kl for drift in kept for token in drift.tokens], dtype=np.float64)
    logs: Floats = np.log(np.maximum(means, KL_FLOOR))
    return {"trimmed_kl": tokens.mean(kl), "geometric_kl": _exp(_Clusters(names, seed).mean(logs))}


def _exp(interval: Interval) -> Interval:
    # Percentiles of a mean go through a monotone function.
    return Interval(math.exp(interval.value), math.exp(interval.low), math.exp(interval.high))


class _Clusters:
    """Bootstrap intervals of statistics over values that come in clusters, which are drawn whole.

    Expanded percentile intervals (see `stats.mean_interval`); with a single cluster there is nothing to resample, and
    the interval is the value.
    """

    def __init__(self, names: Sequence[str], seed: int) -> None:
        numbers: dict[str, int] = {}
        self._codes = np.array([numbers.setdefault(name, len(numbers)) for name in names])
        self._count = len(numbers)
        self._seed = seed

    def mean(self, values: Floats) -> Interval:
        """Of the mean over values, not over clusters."""
        sums = np.bincount(self._codes, weights=values)
        sizes = np.bincount(self._codes).astype(np.float64)
        draws = [(drawn @ sums) / (drawn @ sizes) for drawn in self._draws(1)]
        return self._interval(float(values.mean()), np.concatenate(draws))

    def share(self, values: Floats) -> Interval:
        """Of a mean of zeros and ones. Where all are equal nothing varies, which proves little: then it is Wilson's
        interval, each cluster counted once."""
        if np.ptp(values) == 0.0:
            return wilson(float(values[0]) * self._count, self._count)
        return self.mean(values)

    def quantiles(self, values: Floats, levels: Sequence[float]) -> list[Interval]:
        """Of quantiles over values: the smallest value with at least such a share of all at or below it."""
        order = np.argsort(values, kind="stable")
        ranked, codes = values[order], self._codes[order]
        shares = np.array(levels) * (1.0 - 1e-12)  # a weight's rounding does not push a quantile on

        def pick(weights: Floats) -> Floats:
            reached = np.cumsum(weights, axis=1)
            found: Floats = ranked[np.array([np.searchsorted(row, shares * row[-1]) for row in reached])]
            return found

        observed = pick(np.ones((1, values.size)))[0]
        draws = np.concatenate([pick(drawn[:, codes]) for drawn in self._draws(values.size)])
        return [self._interval(float(value), draws[:, at]) for at, value in enumerate(observed)]

    def _draws(self, width: int) -> Iterator[Floats]:
        """Yield how often each cluster was drawn, shape [resamples, clusters]; a block of them is as large as
        ``width`` values a resample allow."""
        rng = np.random.default_rng(self._seed)
        step = max(1, 2_000_000 // max(width, self._count))
        for done in range(0, RESAMPLES, step):
            rows = min(step, RESAMPLES - done)
            yield rng.multinomial(self._count, np.full(self._count, 1.0 / self._count), size=rows).astype(np.float64)

    def _interval(self, value: float, draws: Floats) -> Interval:
        if self._count < 2:
            return Interval(value, value, value)
        expanded = math.sqrt(self._count / (self._count - 1)) * float(t.ppf((1.0 - CONFIDENCE) / 2.0, self._count - 1))
        tail = float(norm.cdf(expanded))
        low, high = np.quantile(draws, [tail, 1.0 - tail])
        return Interval(value, min(value, float(low)), max(value, float(high)))
