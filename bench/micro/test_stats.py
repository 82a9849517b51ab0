"""What judging a run costs: a report of thousands of items should not make its reader wait."""

from __future__ import annotations

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from bench import stats
from bench.tasks import Question, score


def test_interval_of_paired_proportions(benchmark: BenchmarkFixture) -> None:
    """Tango's interval."""
    found = benchmark(stats.paired_proportions, 31, 22, 5000)
    assert found.low < found.value < found.high


def test_smallest_detectable_difference(benchmark: BenchmarkFixture) -> None:
    """Connor's formula, solved."""
    assert 0 < benchmark(stats.smallest_detectable, 5000, 0.01) < 1


def test_paired_bootstrap(benchmark: BenchmarkFixture) -> None:
    """A thousand graded items, resampled."""
    differences = list(np.random.default_rng(0).normal(0, 0.3, 1000))
    found = benchmark(stats.paired_bootstrap, differences, seed=0)
    assert found.low < found.value < found.high


def test_scoring_an_answer_by_anls(benchmark: BenchmarkFixture) -> None:
    """Three gold answers of a line each."""
    question = Question("i", "t", "q", ("the quick brown fox", "a quick brown fox", "brown fox"), "anls")
    assert 0.5 < benchmark(score, question, "the quick brown dog") < 1
