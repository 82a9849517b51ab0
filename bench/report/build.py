"""Turns raw measurements into a `Report`: scores, statistics, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from bench.machine import environment, resources
from bench.questions import tasks
from bench.questions.observe import Item
from bench.questions.tasks import Question
from bench.report import accuracy, fidelity, speed, words
from bench.report.schema import Accuracy, Environment, Failed, Fidelity, Report, SystemInfo, Verdict, Workload
from bench.roles import ROLES, Role
from bench.run.config import Plan, Settings
from bench.run.measured import Measurements
from bench.run.session import Outcome

__all__ = ["build", "report", "workload"]


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
        rates=sorted(plan.rates),
        arrivals=plan.arrivals if plan.rates or plan.sweep else None,
        sweep=plan.sweep,
        sweep_concurrency=plan.sweep_concurrency if plan.sweep else None,
        rounds=plan.rounds,
        duration_s=plan.duration_s,
        ramp_s=plan.ramp_s,
        preset=plan.preset,
        output_tokens=str(plan.output_tokens),
        prompt_tokens=str(plan.prompt_tokens),
        images_per_request=str(plan.images),
        image_sizes=["text" if size is None else f"{size[0]}x{size[1]}" for size in plan.image_sizes],
        slos=[str(slo) for slo in plan.slos],
        interleaved=interleaved,
        timeout_s=plan.timeout_s,
        seed=seed,
    )


def report(outcome: Outcome, settings: Settings) -> Report:
    """Make the report of a run; the images of its questions are read once more."""
    return build(
        outcome.measured,
        outcome.questions,
        outcome.systems,
        workload(
            settings.plan,
            outcome.questions,
            source=outcome.questions_source,
            interleaved=outcome.interleaved,
            seed=settings.seed,
        ),
        settings.plan,
        margin=settings.margin,
        duration_s=outcome.duration_s,
        command=settings.command,
        items=outcome.items,
        items_source=outcome.items_source,
        interrupted=outcome.interrupted,
        warnings=outcome.warnings,
    )


def build(
    measured: Measurements,
    questions: Sequence[Question],
    systems: dict[Role, SystemInfo],
    work: Workload,
    plan: Plan,
    *,
    margin: float,
    duration_s: float,
    command: str,
    items: Sequence[Item] = (),
    items_source: str = "",
    interrupted: bool = False,
    warnings: Sequence[str] = (),
) -> Report:
    """Score and judge what was measured. When requests failed that must not, the report is ``failed`` and holds no
    figure.

    Args:
        margin: the loss of accuracy that would not matter, as a fraction of 1, above 0.
        items: of fidelity.
        items_source: where they are from.
        interrupted: the run was, and the report is ``partial``: of the questions those that both systems answered are
            compared, and nothing is judged over all when some are missing.
    """
    failed = bool(measured.failures)
    missing = _missing(measured, questions, items, plan) if interrupted else []
    notes = list(warnings)
    found: Accuracy | None = None
    drift: Fidelity | None = None
    both = [q for q in questions if all(q.id in measured.answers.get(role, {}) for role in ROLES)]
    if both and not failed:
        found, doubts = accuracy.answers(both, measured.answers, seed=work.seed, margin=margin)
        notes += [*doubts, *_cut(found, work)]
    if items and not failed and {"baseline", "candidate"} <= measured.observed.keys():
        drift = fidelity.found(items, measured.observed, plan, source=items_source, seed=work.seed)
        notes += fidelity.doubts(drift)
    points = [] if failed else speed.points(measured, plan)
    notes += speed.doubts(points, measured, plan)
    if not work.interleaved and not failed:
        notes.append(
            "the systems ran one after the other, not in turns: what the machine did meanwhile is in the difference"
        )
    ratios = speed.ratios(measured, points, plan)
    whole = found is not None and len(both) == len(questions)
    labels: dict[Role, str] = {role: system.label for role, system in systems.items()}
    sentence = words.sentence(found, margin, labels)
    if missing:
        sentence = words.partial_sentence(missing, sentence if found else None)
    report = Report(
        status="failed" if failed else "partial" if missing else "ok",
        unfinished=[] if failed else missing,
        created=datetime.now(UTC).replace(microsecond=0),
        duration_s=round(duration_s, 1),
        verdict=Verdict(
            accuracy=found.overall.verdict if found and whole else None,
            margin=margin,
            sentence=sentence,
            speed=words.speed_sentence(ratios),
        ),
        systems=systems,
        workload=work,
        accuracy=found,
        fidelity=drift,
        speed=points,
        speed_ratios=ratios,
        failures=[
            Failed(role=role, phase=phase, kind=failure.kind, message=failure.message, count=count)
            for (role, phase, failure), count in measured.failures.most_common()
        ],
        warnings=notes,
        environment=Environment(
            platform=environment.system_name(),
            cpu=environment.cpu_name(),
            gpus=environment.gpu_names(),
            versions=environment.versions(),
            commit=environment.commit(),
            command=command,
        ),
        definitions={
            **speed.DEFINITIONS,
            **accuracy.DEFINITIONS,
            **(fidelity.DEFINITIONS if drift else {}),
            "disk": resources.DISK_DEFINITION,
            "host_memory": resources.HOST_DEFINITION,
            "gpu_memory": resources.GPU_DEFINITION,
        },
    )
    if failed:
        sentence = words.failure_sentence(report)
        report = report.model_copy(update={"verdict": Verdict(accuracy=None, margin=margin, sentence=sentence)})
    return report


def _missing(measured: Measurements, questions: Sequence[Question], items: Sequence[Item], plan: Plan) -> list[str]:
    """What of the plan was not measured, a line each."""
    missing = []
    for role in ROLES:
        open_ = len(questions) - len(measured.answers.get(role, {}))
        if open_:
            missing.append(f"{open_} of {len(questions)} questions to the {role}")
        if items and role not in measured.observed:
            missing.append(f"fidelity of the {role}")
        rounds = sum((role, unit, r) not in measured.units for r in range(plan.rounds) for unit in plan.units)
        if rounds:
            missing.append(f"{rounds} of {plan.rounds * len(plan.units)} blocks of load on the {role}")
    return missing


def _cut(found: Accuracy, work: Workload) -> list[str]:
    return [
        f"{cut} of the {role}'s answers were cut at {work.answer_tokens} tokens; raise --answer-tokens"
        for role, cut in found.cut_answers.items()
        if cut
    ]
