"""Which figures of speed a report leads with, and which of them are more than chance when there are several.

A figure under each of many loads is many tests: of eighteen runs of two equal servers eight had an interval somewhere
that left 1 out. Three are headlines, chosen by what was asked for and not by what came out, and Holm's method holds the
chance of even one false claim among them below 5%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy import stats

from bench.judge.stats import holm
from bench.report.schema import SpeedPoint, SpeedRatio

__all__ = ["RATES", "headlines", "marked", "p_value", "throughput"]

#: Throughput, which a rate that is kept decides and not the server.
RATES = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
#: Throughputs, the one to quote first.
_QUOTED = ("steady_output_tokens_per_s", "output_tokens_per_s", "steady_requests_per_s", "requests_per_s")


def p_value(rounds: Sequence[float]) -> float | None:
    """p = Student's two-sided test that the mean logarithm of the rounds' ratios is 0, with rounds - 1 degrees of
    freedom: below 5% exactly where the 95% interval leaves out 1. None of fewer than two rounds."""
    if len(rounds) < 2 or min(rounds) <= 0.0:
        return None
    logs = [math.log(value) for value in rounds]
    spread = stdev(logs)
    if spread < 1e-12:
        return 1.0 if abs(fmean(logs)) < 1e-12 else 0.0
    return float(2.0 * stats.t.sf(abs(fmean(logs)) / spread * math.sqrt(len(logs)), len(logs) - 1))


def throughput(ratios: Sequence[SpeedRatio]) -> SpeedRatio | None:
    """The ratio of throughput to quote: at saturation, else with most in flight. A rate that both keep has none."""
    for name in _QUOTED:
        found = [r for r in ratios if r.metric == name and not r.shape]
        for sought in ("saturation", "in flight", ""):
            for each in reversed(found):
                if each.load.endswith(sought):
                    return each
    return None


def headlines(points: Sequence[SpeedPoint], ratios: Sequence[SpeedRatio]) -> list[SpeedRatio]:
    """Return the ratios to lead with: time to first token and time per token (else end-to-end latency) under the first
    load, and throughput under the fullest. Bursts and loads that were stopped are left out."""
    out = {point.load.name for point in points if point.burst or point.stopped}
    fit = [ratio for ratio in ratios if ratio.load not in out and not ratio.shape]
    latencies = [next((r for r in fit if r.metric == name), None) for name in ("ttft", "tpot", "e2e")]
    chosen = [latencies[0], latencies[1] or latencies[2], throughput(fit)]
    return [ratio for ratio in chosen if ratio]


def marked(points: Sequence[SpeedPoint], ratios: Sequence[SpeedRatio]) -> list[SpeedRatio]:
    """Return the ratios with their p-values, the headlines marked and their p-values adjusted for their number."""
    known = [ratio.model_copy(update={"p_value": p_value(ratio.rounds)}) for ratio in ratios]
    chosen = headlines(points, known)
    tested = [ratio for ratio in chosen if ratio.p_value is not None]
    adjusted = dict(
        zip(
            [(ratio.metric, ratio.load) for ratio in tested],
            holm([ratio.p_value for ratio in tested if ratio.p_value is not None]),
            strict=True,
        )
    )
    names = {(ratio.metric, ratio.load) for ratio in chosen}
    return [
        ratio.model_copy(update={"headline": True, "p_adjusted": adjusted.get((ratio.metric, ratio.load))})
        if (ratio.metric, ratio.load) in names and not ratio.shape
        else ratio
        for ratio in known
    ]
