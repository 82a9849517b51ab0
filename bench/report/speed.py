"""What the load measured, as a report holds it: each point's latencies, throughput, goodput and errors, whether its
figures can be trusted, and how the candidate compares with the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median, stdev

import numpy as np
from scipy import stats

from bench.judge.stats import CONFIDENCE
from bench.load import metrics
from bench.load.client import Trace
from bench.machine.energy import DEFINITION as ENERGY
from bench.machine.server_metrics import DEFINITIONS as SERVER
from bench.machine.server_metrics import ServerPoint
from bench.report.headlines import RATES, marked, p_value
from bench.report.schema import (
    Distribution,
    Estimate,
    Goodput,
    ServerCounters,
    SpeedFigure,
    SpeedPoint,
    SpeedRatio,
)
from bench.roles import ROLES, Role
from bench.run.config import BenchConfig
from bench.run.loads import WAVES, Load
from bench.run.measured import Measurements, Stretch

__all__ = ["DEFINITIONS", "doubts", "points", "ratios"]

KINDS = ("closed", "open", "replay", "single", "saturation", "rate")
#: With fewer requests, p99 is next to the slowest one, and shown nowhere.
FEW = 100
#: Of the images looked up, more than this in the server's cache is no rounding; of the prompts' tokens, more than
#: this is not the chat template's beginning alone.
CACHED_IMAGES, CACHED_TOKENS = 0.01, 0.25


# --- rounds -----------------------------------------------------------------------------------------------------------


def _p50(metric: Callable[[Trace], float | None]) -> Callable[[Stretch], float | None]:
    def of(stretch: Stretch) -> float | None:
        found = metrics.spread(metric(trace) for trace in stretch.block.traces if not trace.failure)
        return 1000.0 * found.p50 if found else None

    return of


def _itl_p50(stretch: Stretch) -> float | None:
    found = metrics.spread(gap for trace in stretch.block.traces if not trace.failure for gap in metrics.itl(trace))
    return 1000.0 * found.p50 if found else None


LATENCIES: dict[SpeedFigure, Callable[[Stretch], float | None]] = {
    "ttft": _p50(metrics.ttft),
    "tpot": _p50(metrics.tpot),
    "itl": _itl_p50,
    "e2e": _p50(metrics.e2e),
}
#: Latencies that each request has one of.
PAIRED: dict[SpeedFigure, Callable[[Trace], float | None]] = {
    "ttft": metrics.ttft,
    "tpot": metrics.tpot,
    "e2e": metrics.e2e,
}


def _figures(config: BenchConfig, settled_s: float) -> dict[SpeedFigure, Callable[[Stretch], float | None]]:
    """What is told by round; steady throughput from so many seconds on."""

    def rate(of: Callable[[Sequence[Trace], float], float | None]) -> Callable[[Stretch], float | None]:
        return lambda stretch: of(stretch.block.traces, stretch.block.wall_s)

    def good(stretch: Stretch) -> float | None:
        block = stretch.block
        found = metrics.goodput(block.traces, config.slos, block.wall_s, unsent=block.unsent)
        return found.per_s if found else None

    def steady(of: Callable[[metrics.Rates], float | None]) -> Callable[[Stretch], float | None]:
        return lambda stretch: of(found) if (found := _steady(stretch, settled_s)) else None

    return {
        **LATENCIES,
        "steady_requests_per_s": steady(lambda rates: rates.requests_per_s),
        "steady_output_tokens_per_s": steady(lambda rates: rates.output_tokens_per_s),
        "requests_per_s": rate(metrics.requests_per_s),
        "output_tokens_per_s": rate(metrics.output_tokens_per_s),
        "total_tokens_per_s": rate(metrics.total_tokens_per_s),
        "goodput_per_s": good,
    }


def _estimate(rounds: Sequence[float | None]) -> Estimate | None:
    """By round = median of the rounds' figures, of latencies of their p50; 95% interval: Student's, on the logarithms
    of the rounds' figures, with rounds - 1 degrees of freedom, for requests of one round share whatever the machine did
    meanwhile. One round has no interval."""
    values = [value for value in rounds if value is not None]
    if not values:
        return None
    middle = median(values)
    if len(values) < 2 or min(values) <= 0.0:
        return Estimate(value=middle, low=None, high=None, rounds=values)
    logs = [math.log(value) for value in values]
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    # The median of many rounds may lie outside the interval of their mean.
    low, high = min(middle, math.exp(fmean(logs) - reach)), max(middle, math.exp(fmean(logs) + reach))
    return Estimate(value=middle, low=low, high=high, rounds=values)


def _ratio(
    metric: SpeedFigure, of: Callable[[Stretch], float | None], after: Sequence[Stretch], before: Sequence[Stretch]
) -> Estimate | None:
    """Ratio = candidate's figure / baseline's, round by round, so that what changed for both from round to round
    cancels; over the rounds as above. Of TTFT, TPOT and E2E a round's ratio is the median over its requests of
    candidate / baseline for the same request: both systems get the same ones, and texts are not held against images."""

    def one(above: Stretch, below: Stretch) -> float | None:
        if metric in PAIRED and (paired := _paired(PAIRED[metric], above, below)) is not None:
            return paired
        ends = of(above), of(below)
        return None if ends[0] is None or not ends[1] else ends[0] / ends[1]

    return _estimate([one(above, below) for above, below in zip(after, before, strict=True)])


def _paired(metric: Callable[[Trace], float | None], after: Stretch, before: Stretch) -> float | None:
    """The median ratio of a latency over the requests that both answered; None where fewer than half are known."""

    def by_number(stretch: Stretch) -> dict[int, float]:
        done = [trace for trace in stretch.block.traces if not trace.failure and trace.number is not None]
        return {trace.number or 0: value for trace in done if (value := metric(trace))}

    above, below = by_number(after), by_number(before)
    both = above.keys() & below.keys()
    if not both or 2 * len(both) < min(len(after.block.traces), len(before.block.traces)):
        return None
    return math.exp(median(math.log(above[number] / below[number]) for number in both))


def _of_shape(stretch: Stretch, shape: str) -> Stretch:
    """A round's requests of one shape."""
    traces = tuple(trace for trace in stretch.block.traces if trace.shape == shape)
    return replace(stretch, block=replace(stretch.block, traces=traces))


