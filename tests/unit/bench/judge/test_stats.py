from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from bench.judge import stats


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


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (450, 500)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    found = stats.wilson(right, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


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
        found = stats.mean_interval(list(rng.normal(0.1, 1.0, 80)), seed=seed, resamples=500)
        hits += found.low <= 0.1 <= found.high
    assert 0.90 <= hits / 200 <= 0.985


def test_the_bootstrap_is_repeatable_and_centred() -> None:
    values = [0.0, 0.5, -0.25, 1.0, 0.0, 0.1]
    found = stats.mean_interval(values, seed=3)
    assert found == stats.mean_interval(values, seed=3)
    assert found.value == pytest.approx(np.mean(values))
    assert found.low < found.value < found.high


def test_a_constant_sample_is_its_own_interval() -> None:
    assert stats.mean_interval([0.5, 0.5], seed=0) == stats.Interval(0.5, 0.5, 0.5)
    assert stats.mean_interval([0.5], seed=0) == stats.Interval(0.5, 0.5, 0.5)


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


# --- known values


@pytest.mark.parametrize(
    ("lost", "won", "n", "confidence", "low", "high"),
    [(25, 28, 618, 0.90, -0.0148, 0.0247), (7, 1, 21, 0.95, -0.517, -0.026)],
)
def test_tangos_interval_is_that_of_r(lost: int, won: int, n: int, confidence: float, low: float, high: float) -> None:
    # PropCIs::scoreci.mp(25, 28, 618, 0.9) and scoreci.mp(7, 1, 21, 0.95)
    found = stats.paired_proportions(lost, won, n, confidence)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)


def test_mcnemar_is_scipys_binomial_test() -> None:
    for lost, won in itertools.product(range(0, 30, 3), range(1, 30, 4)):
        assert stats.mcnemar(lost, won) == pytest.approx(scipy.stats.binomtest(lost, lost + won).pvalue)


def test_holm_is_the_step_down_of_bonferroni() -> None:
    # Worked by hand: 4 x 0.005, then 3 x 0.01, 2 x 0.03, 1 x 0.04 which may not fall below what came before.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_holm_keeps_false_alarms_among_many_tasks_rare() -> None:
    draws = np.random.default_rng(11).uniform(size=(4000, 8))
    alarms = np.mean([min(stats.holm(list(row))) < 0.05 for row in draws])
    assert 0.03 <= alarms <= 0.06
    assert np.mean(draws.min(axis=1) < 0.05) > 0.3  # what not adjusting would give


# --- sign flips, cluster by cluster


@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 30))
def test_for_items_on_their_own_sign_flips_are_mcnemar(lost: int, won: int, same: int) -> None:
    differences = [-1.0] * lost + [1.0] * won + [0.0] * same
    assert stats.sign_flip(differences) == pytest.approx(stats.mcnemar(lost, won))
    assert stats.sign_flip(differences, list(range(len(differences)))) == pytest.approx(stats.mcnemar(lost, won))


def test_sign_flips_of_clusters_are_all_assignments_counted() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        clusters = rng.integers(0, 9, 60)
        differences = rng.choice([-1.0, 0.0, 0.0, 1.0], 60, p=[0.3, 0.3, 0.3, 0.1])
        sums = np.bincount(clusters, weights=differences, minlength=9)
        totals = [
            abs(sum(s * d for s, d in zip(signs, sums, strict=True))) for signs in itertools.product((1, -1), repeat=9)
        ]
        expected = np.mean(np.asarray(totals) >= abs(sums.sum()))
        assert stats.sign_flip(differences, list(clusters)) == pytest.approx(expected)


