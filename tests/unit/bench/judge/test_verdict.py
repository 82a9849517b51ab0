from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.judge import stats
from bench.judge.verdict import MARGIN, Comparison, compare, judge, judge_tasks, judgement, power

Array = np.ndarray


def answers(lost: int, won: int, right: int, wrong: int) -> tuple[list[float], list[float]]:
    """The scores of two systems with so many items of each kind."""
    before = [1.0] * (lost + right) + [0.0] * (won + wrong)
    after = [0.0] * lost + [1.0] * (right + won) + [0.0] * wrong
    return before, after


def scores_of(differences: Array) -> tuple[list[float], list[float]]:
    """Right/wrong scores with these differences; where there is none, both right."""
    return list(np.where(differences > 0, 0.0, 1.0)), list(np.where(differences < 0, 0.0, 1.0))


def binary(rng: np.random.Generator, n: int, lost: float, won: float, each: int = 1, together: float = 0.0) -> Array:
    """Differences [n] of right/wrong scores; ``each`` questions an image, a share of which share their fate."""
    own, common = rng.random((n // each, each)), rng.random((n // each, 1))
    luck = np.where(rng.random((n // each, 1)) < together, common, own).ravel()
    return np.where(luck < lost, -1.0, np.where(luck < lost + won, 1.0, 0.0))


def shares(rng: np.random.Generator, draws: int, margin: float, **of: float) -> tuple[float, float]:
    """How often ``no worse`` and ``worse`` are found in samples of `binary`."""
    each = int(of.pop("each", 1))
    n = int(of.pop("n"))
    clusters = None if each == 1 else list(np.repeat(np.arange(n // each), each))
    found = []
    for seed in range(draws):
        before, after = scores_of(binary(rng, n, each=each, **of))
        found.append(said(compare(before, after, seed=seed, clusters=clusters, resamples=1), margin))
    return found.count("no worse") / draws, found.count("worse") / draws


def said(found: Comparison, margin: float = MARGIN) -> str:
    """The judgement alone: a simulation has no use for how many items it would take."""
    return judgement(found, margin, found.p_value)


def at_most(nominal: float, draws: int) -> float:
    """What a share of this size stays below but for three standard errors of a simulation."""
    return nominal + 3 * (nominal * (1 - nominal) / draws) ** 0.5


# --- comparing


def test_right_and_wrong_are_compared_by_tango_and_mcnemar() -> None:
    before, after = answers(lost=9, won=3, right=70, wrong=18)
    found = compare(before, after, seed=0)
    assert (found.n, found.clusters, found.design_effect, found.method) == (100, 100, 1.0, "tango")
    assert found.flips == stats.Flips(9, 3, 100)
    assert found.difference == stats.paired_proportions(9, 3, 100)
    assert found.p_value == stats.mcnemar(9, 3)
    assert found.discordance == pytest.approx(0.12)
    assert found.smallest_detectable == stats.smallest_detectable(100, 0.12)
    assert found.baseline == stats.wilson(79, 100)
    assert found.candidate == stats.wilson(73, 100)
    assert found.recovery is not None
    assert found.recovery.value == pytest.approx(73 / 79)
    assert found.recovery.low < found.recovery.value < 1.0


def test_graded_scores_are_compared_by_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(300)
    after = (before + rng.normal(-0.02, 0.1, 300)).clip(0, 1)
    found = compare(list(before), list(after), seed=3)
    assert found == compare(list(before), list(after), seed=3)
    assert found.method == "bootstrap"
    drawn = stats.mean_interval(list(after - before), seed=3)
    assert found.difference.low <= drawn.low < drawn.high <= found.difference.high
    assert found.difference.high - found.difference.low < 1.25 * (drawn.high - drawn.low)


def test_equal_graded_answers_still_leave_something_open() -> None:
    scores = [0.4, 0.9, 1.0, 0.0] * 20
    found = compare(scores, scores, seed=0)
    assert found.difference.low < -MARGIN < MARGIN < found.difference.high
    assert found.recovery is not None
    assert found.recovery.low < 1.0 < found.recovery.high
    assert judge(found).judgement == "can't tell"


def test_questions_on_one_image_count_less() -> None:
    before, after = scores_of(np.repeat(binary(np.random.default_rng(1), 100, 0.1, 0.02), 5))
    clusters = [f"image {at // 5}" for at in range(500)]
    alone, together = compare(before, after, seed=0), compare(before, after, seed=0, clusters=clusters)
    assert together.clusters == 100
    assert together.difference.value == alone.difference.value
    assert together.design_effect == pytest.approx(5.0, rel=0.1)
    assert together.p_value > alone.p_value
    for name in ("difference", "baseline", "candidate", "recovery"):
        wide, narrow = getattr(together, name), getattr(alone, name)
        assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low), name
    assert together.smallest_detectable > alone.smallest_detectable


def test_scores_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="1 and 2 scores"):
        compare([1.0], [1.0, 0.0], seed=0)
    with pytest.raises(ValueError, match="0 and 0 scores"):
        compare([], [], seed=0)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 0.6, 1.0])), min_size=1, max_size=30))
def test_every_comparison_has_a_verdict(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    found = compare(before, after, seed=0, clusters=[at // 2 for at in range(len(pairs))], resamples=50)
    assert -1.0 <= found.difference.low <= found.difference.value <= found.difference.high <= 1.0
    assert 0.0 < found.p_value <= 1.0
    verdict = judge(found)
    assert verdict.judgement == said(found)
    assert (verdict.items_needed is not None) == (verdict.judgement == "can't tell")
    assert verdict.items_needed is None or verdict.items_needed > found.n


# --- judging


@pytest.mark.parametrize(
    ("lost", "won", "n", "judgement"),
    [
        (0, 0, 400, "no worse"),
        (0, 0, 300, "can't tell"),
        (0, 8, 400, "no worse"),
        (30, 5, 400, "worse"),
        (30, 28, 400, "can't tell"),
        (30, 28, 40_000, "no worse"),
        (5, 0, 100, "can't tell"),  # Tango's interval lies below 0, but the exact p is 6%
        (6, 0, 100, "worse"),
        (60, 20, 8000, "no worse"),  # a loss that is there, and smaller than the margin
    ],
)
def test_the_verdict(lost: int, won: int, n: int, judgement: str) -> None:
    found = compare(*answers(lost, won, n - lost - won, 0), seed=0, resamples=1)
    assert judge(found).judgement == judgement


def test_the_margin_is_a_fraction() -> None:
    found = compare(*answers(10, 0, 90, 0), seed=0)
    assert judge(found, 0.2).judgement == "no worse"
    for margin in (0.0, 1.0, -0.01):
        with pytest.raises(ValueError, match="fraction between 0 and 1"):
            judge(found, margin)


def test_several_tasks_are_judged_with_adjusted_p() -> None:
    found = {
        name: compare(*answers(lost, 0, 94, 0), seed=0) for name, lost in (("a", 6), ("b", 6), ("c", 30), ("d", 0))
    }
    verdicts = judge_tasks(found)
    assert {task: verdict.judgement for task, verdict in verdicts.items()} == {
        "a": "can't tell",
        "b": "can't tell",
        "c": "worse",
        "d": "can't tell",
    }
    assert judge(found["a"]).judgement == "worse"
    assert verdicts["a"].p_value == pytest.approx(3 * stats.mcnemar(6, 0))


# --- by simulation: one-sided errors of 2.5%


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.0), (0.02, 0.01), (0.06, 0.05)])
@pytest.mark.parametrize("n", [400, 1200])
def test_a_loss_of_the_margin_is_rarely_called_no_worse(n: int, lost: float, won: float) -> None:
    # Exact: every outcome, weighted by its probability.
    from scipy.stats import binom

    total = 0.0
    wons = np.arange(0, n + 1)[binom.pmf(np.arange(n + 1), n, won) > 1e-7]
    for gained in wons:
        # The interval's end falls as more is lost: find from where on it is below the margin.
        losses, low = 0, n - int(gained)
        while losses < low:
            middle = (losses + low + 1) // 2
            if stats.paired_proportions(middle, int(gained), n).low > -MARGIN:
                losses = middle
            else:
                low = middle - 1
        passes = stats.paired_proportions(losses, int(gained), n).low > -MARGIN
        chance = binom.cdf(losses, n - gained, lost / (1 - won)) if passes else 0.0
        total += binom.pmf(gained, n, won) * chance
    assert 0.0 <= total <= 0.0251


def test_equal_systems_are_rarely_called_worse() -> None:
    _, worse = shares(np.random.default_rng(2), 600, 0.001, n=300, lost=0.05, won=0.05)
    assert worse <= at_most(0.025, 600)


@pytest.mark.slow
@pytest.mark.parametrize(("each", "together"), [(4, 0.0), (4, 0.5), (4, 1.0), (10, 0.5)])
def test_shared_images_keep_both_errors_nominal(each: int, together: float) -> None:
    rng, draws = np.random.default_rng(each), 250
    _, worse = shares(rng, draws, 0.001, n=1000, lost=0.04, won=0.04, each=each, together=together)
    assert worse <= at_most(0.025, draws)
    for lost, won in ((0.02, 0.01), (0.06, 0.05)):
        fine, _ = shares(rng, draws, MARGIN, n=1000, lost=lost, won=won, each=each, together=together)
        assert fine <= at_most(0.025, draws), (lost, won)


@pytest.mark.slow
def test_rare_losses_on_shared_images_are_rarely_called_no_worse() -> None:
    fine, _ = shares(np.random.default_rng(3), 750, MARGIN, n=2000, lost=0.01, won=0.0, each=4, together=0.6)
    assert fine <= at_most(0.025, 750)


def test_not_knowing_of_shared_images_would_be_wrong() -> None:
    """What the clusters are for: without them equal systems are called worse many times too often."""
    rng, worse = np.random.default_rng(4), 0
    for seed in range(200):
        before, after = scores_of(binary(rng, 1000, 0.04, 0.04, each=10, together=1.0))
        worse += said(compare(before, after, seed=seed, resamples=1), 0.001) == "worse"
    assert worse / 200 > 0.1


def graded(
    rng: np.random.Generator, n: int, mean: float, each: int
) -> tuple[list[float], list[float], list[int] | None]:
    """Scores of which a tenth changed, by ``mean`` on average over all items."""
    luck = np.where(rng.random((n // each, 1)) < 0.5, rng.random((n // each, 1)), rng.random((n // each, each))).ravel()
    change = np.where(luck < 0.1, rng.uniform(-0.4, 0.4, n) + mean / 0.1, 0.0)
    return [0.5] * n, list(0.5 + change), None if each == 1 else list(np.repeat(np.arange(n // each), each))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "each"), [(600, 1), (1000, 4)])
def test_graded_scores_keep_both_errors_nominal(n: int, each: int) -> None:
    rng, draws = np.random.default_rng(n), 150
    worse = fine = 0
    for seed in range(draws):
        for mean, margin in ((0.0, 0.0001), (-0.01, MARGIN)):
            before, after, clusters = graded(rng, n, mean, each)
            found = said(compare(before, after, seed=seed, clusters=clusters, resamples=400), margin)
            worse += mean == 0.0 and found == "worse"
            fine += mean < 0.0 and found == "no worse"
    assert worse / draws <= at_most(0.025, draws)
    assert fine / draws <= at_most(0.025, draws)


def test_a_rare_total_loss_among_graded_scores_is_rarely_called_no_worse() -> None:
    rng, fine = np.random.default_rng(6), 0
    for seed in range(150):
        before = np.full(300, 0.9)
        after = np.where(rng.random(300) < 0.012, 0.0, before)
        fine += said(compare(list(before), list(after), seed=seed, resamples=100)) == "no worse"
    assert fine / 150 <= at_most(0.025, 150)


# --- how many items it would take


def found_with(n: int, lost: int, won: int) -> Comparison:
    return compare(*answers(lost, won, n - lost - won, 0), seed=0, resamples=1)


def test_as_many_items_as_said_settle_it_four_times_in_five() -> None:
    needed = judge(found_with(500, 15, 15)).items_needed
    assert needed == pytest.approx(0.06 * (1.96 + 0.8416) ** 2 / 0.01**2, rel=0.02)
    fine, _ = shares(np.random.default_rng(7), 200, MARGIN, n=float(needed or 0), lost=0.03, won=0.03)
    assert 0.7 <= fine <= 0.9


@pytest.mark.parametrize(("n", "flips"), [(40, 0), (100, 0), (300, 0), (400, 1), (400, 2), (400, 3), (500, 6)])
def test_where_flips_are_rare_as_many_items_as_said_settle_it_too(n: int, flips: int) -> None:
    """Where an approximation had it, so many settled it 47 times in a hundred."""
    needed = judge(found_with(n, flips - flips // 2, flips // 2)).items_needed
    assert needed is not None
    rate = flips / n or 0.5 / (n + 1)
    assert 0.8 <= power(needed, rate, 0.0) <= 0.95  # a verdict hangs on whole flips: the power goes up in steps
    assert power(int(0.75 * needed), rate, 0.0) < 0.8


@pytest.mark.parametrize(("n", "lost", "won"), [(600, 0.002, 0.002), (900, 0.01, 0.002), (2000, 0.01, 0.01)])
def test_the_power_is_how_often_the_rule_gives_a_verdict(n: int, lost: float, won: float) -> None:
    draws = 400
    fine, worse = shares(np.random.default_rng(3), draws, MARGIN, n=float(n), lost=lost, won=won)
    told = fine + (worse if lost > won else 0.0)
    exact = power(n, lost + won, won - lost)
    assert told == pytest.approx(exact, abs=3 * (exact * (1 - exact) / draws) ** 0.5 + 0.005)


def test_some_5000_questions_rule_out_a_loss_of_a_point_at_usual_flip_rates() -> None:
    assert power(4500, 0.06, 0.0) < 0.8 < power(5000, 0.06, 0.0)


def test_shared_images_need_more_items() -> None:
    before, after = scores_of(np.repeat(np.r_[-np.ones(3), np.ones(3), np.zeros(94)], 5))
    alone = judge(compare(before, after, seed=0)).items_needed
    found = compare(before, after, seed=0, clusters=[at // 5 for at in range(500)])
    assert judge(found).items_needed == pytest.approx((alone or 0) * found.design_effect, rel=0.01)


def test_no_flips_among_few_items_need_what_tango_needs() -> None:
    needed = judge(found_with(100, 0, 0)).items_needed
    assert needed is not None
    assert judge(found_with(needed, 0, 0)).judgement == "no worse"
    assert judge(found_with(380, 0, 0)).judgement == "can't tell"
    assert needed > 600  # a single flip must not undo it


def test_a_loss_close_to_the_margin_needs_more_than_equal_systems_would() -> None:
    # Half a point lost with 4% flipped: equal systems would take 3140 items, and these 3600 leave it open.
    needed = judge(found_with(3600, 81, 63)).items_needed
    assert needed == pytest.approx(0.04 * (1.96 + 0.8416) ** 2 / 0.005**2, rel=0.01)