def _shapes(stretches: Iterable[Stretch]) -> list[str]:
    found = {trace.shape for stretch in stretches for trace in stretch.block.traces}
    return sorted(found) if len(found) > 1 else []


# --- points -----------------------------------------------------------------------------------------------------------


def points(measured: Measurements, config: BenchConfig) -> list[SpeedPoint]:
    """Return every point, those of one load next to each other: closed loops, open loops, the sweep."""
    found = measured.stretches()

    def order(key: tuple[Role, Load]) -> tuple[int, float, int]:
        role, load = key
        size = load.share or load.rate_per_s or load.speed or load.concurrency or 0.0
        return KINDS.index(load.kind), size, ROLES.index(role)

    settled = {load: _settled(load, found) for _, load in found}
    return [_point(*key, found[key], config, settled[key[1]]) for key in sorted(found, key=order)]


def _settled(load: Load, found: Mapping[tuple[Role, Load], Mapping[int, Stretch]]) -> float | None:
    """Seconds of a round after which the throughput of both systems had settled under a closed loop; None where it had
    not, or where it can't be told."""
    each = []
    for role in ROLES:
        stretches = [stretch for stretch in found.get((role, load), {}).values() if stretch.offered_per_s is None]
        if stretches:
            rounds = [(s.block, _full_until(s)) for s in stretches]
            each.append(metrics.settled([((*b.ramp, *b.traces), b.begun, end) for b, end in rounds]))
    known = [value for value in each if value is not None]
    return max(known) if known and len(known) == len(each) else None


