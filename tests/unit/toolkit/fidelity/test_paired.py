"""Per-answer divergences compared: the three kinds of mean, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.fidelity.paired import by_group, compare, summarize


def drawn(seed: int, answers: int = 400) -> tuple[list[float], list[int]]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 12, answers)
    return list(np.exp(rng.normal(-8, 2, answers)) * tokens), [int(n) for n in tokens]


def test_half_of_everything_is_half_by_every_mean() -> None:
    sums, tokens = drawn(0)
    ratios = compare(sums, [kl / 2 for kl in sums], tokens)
    for band in (ratios.mean, ratios.trimmed, ratios.geometric):
        assert (band.value, band.low, band.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratios.answers == 400


def test_one_answer_moves_the_mean_alone() -> None:
    sums, tokens = drawn(1)
    worse = list(sums)
    worse[7] = 50 * sum(sums)
    ratios = compare(sums, worse, tokens)
    assert ratios.mean.value > 30
    assert ratios.trimmed.value == pytest.approx(1, abs=1e-6)
    assert ratios.geometric.value == pytest.approx(1, abs=0.1)


def test_intervals_cover_and_the_geometric_is_narrowest() -> None:
    """Ratios of log-normal answers about 0.8: nine in ten intervals of a geometric mean hold it."""
    held, widths = 0, []
    for seed in range(40):
        sums, tokens = drawn(seed)
        noise = np.exp(np.random.default_rng(1000 + seed).normal(np.log(0.8), 0.5, len(sums)))
        ratios = compare(sums, list(np.array(sums) * noise), tokens, seed=seed)
        held += ratios.geometric.low <= 0.8 <= ratios.geometric.high
        widths.append((ratios.mean.high - ratios.mean.low) / (ratios.geometric.high - ratios.geometric.low))
    assert held >= 34
    assert np.median(widths) > 1.5


def test_means_are_weighed_by_tokens_and_seeded() -> None:
    spread = summarize([1.0, 3.0], [1, 9])
    assert spread.mean.value == pytest.approx(0.4)
    assert spread.geometric.value == pytest.approx((1.0 / 3) ** 0.5)
    assert summarize([1.0, 3.0, 2.0], [1, 9, 4]) == summarize([1.0, 3.0, 2.0], [1, 9, 4])
    assert spread.to_dict()["mean"]["value"] == spread.mean.value


def test_what_is_zero_to_float32_is_no_ratio() -> None:
    ratios = compare([0.0, 1.0], [0.0, 1.0], [1, 1])
    assert ratios.geometric.value == pytest.approx(1)


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="one at least"):
        summarize([], [])
    assert by_group(["a", "b", "a"], [1, 2, 3]) == {"a": [1, 3], "b": [2]}
