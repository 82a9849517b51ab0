"""The formulas of a speed measurement. A function's docstring is its definition, and reports print it (`FORMULAS`).

Times in are seconds on one clock; times out are seconds. None means the request does not define the metric. Latencies
are those of requests that succeeded; the others are counted by kind.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.load.client import Trace
from bench.load.objectives import Slo

__all__ = [
    "FORMULAS",
    "KEPT_SHARE",
    "PACKED",
    "PERCENTILES",
    "SLO_METRICS",
    "Goodput",
    "Rates",
    "Spread",
    "Summary",
    "achieved_per_s",
    "client_fault",
    "client_lag",
    "definitions",
    "e2e",
    "errors",
    "goodput",
    "itl",
    "output_tokens_per_s",
    "queueing",
    "requests_per_s",
    "server_queueing",
    "settled",
    "spread",
    "steady",
    "summarise",
    "tokens_per_chunk",
    "total_tokens_per_s",
    "tpot",
    "ttft",
]

PERCENTILES = (50, 90, 95, 99)
#: A client that adds more than this share of TTFT measures itself.
LAG_SHARE = 0.05
#: From so many tokens a chunk on, chunks are not tokens; with fewer, some tokens are without text of their own.
PACKED = 1.5
#: A rate is kept when so much of it is achieved.
KEPT_SHARE = 0.95


# --- one request ------------------------------------------------------------------------------------------------------


def ttft(trace: Trace) -> float | None:
    """TTFT, time to first token = arrival of the first chunk with generated text (of the answer, of reasoning, or a
    tool's arguments) - scheduled moment of the request."""
    return trace.chunks[0] - trace.scheduled if trace.chunks else None


def tpot(trace: Trace) -> float | None:
    """TPOT, time per output token = (E2E - TTFT) / (n_out - n_1), per request; n_out is counted by the server, n_1 is
    the tokens of the first chunk: 1 where chunks are tokens, else what the server counts in it, or n_out / chunks. No
    TPOT where all came in one chunk."""
    first = ttft(trace)
    if first is None or trace.completion_tokens is None:
        return None
    after = trace.completion_tokens - (trace.counts[0] if trace.counts else tokens_per_chunk(trace))
    return (e2e(trace) - first) / after if after > 0 and trace.completion_tokens > 1 else None


def tokens_per_chunk(trace: Trace) -> float:
    """Tokens a chunk = n_out / chunks with generated text, and 1 where that is below 1.5: then chunks are tokens, but
    for some without text of their own (the end of text, half a character)."""
    share = trace.completion_tokens / len(trace.chunks) if trace.completion_tokens and trace.chunks else 1.0
    return share if share >= PACKED else 1.0


def itl(trace: Trace) -> list[float]:
    """ITL, inter-token latency = gaps between consecutive chunks with generated text, pooled over all requests of the
    point; a chunk of several tokens counts as so many gaps of equal length."""
    gaps = [later - earlier for earlier, later in zip(trace.chunks, trace.chunks[1:], strict=False)]
    if trace.counts:
        tokens = [max(1, b - a) for a, b in zip(trace.counts, trace.counts[1:], strict=False)]
        return [gap / count for gap, count in zip(gaps, tokens, strict=True) for _ in range(count)]
    return [gap / tokens_per_chunk(trace) for gap in gaps]


def e2e(trace: Trace) -> float:
    """E2E, end-to-end latency = arrival of the stream's last event - scheduled moment of the request."""
    return trace.ended - trace.scheduled


def queueing(trace: Trace) -> float:
    """Queueing in the client = moment at which the request was sent - scheduled moment; it is part of every latency
    above."""
    return trace.started - trace.scheduled


def server_queueing(trace: Trace) -> float | None:
    """Queueing in the server = what the server says in its usage (queue_time), where it does."""
    return trace.queue_s


def client_lag(trace: Trace) -> float:
    """Client lag = moment at which the request was sent - the later of its scheduled moment and the moment at which one
    more in flight was allowed: what the client itself added."""
    return trace.started - trace.scheduled - trace.held_s


# --- many requests ----------------------------------------------------------------------------------------------------


def requests_per_s(traces: Sequence[Trace], wall_s: float) -> float | None:
    """Requests/s = completed requests / wall time; failed ones are not completed."""
    return sum(trace.failure is None for trace in traces) / wall_s if traces and wall_s > 0 else None


def output_tokens_per_s(traces: Sequence[Trace], wall_s: float) -> float | None:
    """Output tokens/s = sum of n_out over all completed requests / wall time; wall time of a block runs from its start
    to its last end."""
    return _per_s([trace.completion_tokens for trace in traces if not trace.failure], wall_s)


def total_tokens_per_s(traces: Sequence[Trace], wall_s: float) -> float | None:
    """Total tokens/s = sum of prompt tokens (those of images among them) and n_out over all completed requests / wall
    time."""
    counts = [
        None
        if trace.prompt_tokens is None or trace.completion_tokens is None
        # A server counts both or neither.
        else trace.prompt_tokens + trace.completion_tokens
        for trace in traces
        if not trace.failure
    ]
    return _per_s(counts, wall_s)


def _per_s(counts: Sequence[int | None], wall_s: float) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / wall_s if known and len(known) == len(counts) and wall_s > 0 else None


@dataclass(frozen=True, slots=True)
class Rates:
    """Throughput of a window; tokens are None when the server does not count them."""

    requests_per_s: float
    output_tokens_per_s: float | None


def steady(traces: Sequence[Trace], start: float, end: float) -> Rates | None:
    """Steady rate = sum over completed requests of the share of [sent, ended] that lies in the window / length of the
    window, tokens likewise with n_out; the window is from where throughput had settled, under both systems, to where a
    block's end begins and fewer and fewer are in flight."""
    if end <= start:
        return None
    done = [trace for trace in traces if not trace.failure and trace.ended > trace.started]
    shares = [
        max(0.0, min(trace.ended, end) - max(trace.started, start)) / (trace.ended - trace.started) for trace in done
    ]
    counted = all(trace.completion_tokens is not None for trace in done)
    tokens = sum(share * (trace.completion_tokens or 0) for share, trace in zip(shares, done, strict=True))
    return Rates(sum(shares) / (end - start), tokens / (end - start) if done and counted else None)


#: A round is cut into so many parts to see when its throughput settled, which takes so many chunks in each on average.
PARTS, CHUNKS = 20, 10
#: A beginning is left out when its throughput is off by more than this share, and by so many standard errors.
OFF_SHARE, OFF_ERRORS = 0.05, 3.0


def settled(rounds: Sequence[tuple[Sequence[Trace], float, float]]) -> float | None:
    """Settled = where throughput is steady from, found and not assumed: the time of each round, from its start to when
    fewer were in flight, is cut into 20 parts, chunks are counted in each and averaged over the rounds; of all
    beginnings of up to half a round that one is left out which minimises the rest's variance / its number of parts
    (MSER, White 1997), if it is off by more than 5% and 3 standard errors; 0 where none is, None where that is half or
    where there are fewer than 10 chunks a part.

    Args:
        rounds: of each its requests, its start, and when fewer were in flight.
    """
    spans = [end - start for _, start, end in rounds if end > start]
    if not spans:
        return None
    part = min(spans) / PARTS
    counted = np.zeros(PARTS)
    for traces, start, _ in rounds:
        times = [chunk for trace in traces if not trace.failure for chunk in trace.chunks]
        counted += np.histogram(times, bins=PARTS, range=(start, start + PARTS * part))[0]
    if counted.sum() < PARTS * CHUNKS:
        return None
    left_out = min(range(PARTS // 2 + 1), key=lambda cut: float(counted[cut:].var()) / (PARTS - cut))
    if not left_out:
        return 0.0
    before, after = counted[:left_out], counted[left_out:]
    # Of counts: what chance alone would spread is in it where the parts are few.
    error = math.sqrt(max(after.var(ddof=1), after.mean()) * (1 / len(before) + 1 / len(after)))
    off = abs(before.mean() - after.mean())
    if off <= max(OFF_SHARE * after.mean(), OFF_ERRORS * error):
        return 0.0
    return None if left_out == PARTS // 2 else left_out * part


def achieved_per_s(traces: Sequence[Trace], offered_per_s: float) -> float:
    """Achieved rate = offered rate / (1 + g) under a rate, where g is by how much the latency of later requests grows
    in the time between them (least squares, at least 0): a server that keeps up answers as fast as it is asked,
    however long each answer takes. Kept = at least 95% of the offered rate, and the load was not stopped."""
    done = [trace for trace in traces if not trace.failure]
    due, latency = np.asarray([t.scheduled for t in done]), np.asarray([e2e(t) for t in done])
    if len(done) < 3 or np.ptp(due) == 0.0:
        return offered_per_s
    apart = due - due.mean()
    return offered_per_s / (1.0 + max(0.0, float(apart @ latency / (apart @ apart))))


@dataclass(frozen=True, slots=True)
class Spread:
    """How a metric is distributed over its ``n`` samples, in the samples' unit."""

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    n: int


def spread(samples: Iterable[float | None]) -> Spread | None:
    """p50, p90, p95, p99 = percentiles with linear interpolation between the two nearest samples; requests without the
    metric are left out."""
    values = np.asarray([sample for sample in samples if sample is not None], dtype=np.float64)
    if values.size == 0:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, PERCENTILES))
    return Spread(p50=p50, p90=p90, p95=p95, p99=p99, mean=float(values.mean()), n=int(values.size))


def errors(traces: Iterable[Trace]) -> Counter[str]:
    """Errors = failed requests, counted by kind (connect, timeout, stalled and so on); those of HTTP by status."""
    failures = [trace.failure for trace in traces if trace.failure]
    return Counter(f"{f.kind} {f.status}" if f.status is not None else f.kind for f in failures)


def client_fault(traces: Sequence[Trace], loop_lag: Sequence[float] = ()) -> str | None:
    """Invalid = p50 or p90 of the client lag, or of the lateness of the client's event loop, is more than 5% of the
    same percentile of TTFT: the point measures the client; read no figure from it."""
    first = spread(ttft(trace) for trace in traces if not trace.failure)
    if first is None:
        return None
    lags = {
        "sent its requests": spread(client_lag(trace) for trace in traces if not trace.failure),
        "read its answers": spread(loop_lag),
    }
    for what, lag in lags.items():
        if lag is None:
            continue
        for name, late, whole in (("p50", lag.p50, first.p50), ("p90", lag.p90, first.p90)):
            if late > LAG_SHARE * whole:
                return (
                    f"the client {what} {1000 * late:.1f} ms late ({name}), more than {LAG_SHARE:.0%} of a TTFT of "
                    f"{1000 * whole:.1f} ms: it was busier than the server"
                )
    return None


# --- goodput ----------------------------------------------------------------------------------------------------------

#: What an objective can be set for.
SLO_METRICS: Mapping[str, Callable[[Trace], float | None]] = {
    "ttft": ttft,
    "tpot": tpot,
    "itl": lambda trace: max(itl(trace), default=None),
    "e2e": e2e,
}


@dataclass(frozen=True, slots=True)
class Goodput:
    """Attributes: requests that met every objective, a second of wall time and as a share of all that were due."""

    per_s: float
    share: float


def goodput(traces: Sequence[Trace], slos: Sequence[Slo], wall_s: float, *, unsent: int = 0) -> Goodput | None:
    """Goodput = requests that completed and met every objective / wall time; a failed or unsent request met none, one
    of a single token has no TPOT or ITL to miss, and without token counts there is no goodput under a TPOT. Of ITL the
    longest gap of a request counts."""
    if not slos or not traces or wall_s <= 0:
        return None
    done = [trace for trace in traces if not trace.failure]
    if any(slo.metric == "tpot" for slo in slos) and any(trace.completion_tokens is None for trace in done):
        return None
    good = sum(all(_met(trace, slo) for slo in slos) for trace in done)
    return Goodput(good / wall_s, good / (len(traces) + unsent))


def _met(trace: Trace, slo: Slo) -> bool:
    value = SLO_METRICS[slo.metric](trace)
    # Without text there is no TTFT, and that is a miss; with one token there is no TPOT, and that is none.
    return slo.metric in ("tpot", "itl") if value is None else value <= slo.limit_s


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one point. Times are seconds.

    Attributes:
        requests: that ended, failed ones too.
        completed: without those.
        errors: failed requests by kind.
        uncounted: completed requests whose tokens the server did not count: it ignores ``stream_options``, and there is
            no TPOT and no tokens/s.
        held: requests that were due while as many as allowed were in flight.
        unsent: requests that were due when the point was stopped.
        invalid: why the point measures the client rather than the server; None when it does not.
    """

    requests: int
    completed: int
    errors: dict[str, int]
    uncounted: int
    held: int
    unsent: int
    wall_s: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    queueing: Spread | None
    server_queueing: Spread | None
    client_lag: Spread | None
    loop_lag: Spread | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    goodput: Goodput | None
    invalid: str | None


def summarise(
    traces: Sequence[Trace],
    wall_s: float,
    *,
    slos: Sequence[Slo] = (),
    loop_lag: Sequence[float] = (),
    unsent: int = 0,
) -> Summary:
    """Return all figures of the requests of a point; latencies are those of completed requests."""
    done = [trace for trace in traces if not trace.failure]
    return Summary(
        requests=len(traces),
        completed=len(done),
        errors=dict(errors(traces)),
        uncounted=sum(trace.completion_tokens is None for trace in done),
        held=sum(trace.held_s > 0 for trace in traces),
        unsent=unsent,
        wall_s=wall_s,
        ttft=spread(map(ttft, done)),
        tpot=spread(map(tpot, done)),
        itl=spread(gap for trace in done for gap in itl(trace)),
        e2e=spread(map(e2e, done)),
        queueing=spread(map(queueing, done)),
        server_queueing=spread(map(server_queueing, done)),
        client_lag=spread(map(client_lag, done)),
        loop_lag=spread(loop_lag),
        requests_per_s=requests_per_s(traces, wall_s),
        output_tokens_per_s=output_tokens_per_s(traces, wall_s),
        total_tokens_per_s=total_tokens_per_s(traces, wall_s),
        goodput=goodput(traces, slos, wall_s, unsent=unsent),
        invalid=client_fault(traces, loop_lag),
    )


def _definition(function: Callable[..., object]) -> str:
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


#: Name -> definition of every metric, from the docstrings above.
FORMULAS: dict[str, str] = {
    function.__name__: _definition(function)
    for function in (
        ttft,
        tpot,
        itl,
        tokens_per_chunk,
        e2e,
        queueing,
        server_queueing,
        client_lag,
        requests_per_s,
        output_tokens_per_s,
        total_tokens_per_s,
        steady,
        settled,
        achieved_per_s,
        goodput,
        errors,
        client_fault,
        spread,
    )
}


def definitions() -> dict[str, str]:
    """Return a copy of `FORMULAS`."""
    return dict(FORMULAS)