def _point(
    role: Role, load: Load, rounds: Mapping[int, Stretch], config: BenchConfig, settled_s: float | None
) -> SpeedPoint:
    stretches = [rounds[round_] for round_ in sorted(rounds)]
    blocks = [stretch.block for stretch in stretches]
    traces = [trace for block in blocks for trace in block.traces]
    done = [trace for trace in traces if not trace.failure]
    found = metrics.summarise(
        traces,
        sum(block.wall_s for block in blocks),
        slos=config.slos,
        loop_lag=[late for block in blocks for late in block.loop_lag],
        unsent=sum(block.unsent for block in blocks),
    )
    figures = _figures(config, settled_s or 0.0)
    by_round = {name: _estimate([of(stretch) for stretch in stretches]) for name, of in figures.items()}
    steady = [_steady(stretch, settled_s or 0.0) for stretch in stretches]
    offered = [stretch.offered_per_s for stretch in stretches if stretch.offered_per_s is not None]
    achieved = [
        metrics.achieved_per_s(stretch.block.traces, stretch.offered_per_s)
        for stretch in stretches
        if stretch.offered_per_s is not None
    ]
    stopped = list(dict.fromkeys(block.stopped for block in blocks if block.stopped))
    tokens = _total([trace.completion_tokens for trace in done])
    return SpeedPoint(
        role=role,
        load=load,
        rounds=len(blocks),
        requests=found.requests,
        completed=found.completed,
        errors=found.errors,
        unsent=found.unsent,
        held=found.held,
        uncounted=found.uncounted,
        wall_s=found.wall_s,
        offered_per_s=median(offered) if offered else None,
        achieved_per_s=median(achieved) if achieved else None,
        kept=not stopped and _kept(achieved, offered) if offered else None,
        retries=sum(trace.retries for trace in traces),
        tokens_per_chunk=_mean([_tokens_per_chunk(trace) for trace in done]),
        ttft_ms=_ms(found.ttft, map(metrics.ttft, done)),
        tpot_ms=_ms(found.tpot, map(metrics.tpot, done)),
        itl_ms=_ms(found.itl),
        e2e_ms=_ms(found.e2e, map(metrics.e2e, done)),
        queueing_ms=_ms(found.queueing),
        server_queueing_ms=_ms(found.server_queueing),
        client_lag_ms=_ms(found.client_lag),
        loop_lag_ms=_ms(found.loop_lag),
        requests_per_s=found.requests_per_s or 0.0,
        output_tokens_per_s=found.output_tokens_per_s,
        total_tokens_per_s=found.total_tokens_per_s,
        steady_requests_per_s=_middle([rate.requests_per_s for rate in steady if rate]),
        steady_output_tokens_per_s=_middle([rate.output_tokens_per_s for rate in steady if rate]),
        goodput=Goodput(per_s=found.goodput.per_s, share=found.goodput.share) if found.goodput else None,
        by_round={name: estimate for name, estimate in by_round.items() if estimate},
        by_shape={shape: _by_round([_of_shape(each, shape) for each in stretches]) for shape in _shapes(stretches)},
        output_tokens=tokens,
        settled_s=settled_s,
        prompt_tokens=_total([trace.prompt_tokens for trace in done]),
        image_tokens=_image_tokens(done),
        server=_server([stretch.server for stretch in stretches]),
        energy_j_per_token=_energy(stretches, tokens),
        invalid=found.invalid,
        stopped=stopped,
    )


