from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import stats


def test_flips_go_both_ways() -> None:
    found = stats.flips([True, True, False, False, True], [True, False, True, False, False])
    assert (found.lost, found.won, found.n) == (2, 1, 5)


def test_flips_need_pairs() -> None:
    with pytest.raises(ValueError):
        stats.flips([True], [True, False])


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 2 * 0.5**5),
        (6, 0, 2 * 0.5**6),
        (3, 3, 1.0),
        (8, 2, 2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10),
    ],
)
def test_mcnemar_is_the_exact_binomial(lost: int, won: int, p: float) -> None:
    assert stats.mcnemar(lost, won) == pytest.approx(min(1.0, p))
    assert stats.mcnemar(won, lost) == pytest.approx(min(1.0, p))


def test_wilson_agrees_with_its_formula() -> None:
    z, n, p = 1.959963984540054, 50, 45 / 50
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = stats.wilson(45, 50)
    assert (found.low, found.high) == pytest.approx(
        ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    )


def test_all_right_still_has_a_width() -> None:
    found = stats.wilson(50, 50)
    assert found.high == 1.0
    assert found.low < 0.95


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_the_paired_interval_holds_its_value_and_mirrors(lost: int, won: int, same: int) -> None:
    n = lost + won + same
    if n == 0:
        return
    found, mirrored = stats.paired_proportions(lost, won, n), stats.paired_proportions(won, lost, n)
    assert -1.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.low < found.high
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-6)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_no_flips_leave_tangos_closed_form(n: int) -> None:
    z2 = 1.959963984540054**2
    found = stats.paired_proportions(0, 0, n)
    assert (found.low, found.high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-6)


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, p_lost, p_won, n = np.random.default_rng(0), 0.06, 0.03, 150
    hits = 0
    for lost, won, _ in rng.multinomial(n, [p_lost, p_won, 1 - p_lost - p_won], size=800):
        found = stats.paired_proportions(int(lost), int(won), n)
        hits += found.low <= p_won - p_lost <= found.high
    assert 0.93 <= hits / 800 <= 0.975


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for seed in range(200):
        found = stats.paired_bootstrap(list(rng.normal(0.1, 1.0, 80)), seed=seed, resamples=500)
        hits += found.low <= 0.1 <= found.high
    assert 0.90 <= hits / 200 <= 0.985


def test_the_bootstrap_is_repeatable_and_centred() -> None:
    values = [0.0, 0.5, -0.25, 1.0, 0.0, 0.1]
    found = stats.paired_bootstrap(values, seed=3)
    assert found == stats.paired_bootstrap(values, seed=3)
    assert found.value == pytest.approx(np.mean(values))
    assert found.low < found.value < found.high


def test_a_constant_sample_is_its_own_interval() -> None:
    assert stats.mean_interval([0.5, 0.5], seed=0) == stats.Interval(0.5, 0.5, 0.5)
    assert stats.mean_interval([0.5], seed=0) == stats.Interval(0.5, 0.5, 0.5)


def test_the_ratio_of_medians_finds_a_difference_and_no_difference() -> None:
    rng = np.random.default_rng(2)
    base = list(rng.gamma(50, 2.0, 200))
    slower, same = (
        stats.ratio_of_medians([1.5 * x for x in base], base, seed=0),
        stats.ratio_of_medians(base[::2], base[1::2], seed=0),
    )
    assert slower is not None and same is not None
    assert slower.value == pytest.approx(1.5)
    assert slower.low > 1.3
    assert same.low < 1.0 < same.high
    assert stats.ratio_of_medians([], [1.0], seed=0) is None


def test_the_smallest_detectable_difference_is_detected_as_often_as_it_says() -> None:
    n, rate = 500, 0.10
    d = stats.smallest_detectable(n, rate)
    assert d == pytest.approx(0.04, abs=0.003)  # 500 items show nothing under about 4 points
    rng = np.random.default_rng(5)
    p_lost, p_won = (rate + d) / 2, (rate - d) / 2
    draws = rng.multinomial(n, [p_lost, p_won, 1 - rate], size=600)
    found = np.mean([stats.mcnemar(int(lost), int(won)) < 0.05 for lost, won, _ in draws])
    assert 0.70 <= found <= 0.86  # the exact test is a little more careful than the formula


def test_few_items_show_nothing() -> None:
    assert stats.smallest_detectable(5, 0.0) == 1.0
    assert stats.smallest_detectable(100, 0.0) >= 0.06  # fewer than 6 flips one way can't reach 5%
    assert stats.smallest_detectable(400, 0.1) > stats.smallest_detectable(4000, 0.1)
