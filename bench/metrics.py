"""The formulas of a speed measurement. A function's docstring is its definition, and reports print it.

Times in are seconds on one clock; times out are seconds. None means the request does not define the metric.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.client import Trace

__all__ = [
    "PERCENTILES",
    "Spread",
    "client_lag",
    "definitions",
    "e2e",
    "itl",
    "output_tokens_per_s",
    "requests_per_s",
    "spread",
    "tpot",
    "ttft",
]

PERCENTILES = (50, 90, 99)


def ttft(trace: Trace) -> float | None:
    """TTFT, time to first token = arrival of the first chunk with text - scheduled moment of the request."""
    return trace.chunks[0] - trace.scheduled if trace.chunks else None


def tpot(trace: Trace) -> float | None:
    """TPOT, time per output token = (E2E - TTFT) / (n_out - 1), per request; n_out is counted by the server, and 1 has
    no TPOT."""
    first = ttft(trace)
    if first is None or trace.completion_tokens is None or trace.completion_tokens < 2:
        return None
    return (e2e(trace) - first) / (trace.completion_tokens - 1)


def itl(trace: Trace) -> list[float]:
    """ITL, inter-token latency = gaps between consecutive chunks with text, pooled over all requests of the point."""
    return [later - earlier for earlier, later in zip(trace.chunks, trace.chunks[1:], strict=False)]


def e2e(trace: Trace) -> float:
    """E2E, end-to-end latency = arrival of the stream's last event - scheduled moment of the request."""
    return trace.ended - trace.scheduled


def client_lag(trace: Trace) -> float:
    """Client lag = moment at which the request was sent - scheduled moment; it is part of every latency above."""
    return trace.started - trace.scheduled


def output_tokens_per_s(traces: Sequence[Trace], wall_s: float) -> float | None:
    """Output tokens/s = sum of n_out over all requests / wall time; wall time of a block runs from its start to its
    last end."""
    counts = [trace.completion_tokens for trace in traces]
    if not counts or wall_s <= 0 or any(count is None for count in counts):
        return None
    return sum(count for count in counts if count is not None) / wall_s


def requests_per_s(traces: Sequence[Trace], wall_s: float) -> float | None:
    """Requests/s = completed requests / wall time."""
    return len(traces) / wall_s if traces and wall_s > 0 else None


@dataclass(frozen=True, slots=True)
class Spread:
    """How a metric is distributed over its ``n`` samples, in the samples' unit."""

    p50: float
    p90: float
    p99: float
    mean: float
    n: int


def spread(samples: Iterable[float | None]) -> Spread | None:
    """p50, p90, p99 = percentiles with linear interpolation between the two nearest samples; requests without the
    metric are left out."""
    values = np.asarray([sample for sample in samples if sample is not None], dtype=np.float64)
    if values.size == 0:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(values, PERCENTILES))
    return Spread(p50=p50, p90=p90, p99=p99, mean=float(values.mean()), n=int(values.size))


def definitions() -> dict[str, str]:
    """Return name -> definition of every metric, from the docstrings above."""
    functions: tuple[Callable[..., object], ...] = (
        ttft,
        tpot,
        itl,
        e2e,
        client_lag,
        output_tokens_per_s,
        requests_per_s,
        spread,
    )
    return {
        function.__name__: " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split()) for function in functions
    }