def test_sign_flips_approach_durkalskis_statistic() -> None:
    rng = np.random.default_rng(5)
    differences = rng.choice([-1.0, 0.0, 1.0], 6000, p=[0.055, 0.9, 0.045])
    clusters = np.repeat(np.arange(1500), 4)
    sums = np.bincount(clusters, weights=differences)
    expected = scipy.stats.chi2.sf(sums.sum() ** 2 / (sums**2).sum(), 1)
    # The exact distribution has steps of 2, of which half is too much for a continuous one.
    corrected = scipy.stats.chi2.sf((abs(sums.sum()) - 1) ** 2 / (sums**2).sum(), 1)
    found = stats.sign_flip(differences, list(clusters))
    assert found == pytest.approx(corrected, rel=0.02)
    assert expected < found < 1.2 * expected


def test_graded_sign_flips_are_drawn_and_repeatable() -> None:
    rng = np.random.default_rng(6)
    differences = rng.normal(0.0, 0.2, 12)
    totals = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=12)]
    expected = np.mean(np.asarray(totals) >= abs(differences.sum()) - 1e-12)
    found = stats.sign_flip(differences, seed=1)
    assert found == stats.sign_flip(differences, seed=1)
    assert found == pytest.approx(expected, abs=0.02)
    assert stats.sign_flip(differences + 1.0, seed=1, resamples=999) < 0.01


def clustered(rng: np.random.Generator, images: int, each: int, lost: float, won: float, together: float) -> np.ndarray:
    """Differences of right/wrong scores [images * each]: on some images all questions share their fate."""
    own, common = rng.random((images, each)), rng.random((images, 1))
    luck = np.where(rng.random((images, 1)) < together, common, own).ravel()
    return np.where(luck < lost, -1.0, np.where(luck < lost + won, 1.0, 0.0))


def test_plain_mcnemar_calls_equal_systems_different_on_shared_images_and_sign_flips_do_not() -> None:
    rng, clusters = np.random.default_rng(8), list(np.repeat(np.arange(100), 5))
    plain = robust = 0
    for _ in range(400):
        differences = clustered(rng, 100, 5, 0.05, 0.05, 0.9)
        plain += stats.mcnemar(int((differences < 0).sum()), int((differences > 0).sum())) < 0.05
        robust += stats.sign_flip(differences, clusters) < 0.05
    assert plain / 400 > 0.2
    assert robust / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


# --- clusters and intervals


def test_items_on_their_own_have_no_design_effect() -> None:
    differences = np.random.default_rng(0).normal(size=50)
    assert stats.design_effect(differences) == 1.0
    assert stats.design_effect(differences, list(range(50))) == 1.0


def test_the_design_effect_is_the_clusters_size_where_all_agree_and_small_where_none_do() -> None:
    rng, clusters = np.random.default_rng(1), list(np.repeat(np.arange(600), 5))
    assert stats.design_effect(clustered(rng, 600, 5, 0.1, 0.1, 1.0), clusters) == pytest.approx(5.0, rel=0.1)
    assert stats.design_effect(clustered(rng, 600, 5, 0.1, 0.1, 0.0), clusters) < 1.2
    assert stats.design_effect(np.zeros(3000), clusters) == pytest.approx(5.0, rel=0.01)  # no flip shows the contrary
    assert stats.design_effect([0.0, 1.0, -1.0], ["a", "a", "a"]) == 3.0


def test_clusters_must_be_as_many_as_items() -> None:
    for function in (stats.sign_flip, stats.design_effect):
        with pytest.raises(ValueError, match="2 clusters for 3 items"):
            function([0.0, 1.0, 0.0], ["a", "b"])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 300), st.floats(1.0, 6.0))
def test_the_bounded_mean_of_right_and_wrong_is_tangos(lost: int, won: int, same: int, effect: float) -> None:
    n = lost + won + same
    if n == 0:
        return
    found = stats.bounded_mean([-1.0] * lost + [1.0] * won + [0.0] * same, n / effect)
    expected = stats.paired_proportions(lost / effect, won / effect, n / effect)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-5)


