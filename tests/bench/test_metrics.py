from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import metrics
from bench.client import Trace


def trace(n_out: int | None = 5) -> Trace:
    # Due at 10.0, sent 0.1 later, first text at 10.5, two tokens in the last chunk, over at 11.3.
    return Trace(10.0, 10.1, 11.3, (10.5, 10.7, 10.8, 11.2), "x", 7, n_out)


def test_latencies_count_from_the_scheduled_moment() -> None:
    assert metrics.ttft(trace()) == pytest.approx(0.5)
    assert metrics.e2e(trace()) == pytest.approx(1.3)
    assert metrics.client_lag(trace()) == pytest.approx(0.1)


def test_tpot_counts_tokens_not_chunks() -> None:
    assert metrics.tpot(trace(5)) == pytest.approx((1.3 - 0.5) / 4)


@pytest.mark.parametrize("n_out", [None, 0, 1])
def test_one_token_has_no_tpot(n_out: int | None) -> None:
    assert metrics.tpot(trace(n_out)) is None


def test_itl_is_the_gaps_between_chunks() -> None:
    assert metrics.itl(trace()) == pytest.approx([0.2, 0.1, 0.4])


def test_a_request_without_text_has_no_first_token() -> None:
    assert metrics.ttft(Trace(0.0, 0.0, 1.0)) is None


def test_rates_divide_by_wall_time() -> None:
    assert metrics.output_tokens_per_s([trace(5), trace(7)], 4.0) == pytest.approx(3.0)
    assert metrics.requests_per_s([trace(), trace()], 4.0) == pytest.approx(0.5)


def test_tokens_nobody_counted_have_no_rate() -> None:
    assert metrics.output_tokens_per_s([trace(5), trace(None)], 4.0) is None
    assert metrics.output_tokens_per_s([], 4.0) is None


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_ordered_and_numpys(samples: list[float]) -> None:
    found = metrics.spread(samples)
    assert found is not None
    assert min(samples) <= found.p50 <= found.p90 <= found.p99 <= max(samples)
    assert found.p90 == pytest.approx(float(np.percentile(samples, 90)))
    assert found.n == len(samples)


def test_requests_without_the_metric_are_left_out() -> None:
    found = metrics.spread([1.0, None, 3.0])
    assert found is not None
    assert (found.p50, found.n) == (2.0, 2)
    assert metrics.spread([None]) is None


def test_every_metric_has_a_definition_to_print() -> None:
    definitions = metrics.definitions()
    assert "(E2E - TTFT) / (n_out - 1)" in definitions["tpot"]
    assert all(" = " in text and "\n" not in text for text in definitions.values())
