"""What judging a run costs: a report of thousands of items should not make its reader wait."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.judge import stats, verdict
from bench.questions.tasks import Question, score


def test_interval_of_paired_proportions(benchmark: BenchmarkFixture) -> None:
    """Tango's interval."""
    found = benchmark(stats.paired_proportions, 31, 22, 5000)
    assert found.low < found.value < found.high


def test_smallest_detectable_difference(benchmark: BenchmarkFixture) -> None:
    """Connor's formula, solved."""
    assert 0 < benchmark(stats.smallest_detectable, 5000, 0.01) < 1


@pytest.fixture(scope="module")
def graded() -> tuple[list[float], list[float], list[int]]:
    """Scores of 5,000 questions on some 1,200 images, a third of which changed, and their images."""
    rng = np.random.default_rng(0)
    before = rng.random(5000)
    after = np.where(rng.random(5000) < 0.3, rng.random(5000), before)
    return list(before), list(after), list(rng.integers(0, 1200, 5000))


def test_mean_interval(benchmark: BenchmarkFixture, graded: tuple[list[float], list[float], list[int]]) -> None:
    """5,000 graded items, 10,000 resamples."""
    differences = list(np.subtract(graded[1], graded[0]))
    found = benchmark(stats.mean_interval, differences, seed=0, resamples=10_000)
    assert found.low < found.value < found.high


def test_cluster_bootstrap(benchmark: BenchmarkFixture, graded: tuple[list[float], list[float], list[int]]) -> None:
    """The same by image."""
    differences = list(np.subtract(graded[1], graded[0]))
    found = benchmark(stats.mean_interval, differences, seed=0, clusters=graded[2], resamples=10_000)
    assert found.low < found.value < found.high


def test_comparison_of_graded_scores(
    benchmark: BenchmarkFixture, graded: tuple[list[float], list[float], list[int]]
) -> None:
    """All of a report's row for one task: four intervals by 10,000 resamples each, and a test by as many sign flips."""
    before, after, clusters = graded
    found = benchmark(verdict.compare, before, after, seed=0, clusters=clusters)
    assert found.n == 5000


def test_comparison_of_right_and_wrong(
    benchmark: BenchmarkFixture, graded: tuple[list[float], list[float], list[int]]
) -> None:
    """The same for right/wrong scores: Tango's interval, and sign flips by image, exactly."""
    before, after = ([float(score > 0.2) for score in scores] for scores in graded[:2])
    found = benchmark(verdict.compare, before, after, seed=0, clusters=graded[2])
    assert found.flips.lost > 100


def test_scoring_an_answer_by_anls(benchmark: BenchmarkFixture) -> None:
    """Three gold answers of a line each."""
    question = Question("i", "t", "q", ("the quick brown fox", "a quick brown fox", "brown fox"), "anls")
    assert 0.5 < benchmark(score, question, "the quick brown dog") < 1


def test_scoring_an_answer_by_people(benchmark: BenchmarkFixture) -> None:
    """Ten people's answers, folded as VQA folds them."""
    question = Question("i", "t", "q", ("the nokia", "nokia", "Nokia.", "a phone", "nokia 3310") * 2, "vqa")
    assert benchmark(score, question, "Nokia") == 1.0


def test_reading_an_option(benchmark: BenchmarkFixture) -> None:
    """A sentence that names one of four options by its text."""
    question = Question("i", "t", "q", ("C",), "choice", choices=("a dog", "a cat", "a red apple", "none of these"))
    assert benchmark(score, question, "The image shows a red apple on a table.") == 1.0
