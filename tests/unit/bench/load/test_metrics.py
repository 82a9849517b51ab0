from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load import metrics
from bench.load.client import Failure, Trace
from bench.load.metrics import settled
from bench.load.objectives import parse_slos
from toolkit.errors import BenchError


def trace(n_out: int | None = 5) -> Trace:
    # Due at 10.0, sent 0.1 later, first text at 10.5, two tokens in the last chunk, over at 11.3.
    return Trace(10.0, 10.1, 11.3, (10.5, 10.7, 10.8, 11.2), "x", 7, n_out)


def test_latencies_count_from_the_scheduled_moment() -> None:
    assert metrics.ttft(trace()) == pytest.approx(0.5)
    assert metrics.e2e(trace()) == pytest.approx(1.3)
    assert metrics.client_lag(trace()) == pytest.approx(0.1)


def test_tpot_counts_tokens_not_chunks() -> None:
    assert metrics.tpot(trace(5)) == pytest.approx((1.3 - 0.5) / 4)


def test_a_chunk_of_several_tokens_is_so_many() -> None:
    """Five chunks of four tokens, one each 0.1 s: a token each 0.025 s, and not 0.021 after and 0.1 between."""
    spread = Trace(0.0, 0.0, 0.5, (0.1, 0.2, 0.3, 0.4, 0.5), "x", 7, 20)
    assert metrics.tokens_per_chunk(spread) == 4.0
    assert metrics.tpot(spread) == pytest.approx(0.025)
    assert metrics.itl(spread) == pytest.approx([0.025] * 4)
    # As vLLM sends them under --stream-interval 5: the first token at once. The server counts in every chunk.
    counted = Trace(0.0, 0.0, 0.5, (0.1, 0.2, 0.3, 0.4, 0.5), "x", 7, 20, counts=(1, 6, 11, 16, 20))
    assert metrics.tpot(counted) == pytest.approx(0.4 / 19)
    assert len(metrics.itl(counted)) == 19 and sum(metrics.itl(counted)) == pytest.approx(0.4)
    # All in one chunk: there is nothing to time.
    assert metrics.tpot(Trace(0.0, 0.0, 0.5, (0.5,), "x", 7, 20)) is None


def test_a_token_or_two_without_text_make_no_chunk_of_several() -> None:
    ended = Trace(0.0, 0.0, 0.4, (0.1, 0.2, 0.3, 0.4), "x", 7, 5)  # the end of text is a token
    assert metrics.tokens_per_chunk(ended) == 1.0 and metrics.itl(ended) == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(("latencies", "achieved"), [([0.5] * 10, 4.0), ([0.5, 0.9] * 5, 4.0), (range(10), 0.8)])
def test_the_achieved_rate_is_what_a_server_answers(latencies: Sequence[float], achieved: float) -> None:
    traces = [Trace(i / 4, i / 4, i / 4 + took) for i, took in enumerate(latencies)]
    assert metrics.achieved_per_s(traces, 4.0) == pytest.approx(achieved, rel=0.08)


def test_an_objective_of_itl_holds_for_every_gap() -> None:
    slos = parse_slos("itl=150ms")
    smooth = Trace(0.0, 0.0, 0.4, (0.1, 0.2, 0.3, 0.4), "x", 7, 4)
    pause = Trace(0.0, 0.0, 0.6, (0.1, 0.2, 0.3, 0.6), "x", 7, 4)
    found = metrics.goodput([smooth, pause], slos, 1.0)
    assert found is not None and found.share == 0.5


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
    assert "(E2E - TTFT) / (n_out - n_1)" in definitions["tpot"]
    assert all(" = " in text and "\n" not in text for text in definitions.values())


def test_percentiles_have_p95_and_formulas_are_a_table() -> None:
    found = metrics.spread(range(101))
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99) == (50, 90, 95, 99)
    assert metrics.definitions() == metrics.FORMULAS
    assert {"ttft", "tpot", "itl", "e2e", "queueing", "goodput", "steady", "client_fault"} <= metrics.FORMULAS.keys()


def test_lag_is_what_the_client_added_and_queueing_is_all_of_it() -> None:
    held = Trace(10.0, 10.5, 11.0, (10.9,), held_s=0.4)
    assert metrics.queueing(held) == pytest.approx(0.5)
    assert metrics.client_lag(held) == pytest.approx(0.1)
    assert metrics.ttft(held) == pytest.approx(0.9)  # none of it is forgiven


FAILED = Trace(0.0, 0.0, 9.0, failure=Failure("http", "HTTP 429", 429))


def test_failed_requests_are_counted_and_in_no_figure() -> None:
    stalled = Trace(0.0, 0.0, 9.0, (1.0,), failure=Failure("stalled", "silent"))
    found = metrics.summarise([trace(), FAILED, FAILED, stalled], 2.0)
    assert (found.requests, found.completed) == (4, 1)
    assert found.errors == {"http 429": 2, "stalled": 1}
    assert found.requests_per_s == pytest.approx(0.5)
    assert found.output_tokens_per_s == pytest.approx(2.5)
    assert found.total_tokens_per_s == pytest.approx(6.0)
    assert found.ttft is not None
    assert (found.ttft.n, found.ttft.p99) == (1, pytest.approx(0.5))