def _ms(found: metrics.Spread | None, samples: Iterable[float | None] = ()) -> Distribution | None:
    """Return the distribution in ms, with the percentiles of ``samples``."""
    if found is None:
        return None
    known = [sample for sample in samples if sample is not None]
    curve = np.percentile(known, range(101)) if known else ()
    return Distribution(
        p50=1000.0 * found.p50,
        p90=1000.0 * found.p90,
        p95=1000.0 * found.p95,
        p99=1000.0 * found.p99,
        mean=1000.0 * found.mean,
        n=found.n,
        cdf=[float(f"{1000.0 * value:.5g}") for value in curve],
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _image_tokens(done: Sequence[Trace]) -> int | None:
    """None where no request has images, too: then there is nothing to tell apart."""
    total = _total([trace.image_tokens for trace in done])
    return total if any(trace.images for trace in done) else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _kept(achieved: Sequence[float], offered: Sequence[float]) -> bool:
    return median(got / due for got, due in zip(achieved, offered, strict=True)) >= metrics.KEPT_SHARE


def _by_round(stretches: Sequence[Stretch]) -> dict[SpeedFigure, Estimate]:
    """Latencies by round."""
    found = {name: _estimate([of(stretch) for stretch in stretches]) for name, of in LATENCIES.items()}
    return {name: estimate for name, estimate in found.items() if estimate}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _tokens_per_chunk(trace: Trace) -> float | None:
    return trace.completion_tokens / len(trace.chunks) if trace.completion_tokens and trace.chunks else None


def _steady(stretch: Stretch, settled_s: float) -> metrics.Rates | None:
    """Of a closed loop: under a rate the window would cut what is under way at its end."""
    if stretch.offered_per_s is not None:
        return None
    block, end = stretch.block, _full_until(stretch)
    start = block.begun + settled_s
    # A round that was much shorter than the others: all of it counts.
    return metrics.steady([*block.ramp, *block.traces], start if start < end else block.begun, end)


def _full_until(stretch: Stretch) -> float:
    """When a closed loop began to have fewer in flight: it sent its last request, or a worker had no chat left."""
    block = stretch.block
    last = max((trace.scheduled for trace in block.traces), default=block.begun)
    return last if block.full_until is None else min(last, block.full_until)


def _server(seen: Sequence[ServerPoint | None]) -> ServerCounters | None:
    """Add up what the server counted in each round; None when it did not in some."""
    known = [point for point in seen if point]
    if not known or len(known) < len(seen):
        return None

    def share(hits: str, queries: str) -> float | None:
        total, found = (_total([getattr(point, name) for point in known]) for name in (queries, hits))
        return found / total if total and found is not None else None

    queues = [(point.queue_mean_s, point.finished or 0) for point in known]
    weight = sum(finished for queue, finished in queues if queue is not None)
    queued = sum(queue * finished for queue, finished in queues if queue is not None)
    return ServerCounters(
        prefix_cache_share=share("prefix_hits", "prefix_queries"),
        image_cache_share=share("image_hits", "image_queries"),
        preemptions=_total([point.preemptions for point in known]),
        queue_mean_ms=1000.0 * queued / weight if weight else None,
        finished=_total([point.finished for point in known]),
        accepted_share=share("accepted", "guessed"),
        tokens_per_step=None if (each := share("accepted", "drafts")) is None else 1.0 + each,
    )


def _energy(stretches: Sequence[Stretch], tokens: int | None) -> float | None:
    used = [stretch.joules for stretch in stretches]
    known = [joules for joules in used if joules is not None]
    # What the ramp's requests took is in the counter, and their tokens are not in the point's.
    ramp = sum(trace.completion_tokens or 0 for stretch in stretches for trace in stretch.block.ramp)
    return sum(known) / (tokens + ramp) if tokens and known and len(known) == len(used) else None


# --- candidate against baseline ---------------------------------------------------------------------------------------


def ratios(measured: Measurements, found: Sequence[SpeedPoint], config: BenchConfig) -> list[SpeedRatio]:
    """Return candidate / baseline of each figure under each load that both were under, where both points are valid; of
    latencies by shape of request as well. The headlines are marked.

    Rates of a sweep are shares of each system's own saturation: not the same load, so they have no ratio. Throughput
    under a rate that both keep is the rate: it has none either.
    """
    stretches = measured.stretches()
    valid = {(point.role, point.load) for point in found if point.invalid is None}
    result = []
    for load in dict.fromkeys(point.load for point in found if point.load.kind != "rate"):
        if not valid >= {("baseline", load), ("candidate", load)}:
            continue
        before, after = stretches["baseline", load], stretches["candidate", load]
        both = sorted(before.keys() & after.keys())
        above, below = [after[round_] for round_ in both], [before[round_] for round_ in both]
        figures = _figures(config, _settled(load, stretches) or 0.0)
        kept = all(point.kept for point in found if point.load == load)
        for shape in ("", *_shapes([*above, *below])):
            pair = [[_of_shape(each, shape) for each in side] if shape else side for side in (above, below)]
            for metric, of in (LATENCIES if shape else figures).items():
                if kept and metric in RATES:
                    continue
                ratio = _ratio(metric, of, *pair)
                if ratio:
                    result.append(
                        SpeedRatio(
                            metric=metric,
                            load=load.name,
                            shape=shape,
                            ratio=ratio.value,
                            low=ratio.low,
                            high=ratio.high,
                            rounds=ratio.rounds,
                        )
                    )
    return marked(found, result)


# --- doubts -----------------------------------------------------------------------------------------------------------


def doubts(found: Sequence[SpeedPoint], measured: Measurements, config: BenchConfig) -> list[str]:
    """Return what a reader should know before trusting a figure."""
    notes = []
    for role in ROLES:
        mine = [point for point in found if point.role == role]
        notes += _counting(role, mine, measured, config)
    for point in found:
        name = f"{point.role}, {point.load.name}"
        if point.invalid:
            notes.append(f"{name}: invalid, read no figure from it: {point.invalid}")
        if point.errors:
            kinds = ", ".join(f"{count} {kind}" for kind, count in point.errors.items())
            notes.append(f"{name}: {sum(point.errors.values())} of {point.requests} requests failed ({kinds})")
        notes += [f"{name}: stopped: {reason}" for reason in point.stopped]
        notes += _load_notes(point, name)
        server = None if _shares(config) else point.server
        if server and (server.image_cache_share or 0.0) > CACHED_IMAGES:
            notes.append(f"{name}: the server had {server.image_cache_share:.0%} of the images in its cache")
        if server and (server.prefix_cache_share or 0.0) > CACHED_TOKENS:
            notes.append(f"{name}: the server had {server.prefix_cache_share:.0%} of the prompts' tokens in its cache")
        ended = point.server.finished if point.server else None
        if ended is not None and ended > _sent(measured, point):
            notes.append(f"{name}: the server answered others meanwhile ({ended} requests ended there)")
    notes += _untried(found, config)
    fewest = min((point.completed for point in found), default=FEW)
    if fewest < FEW:
        notes.append(f"{fewest} requests in a point: too few for a p99, which is left out")
    if found and config.rounds < 3:
        notes.append(
            "one round: speed has no intervals" if config.rounds == 1 else "two rounds: the intervals of speed are wide"
        )
    return notes


def _shares(config: BenchConfig) -> bool:
    """Whether requests share something on purpose, which the server's caches are to know."""
    return config.traffic is not None or config.turns > 1 or config.shared_prefix > 0


def _sent(measured: Measurements, point: SpeedPoint) -> int:
    rounds = measured.stretches()[point.role, point.load].values()
    return sum(len(stretch.block.traces) + len(stretch.block.ramp) for stretch in rounds)


def _counting(role: Role, mine: Sequence[SpeedPoint], measured: Measurements, config: BenchConfig) -> list[str]:
    packed = max((point.tokens_per_chunk or 1.0 for point in mine), default=1.0)
    chunks = []
    if packed >= metrics.PACKED:
        counted = any(trace.counts for trace in _traces(role, measured))
        how = (
            "counted chunk by chunk" if counted else "taken to be spread evenly, for the server does not count by chunk"
        )
        chunks = [f"the {role}'s server sends {packed:.1f} tokens a chunk: chunks are not tokens, which are {how}"]
    if any(point.uncounted for point in mine):
        return [f"the {role}'s server reports no token counts (stream_options.include_usage): no TPOT and no tokens/s"]
    counted_ = [trace for trace in _traces(role, measured) if trace.completion_tokens is not None]
    if all(_as_asked(trace, config) for trace in counted_):
        return chunks
    lengths = [trace.completion_tokens or 0 for trace in counted_]
    asked = "as was asked for" if config.traffic else f"of {config.output_tokens} each"
    return [
        *chunks,
        f"the {role}'s answers have {min(lengths)} to {max(lengths)} tokens instead {asked}: "
        "its server ignores ignore_eos or cuts answers, so throughput and E2E compare unequal work",
    ]


def _as_asked(trace: Trace, config: BenchConfig) -> bool:
    """Whether an answer is as long as was asked for; of runs that were begun before traces said, about."""
    if trace.asked is not None:
        return trace.completion_tokens == trace.asked
    return config.output_tokens.low <= (trace.completion_tokens or 0) <= config.output_tokens.high


def _load_notes(point: SpeedPoint, name: str) -> list[str]:
    """What is to know of how a point was loaded."""
    notes = []
    if point.burst:
        each = point.requests / point.rounds / (point.load.concurrency or 1)
        notes.append(
            f"{name}: a burst, {each:.1f} requests a round for each in flight, fewer than {WAVES}: it is no headline; "
            "raise --duration or --requests"
        )
    if point.kept is False and point.load.has_rate and not point.stopped:
        notes.append(
            f"{name}: the rate was not kept: {point.offered_per_s:.3g} requests/s offered, "
            f"{point.achieved_per_s:.3g} achieved, and latencies grew to the end"
        )
    if point.retries:
        notes.append(
            f"{name}: the server was busy: {point.retries} times a request was refused and sent again; the wait is in "
            "its latency"
        )
    return notes


def _traces(role: Role, measured: Measurements) -> Iterator[Trace]:
    for (of, _), rounds in measured.stretches().items():
        if of == role:
            for stretch in rounds.values():
                yield from stretch.block.traces


def _untried(found: Sequence[SpeedPoint], config: BenchConfig) -> list[str]:
    notes = []
    for role in ROLES:
        tried = {point.load.rate_per_s for point in found if (point.role, point.load.kind) == (role, "open")}
        skipped = [rate for rate in sorted(config.rates) if rate not in tried]
        if tried and skipped:
            rates = ", ".join(f"{rate:g}" for rate in skipped)
            notes.append(f"{role}: {rates} requests/s not tried, it did not keep up with less")
    return notes


def _definition(function: Callable[..., object]) -> str:
    return " ".join((function.__doc__ or "").split())


#: Name -> definition of everything a point holds.
DEFINITIONS: dict[str, str] = {
    **metrics.FORMULAS,
    "by_round": _definition(_estimate),
    "ratio": _definition(_ratio),
    "headline": (
        "Headline = TTFT and TPOT under the first load, throughput under the fullest; bursts (fewer than 3 requests a "
        "round for each in flight) and stopped loads are none. A headline claims a difference where "
        + _definition(p_value)[0].lower()
        + _definition(p_value)[1:].removesuffix(" None of fewer than two rounds.")
        + " Adjusted by Holm (1979) for the number of headlines, and below 5% still."
    ),
    **SERVER,
    "energy": ENERGY,
}
