"""Turns what a run came to into a `Report`: scores, statistics, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from bench.load.traffic import Traffic
from bench.load.workload import written
from bench.machine import environment, resources
from bench.questions import tasks
from bench.questions.tasks import Question
from bench.report import accuracy, fidelity, speed, words
from bench.report.schema import Accuracy, Environment, Failed, Fidelity, Report, Verdict, Workload
from bench.roles import ROLES, Role
from bench.run.config import BenchConfig
from bench.run.session import Outcome

__all__ = ["build", "workload"]


def workload(
    config: BenchConfig,
    questions: Sequence[Question] = (),
    *,
    source: str | None = None,
    traffic: Traffic | None = None,
    interleaved: bool = True,
) -> Workload:
    """Describe what is asked: the settings by their names, and what follows from them.

    Args:
        source: where the questions are from.
        traffic: what the load was made of, where that is the user's own.
        interleaved: whether the systems take turns.
    """
    turns = max(len(chat.turns) for chat in traffic.chats) if traffic else None
    same = {name: getattr(config, name) for name in BenchConfig.model_fields.keys() & Workload.model_fields.keys()}
    made = {
        "tasks_source": source,
        "questions": len(questions),
        "questions_sha256": tasks.digest(questions) if questions else None,
        "requests": [config.rounds * config.block_requests(each, turns) for each in config.concurrencies],
        "rates": sorted(config.rates),
        "replays": sorted(config.replays),
        "arrivals": config.arrivals if config.rates or config.sweep else None,
        "sweep": config.sweep_rates if config.sweep else 0,
        "sweep_concurrency": config.sweep_concurrency if config.sweep else None,
        "output_tokens": str(config.output_tokens),
        "prompt_tokens": str(config.prompt_tokens),
        "images_per_request": str(config.images_per_request),
        "image_sizes": [written(size) for size in config.image_sizes],
        "slos": [str(slo) for slo in config.slos],
        "interleaved": interleaved,
        "traffic": traffic.source if traffic else None,
        "traffic_sha256": traffic.digest if traffic else "",
    }
    if traffic:
        own = "as in the traffic"
        made |= {"prompt_tokens": own, "images_per_request": own, "image_sizes": [own], "preset": None}
        if traffic.tells_lengths:
            made["output_tokens"] = own
    return Workload.model_validate(same | made)


def build(outcome: Outcome, config: BenchConfig, *, command: str) -> Report:
    """Score and judge what was measured. When requests failed that must not, the report is ``failed`` and holds no
    figure; when the run was interrupted it is ``partial``: of the questions those that both systems answered are
    compared, and nothing is judged over all when some are missing.

    Args:
        command: the command line, as it is to be shown.
    """
    measured = outcome.measured
    failed = bool(measured.failures)
    work = workload(
        config,
        outcome.questions,
        source=outcome.questions_source,
        traffic=outcome.traffic,
        interleaved=outcome.interleaved,
    )
    missing = _missing(outcome, config) if outcome.interrupted else []
    found, whole, notes = (None, False, []) if failed else _accuracy(outcome, config)
    drift, doubts = (None, []) if failed else _fidelity(outcome, config)
    points = [] if failed else speed.points(measured, config)
    notes = [*outcome.warnings, *notes, *measured.notes, *doubts, *speed.doubts(points, measured, config)]
    if not work.interleaved and not failed:
        notes.append(
            "the systems ran one after the other, not in turns: what the machine did meanwhile is in the difference"
        )
    ratios = speed.ratios(measured, points, config)
    report = Report(
        status="failed" if failed else "partial" if missing else "ok",
        unfinished=[] if failed else missing,
        created=datetime.now(UTC).replace(microsecond=0),
        duration_s=round(outcome.duration_s, 1),
        verdict=Verdict(
            accuracy=found.overall.verdict if found and whole else None,
            margin=_margin(config),
            sentence=_sentence(outcome, config, found, missing),
            speed=words.speed_sentence(ratios),
        ),
        systems=outcome.systems,
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
        environment=_environment(command),
        definitions=_definitions(drift),
    )
    if not failed:
        return report
    verdict = Verdict(accuracy=None, margin=_margin(config), sentence=words.failure_sentence(report))
    return report.model_copy(update={"verdict": verdict})


def _margin(config: BenchConfig) -> float:
    """The loss of accuracy that would not matter, as a fraction of 1."""
    return config.margin / 100.0


def _accuracy(outcome: Outcome, config: BenchConfig) -> tuple[Accuracy | None, bool, list[str]]:
    """Compare the answers to the questions that both answered; say whether those are all, and what to know of them."""
    answers = outcome.measured.answers
    both = [q for q in outcome.questions if all(q.id in answers.get(role, {}) for role in ROLES)]
    if not both:
        return None, False, []
    found, doubts = accuracy.answers(both, answers, seed=config.seed, margin=_margin(config), by=config.scoring)
    return found, len(both) == len(outcome.questions), [*doubts, *_cut(found, config)]


def _fidelity(outcome: Outcome, config: BenchConfig) -> tuple[Fidelity | None, list[str]]:
    """Compare what both did with the items; say what to know of it."""
    observed = outcome.measured.observed
    if not outcome.items or not {"baseline", "candidate"} <= observed.keys():
        return None, []
    drift = fidelity.found(outcome.items, observed, config, source=outcome.items_source)
    return drift, fidelity.doubts(drift)


def _sentence(outcome: Outcome, config: BenchConfig, found: Accuracy | None, missing: Sequence[str]) -> str:
    """What a reader should take away."""
    labels: dict[Role, str] = {role: system.label for role, system in outcome.systems.items()}
    sentence = words.sentence(found, _margin(config), labels)
    return words.partial_sentence(missing, sentence if found else None) if missing else sentence


def _environment(command: str) -> Environment:
    return Environment(
        platform=environment.system_name(),
        cpu=environment.cpu_name(),
        gpus=environment.gpu_names(),
        versions=environment.versions(),
        commit=environment.commit(),
        command=command,
    )


def _definitions(drift: Fidelity | None) -> dict[str, str]:
    """What each figure of the report means."""
    return {
        **speed.DEFINITIONS,
        **accuracy.DEFINITIONS,
        **(fidelity.DEFINITIONS if drift else {}),
        "disk": resources.DISK_DEFINITION,
        "host_memory": resources.HOST_DEFINITION,
        "gpu_memory": resources.GPU_DEFINITION,
    }


def _missing(outcome: Outcome, config: BenchConfig) -> list[str]:
    """What was to be measured and was not, a line each."""
    measured, count = outcome.measured, len(outcome.questions)
    missing = []
    for role in ROLES:
        open_ = count - len(measured.answers.get(role, {}))
        if open_:
            missing.append(f"{open_} of {count} questions to the {role}")
        if outcome.items and role not in measured.observed:
            missing.append(f"fidelity of the {role}")
        rounds = sum((role, unit, r) not in measured.units for r in range(config.rounds) for unit in config.units)
        if rounds:
            missing.append(f"{rounds} of {config.rounds * len(config.units)} blocks of load on the {role}")
    return missing


def _cut(found: Accuracy, config: BenchConfig) -> list[str]:
    return [
        f"{cut} of the {role}'s answers were cut at {config.answer_tokens} tokens; raise --answer-tokens"
        for role, cut in found.cut_answers.items()
        if cut
    ]
