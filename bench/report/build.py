"""Turns raw measurements into a `Report`: scores, statistics, verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import get_args

from bench import environment, metrics, resources, stats, tasks
from bench.client import Trace
from bench.load import Block
from bench.report import accuracy, words
from bench.report.model import (
    Accuracy,
    Distribution,
    Environment,
    Failed,
    Report,
    Role,
    SpeedPoint,
    SpeedRatio,
    SystemInfo,
    Verdict,
    Workload,
)
from bench.run import Measurements, Plan
from bench.tasks import Question

__all__ = ["build", "workload"]

ROLES: tuple[Role, ...] = get_args(Role)

RATIO = "Ratio = candidate's median / baseline's median over all requests of a point, interval by bootstrap."


def workload(
    plan: Plan, questions: Sequence[Question], *, source: str | None, interleaved: bool, seed: int
) -> Workload:
    """Describe what is asked."""
    return Workload(
        tasks_source=source,
        questions=len(questions),
        questions_sha256=tasks.digest(questions) if questions else None,
        answer_tokens=plan.answer_tokens,
        question_concurrency=plan.question_concurrency,
        concurrencies=list(plan.concurrencies),
        requests=[plan.rounds * plan.block_requests(concurrency) for concurrency in plan.concurrencies],
        rounds=plan.rounds,
        output_tokens=plan.output_tokens,
        image_sizes=["text" if size is None else f"{size[0]}x{size[1]}" for size in plan.image_sizes],
        interleaved=interleaved,
        timeout_s=plan.timeout_s,
        seed=seed,
    )


def build(
    measured: Measurements,
    questions: Sequence[Question],
    systems: dict[Role, SystemInfo],
    work: Workload,
    *,
    margin: float,
    duration_s: float,
    command: str,
    warnings: Sequence[str] = (),
) -> Report:
    """Score and judge what was measured. With any failed request the report is ``failed`` and holds no figure.

    Args:
        margin: the loss of accuracy that would not matter, as a fraction of 1, above 0.
    """
    failed = bool(measured.failures)
    found: Accuracy | None = None
    doubts: list[str] = []
    if questions and not failed:
        found, doubts = accuracy.answers(questions, measured.answers, seed=work.seed, margin=margin)
    speed = [] if failed else [_point(role, c, blocks) for (role, c), blocks in sorted(measured.blocks.items())]
    labels: dict[Role, str] = {role: system.label for role, system in systems.items()}
    report = Report(
        status="failed" if failed else "ok",
        created=datetime.now(UTC).replace(microsecond=0),
        duration_s=round(duration_s, 1),
        verdict=Verdict(
            accuracy=found.overall.verdict if found else None,
            margin=margin,
            sentence=words.sentence(found, margin, labels),
        ),
        systems=systems,
        workload=work,
        accuracy=found,
        speed=speed,
        speed_ratios=[] if failed else _ratios(measured, work),
        failures=[
            Failed(role=role, phase=phase, kind=failure.kind, message=failure.message, count=count)
            for (role, phase, failure), count in measured.failures.most_common()
        ],
        warnings=[*warnings, *doubts, *([] if failed else _doubts(measured, work, found))],
        environment=Environment(
            platform=environment.system_name(),
            cpu=environment.cpu_name(),
            gpus=environment.gpu_names(),
            versions=environment.versions(),
            command=command,
        ),
        definitions={
            **metrics.definitions(),
            **accuracy.DEFINITIONS,
            "ratio": RATIO,
            "disk": resources.DISK_DEFINITION,
            "host_memory": resources.HOST_DEFINITION,
            "gpu_memory": resources.GPU_DEFINITION,
        },
    )
    if failed:
        sentence = words.failure_sentence(report)
        report = report.model_copy(update={"verdict": Verdict(accuracy=None, margin=margin, sentence=sentence)})
    return report


# --- speed ------------------------------------------------------------------------------------------------------------


def _ms(samples: Iterable[float | None]) -> Distribution | None:
    found = metrics.spread(None if sample is None else 1000.0 * sample for sample in samples)
    if found is None:
        return None
    return Distribution(p50=found.p50, p90=found.p90, p99=found.p99, mean=found.mean, n=found.n)


def _traces(blocks: Sequence[Block]) -> list[Trace]:
    return [trace for block in blocks for trace in block.traces]


def _point(role: Role, concurrency: int, blocks: Sequence[Block]) -> SpeedPoint:
    traces = _traces(blocks)
    wall_s = sum(block.wall_s for block in blocks)
    ttft, e2e = _ms(map(metrics.ttft, traces)), _ms(map(metrics.e2e, traces))
    lag = _ms(map(metrics.client_lag, traces))
    rate = metrics.requests_per_s(traces, wall_s)
    assert ttft and e2e and lag and rate  # every trace of a run without failures has text
    counted = all(trace.completion_tokens is not None for trace in traces)
    return SpeedPoint(
        role=role,
        concurrency=concurrency,
        requests=len(traces),
        wall_s=wall_s,
        ttft_ms=ttft,
        tpot_ms=_ms(map(metrics.tpot, traces)),
        itl_ms=_ms(gap for trace in traces for gap in metrics.itl(trace)),
        e2e_ms=e2e,
        client_lag_ms=lag,
        requests_per_s=rate,
        output_tokens_per_s=metrics.output_tokens_per_s(traces, wall_s),
        output_tokens=sum(trace.completion_tokens or 0 for trace in traces) if counted else None,
        prompt_tokens=sum(trace.prompt_tokens or 0 for trace in traces) if counted else None,
    )


def _ratios(measured: Measurements, work: Workload) -> list[SpeedRatio]:
    ratios = []
    for name, metric in (("ttft", metrics.ttft), ("tpot", metrics.tpot), ("e2e", metrics.e2e)):
        for concurrency in work.concurrencies:
            samples: dict[Role, list[float]] = {}
            for role in ROLES:
                values = map(metric, _traces(measured.blocks.get((role, concurrency), [])))
                samples[role] = [value for value in values if value is not None]
            found = stats.ratio_of_medians(samples["candidate"], samples["baseline"], seed=work.seed)
            if found:
                ratios.append(
                    SpeedRatio.model_validate(
                        {
                            "metric": name,
                            "concurrency": concurrency,
                            "ratio": found.value,
                            "low": found.low,
                            "high": found.high,
                        }
                    )
                )
    return ratios


def _doubts(measured: Measurements, work: Workload, found: Accuracy | None) -> list[str]:
    """What a reader should know before trusting a figure."""
    doubts = []
    for role in ROLES:
        traces = [t for (r, _), blocks in measured.blocks.items() if r == role for t in _traces(blocks)]
        if any(trace.completion_tokens is None for trace in traces):
            doubts.append(
                f"the {role}'s server reports no token counts (stream_options.include_usage): no TPOT and no tokens/s"
            )
        elif any(trace.completion_tokens != work.output_tokens for trace in traces):
            lengths = sorted({trace.completion_tokens or 0 for trace in traces})
            doubts.append(
                f"the {role}'s answers have {lengths[0]} to {lengths[-1]} tokens instead of {work.output_tokens} each: "
                "its server ignores ignore_eos or cuts answers, so throughput and E2E compare unequal work"
            )
        lag, first = _ms(map(metrics.client_lag, traces)), _ms(map(metrics.ttft, traces))
        if lag and first and lag.p50 > 0.05 * first.p50:
            doubts.append(
                f"the client fell behind by {lag.p50:.1f} ms (p50) before requests to the {role}: "
                "more than 5% of its TTFT"
            )
    if work.requests and min(work.requests) < 100:
        doubts.append(f"{min(work.requests)} requests a point: p99 is close to the slowest request, read it as such")
    if found:
        for role, cut in found.cut_answers.items():
            if cut:
                doubts.append(
                    f"{cut} of the {role}'s answers were cut at {work.answer_tokens} tokens; raise --answer-tokens"
                )
    if not work.interleaved:
        doubts.append(
            "the systems ran one after the other, not in turns: what the machine did meanwhile is in the difference"
        )
    return doubts