def test_uncounted_tokens_are_said_so() -> None:
    found = metrics.summarise([trace(), trace(None)], 2.0, slos=parse_slos("tpot=1s"))
    assert (found.uncounted, found.output_tokens_per_s, found.goodput) == (1, None, None)
    assert found.ttft is not None


def test_a_summary_of_nothing_has_no_figures() -> None:
    found = metrics.summarise([], 0.0)
    assert (found.requests, found.ttft, found.requests_per_s, found.goodput, found.invalid) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_objectives_are_read() -> None:
    slos = parse_slos(" TTFT=200ms, tpot=0.03s,e2e=.5s")
    assert [(slo.metric, slo.limit_s) for slo in slos] == [("ttft", 0.2), ("tpot", 0.03), ("e2e", 0.5)]
    assert ",".join(map(str, parse_slos("ttft=200ms,e2e=2s"))) == "ttft=200ms,e2e=2s"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "none of ttft, tpot, itl, e2e"),
        ("latency=2s", "'latency' is none of ttft"),
        ("ttft", "not a time above 0 with its unit"),
        ("ttft=200", "with its unit"),
        ("ttft=-1ms", "above 0"),
        ("ttft=0ms", "above 0"),
        ("ttft=1m", "with its unit"),
        ("ttft=1ms,ttft=2ms", "has one already"),
    ],
)
def test_other_objectives_are_refused(text: str, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        parse_slos(text)


def test_goodput_counts_requests_that_met_everything() -> None:
    good = trace(5)  # TTFT 0.5, TPOT 0.2
    one_token = trace(1)
    slos = parse_slos("ttft=500.1ms,tpot=200.1ms")
    found = metrics.goodput([good, good, one_token, trace(3), FAILED], slos, 2.0, unsent=1)  # trace(3): TPOT 0.4
    assert found is not None
    assert found.per_s == pytest.approx(1.5)
    assert found.share == pytest.approx(3 / 6)
    assert metrics.goodput([good], parse_slos("ttft=499ms"), 2.0) == metrics.Goodput(0.0, 0.0)
    assert metrics.goodput([good], (), 2.0) is None


def test_the_steady_rate_is_that_of_a_full_load() -> None:
    # Two in flight, 1 s and 10 tokens each, for ever: 2 requests/s, wherever the window lies.
    traces = [Trace(t, t, t + 1, (t + 0.5,), "", 1, 10) for t in [*np.arange(0, 8, 1.0), *np.arange(0.3, 8, 1.0)]]
    for start, end in ((1.0, 5.0), (1.7, 2.2), (2.0, 7.31)):
        found = metrics.steady(traces, start, end)
        assert found is not None
        assert (found.requests_per_s, found.output_tokens_per_s) == (pytest.approx(2.0), pytest.approx(20.0))
    assert metrics.steady(traces, 3.0, 3.0) is None


def lagging(lag: float) -> list[Trace]:
    return [Trace(float(i), i + lag, i + 1.0, (i + 0.1,)) for i in range(20)]


def test_a_point_is_invalid_when_the_client_lags() -> None:
    assert metrics.client_fault(lagging(0.004)) is None
    assert "5% of a TTFT of 100.0 ms" in (metrics.client_fault(lagging(0.006)) or "")
    # p50 is fine, p90 is not.
    assert "(p90)" in (metrics.client_fault([*lagging(0.0), *lagging(0.03)[:4]]) or "")
    assert "read its answers" in (metrics.client_fault(lagging(0.0), [0.0, 0.01, 0.01]) or "")
    # What was held for want of a place is the server's doing.
    assert metrics.client_fault([Trace(0.0, 5.0, 6.0, (5.5,), held_s=5.0)]) is None


# --- steady -----------------------------------------------------------------------------------------------------------


def _round(rng: np.random.Generator, *, start_s: float = 0.0, share: float = 1.0) -> tuple[list[Trace], float, float]:
    """Ten seconds of some 50 chunks a second, of which so many are there in the first ``start_s`` seconds."""
    times = np.sort(rng.uniform(0, 10, rng.poisson(500)))
    kept = times[rng.uniform(size=len(times)) < np.where(times < start_s, share, 1.0)]
    return [Trace(0.0, 0.0, 10.0, chunks=tuple(kept))], 0.0, 10.0


def test_steady_throughput_is_found_to_begin_where_it_does() -> None:
    rng = np.random.default_rng(5)
    flat = [settled([_round(rng) for _ in range(8)]) for _ in range(100)]
    assert flat.count(0.0) >= 97
    slow = [settled([_round(rng, start_s=2.0, share=0.5) for _ in range(8)]) for _ in range(50)]
    known = [value for value in slow if value is not None]
    assert len(known) >= 40 and np.median(known) == pytest.approx(2.0)


def test_what_never_settles_and_what_is_too_little_to_tell_is_said() -> None:
    rng = np.random.default_rng(5)
    rising = []
    for _ in range(8):
        times = 10 * np.sqrt(rng.uniform(size=500))  # a rate that grows to the end
        rising.append(([Trace(0.0, 0.0, 10.0, chunks=tuple(np.sort(times)))], 0.0, 10.0))
    assert settled(rising) is None
    assert settled([([Trace(0.0, 0.0, 1.0, chunks=(0.5,))], 0.0, 1.0)]) is None
    assert settled([]) is None