@given(st.lists(st.floats(-1.0, 1.0).map(lambda x: round(x, 3)), min_size=1, max_size=40))
def test_the_bounded_mean_holds_its_value_and_mirrors(values: list[float]) -> None:
    found, mirrored = stats.bounded_mean(values), stats.bounded_mean([-x for x in values])
    assert -1.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.low < found.high
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-6)


def test_the_bounded_mean_is_the_t_interval_of_many_small_differences() -> None:
    values = np.random.default_rng(2).normal(0.02, 0.1, 3000).clip(-1, 1)
    expected = scipy.stats.t.interval(0.95, 2999, values.mean(), scipy.stats.sem(values))
    found = stats.bounded_mean(values)
    assert (found.low, found.high) == pytest.approx(expected, abs=2e-4)


def test_the_bounded_mean_covers_a_rare_total_loss_that_a_bootstrap_can_not_see() -> None:
    rng, truth = np.random.default_rng(3), -0.01
    drawn = bounded = 0
    for seed in range(200):
        values = np.where(rng.random(200) < 0.01, -1.0, 0.0)
        low = stats.mean_interval(list(values), seed=seed, resamples=200).low
        drawn += low <= truth
        bounded += stats.bounded_mean(values).low <= truth
    assert drawn / 200 < 0.9  # no loss at all is seen in 13% of such samples
    assert bounded / 200 >= 0.97


def test_the_bootstrap_is_scipys_but_for_the_expansion() -> None:
    values = np.random.default_rng(4).gamma(2.0, 0.1, 400)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = stats.mean_interval(values, seed=0, resamples=20_000)
    assert (found.low, found.high) == pytest.approx(
        (expected.low, expected.high), abs=0.02 * (expected.high - expected.low)
    )


def test_both_ways_to_resample_draw_from_one_distribution() -> None:
    rng = np.random.default_rng(5)
    few = rng.choice([0.0, 0.3, 1.0], 900)
    many = few + rng.uniform(0, 1e-9, 900)  # all different: drawn by index instead of by kind
    one, other = (stats.mean_interval(values, seed=0, resamples=20_000) for values in (few, many))
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-3)


def test_the_cluster_bootstrap_covers_the_truth_where_the_plain_one_does_not() -> None:
    rng, truth = np.random.default_rng(6), 0.3
    plain = robust = 0
    for seed in range(200):
        sizes = rng.integers(1, 9, 60)
        clusters = np.repeat(np.arange(60), sizes)
        values = truth + rng.normal(0, 0.3, 60)[clusters] + rng.normal(0, 0.1, clusters.size)
        for found, of in (
            (stats.mean_interval(values, seed=seed, resamples=400), "plain"),
            (stats.mean_interval(values, seed=seed, clusters=list(clusters), resamples=400), "robust"),
        ):
            hit = found.low <= truth <= found.high
            plain, robust = (plain + hit, robust) if of == "plain" else (plain, robust + hit)
    assert plain / 200 < 0.75
    assert 0.9 <= robust / 200 <= 0.985


def test_one_cluster_has_no_spread() -> None:
    assert stats.mean_interval([0.0, 1.0], seed=0, clusters=["a", "a"]) == stats.Interval(0.5, 0.5, 0.5)


def test_the_ratio_of_means_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(7), 0
    for seed in range(200):
        base = rng.random(150) < 0.6
        new = np.where(rng.random(150) < 0.1, rng.random(150) < 0.3, base)
        found = stats.ratio_of_means(list(new * 1.0), list(base * 1.0), seed=seed, resamples=400)
        assert found is not None
        hits += found.low <= (0.9 * 0.6 + 0.1 * 0.3) / 0.6 <= found.high
    assert 0.9 <= hits / 200 <= 0.985


def test_a_ratio_to_next_to_nothing_is_none() -> None:
    assert stats.ratio_of_means([1.0] * 50, [0.1] * 50, seed=0) is None
    with pytest.raises(ValueError, match="not pairs"):
        stats.ratio_of_means([1.0], [1.0, 1.0], seed=0)
