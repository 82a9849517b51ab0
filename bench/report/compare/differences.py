"""What differs between two reports beside their figures: why they can't be compared, and what a reader should know."""

from __future__ import annotations

from typing import Any

from bench.report.compare.changes import relative, same_baseline
from bench.report.compare.figures import DRIFT, Figure, Metric, Side, figures
from bench.report.schema import Report

__all__ = ["differences", "incomparable", "notes"]

#: Of the workload, what decides about answers; and what may differ without making figures incomparable: how much was
#: measured, how long was waited, how it was called. Everything else decides about speed.
ASKED = ("questions_sha256", "answer_tokens", "scoring")
HARMLESS = (
    "tasks_source",
    "questions",
    "question_concurrency",
    "concurrencies",
    "requests",
    "rates",
    "traffic",
    "replays",
    "sweep",
    "sweep_concurrency",
    "rounds",
    "duration_s",
    "preset",
    "price",
    "slos",
    "timeout_s",
    "seed",
)


def differences(a: Report, b: Report) -> tuple[list[str], list[str]]:
    """Return why two reports can't be compared: what differs in the questions; in the load and the machine."""
    questions, others = [], []
    one, two = a.workload.model_dump(), b.workload.model_dump()
    if a.accuracy and b.accuracy:
        if a.workload.questions_sha256 != b.workload.questions_sha256:
            questions.append(f"other questions ({a.workload.questions} and {b.workload.questions})")
        if a.workload.answer_tokens != b.workload.answer_tokens:
            questions.append(f"answers of up to {a.workload.answer_tokens} and {b.workload.answer_tokens} tokens")
        if a.workload.scoring != b.workload.scoring:
            questions.append(f"scored by the rules of {a.workload.scoring} and of {b.workload.scoring}")
    if a.speed and b.speed:
        if one["traffic_sha256"] != two["traffic_sha256"]:
            others.append(f"requests {_source(a)} and {_source(b)}")
        # What one of them does not say (an older schema) is not known to differ; `notes` names it.
        others += [
            f"{_words(key)} {_shown(one[key])} and {_shown(two[key])}"
            for key in one
            if key not in (*ASKED, *HARMLESS, "traffic_sha256")
            and one[key] != two[key]
            and None not in (one[key], two[key])
        ]
    machines = [[*map(_hardware, report.environment.gpus), report.environment.cpu] for report in (a, b)]
    if machines[0] != machines[1]:
        others.append(f"measured on {'; '.join(machines[0])} and on {'; '.join(machines[1])}")
    return questions, others


def _source(report: Report) -> str:
    """Where the requests of a report's load are from."""
    work = report.workload
    return f"from {work.traffic} ({work.traffic_sha256[:8]})" if work.traffic else "that were made"


def incomparable(a: Report, b: Report) -> tuple[str, ...]:
    """Return the metrics that are defined by what differs between the reports."""
    names: tuple[str, ...] = () if a.workload.slos == b.workload.slos else ("goodput_per_s",)
    if a.fidelity and b.fidelity:
        one, two = ((f.items_sha256, f.top_k, f.answer_tokens) for f in (a.fidelity, b.fidelity))
        if one != two or not same_baseline(a, b):
            names += DRIFT
    return names


def _hardware(gpu: str) -> str:
    """A GPU's name and memory, without its driver, which is software."""
    return ", ".join(gpu.split(", ")[:2])


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{_words(key)} {_shown(part)}" for key, part in value.items())
    return str(value)


def notes(a: Side, b: Side, before: dict[Metric, Figure], after: dict[Metric, Figure]) -> list[str]:
    """Return what else a reader of a comparison should know, a line each.

    Args:
        before: the figures of A.
        after: the figures of B.
    """
    drift = _drift(a, b)
    return [
        *(line for side in (a, b) for line in _left_out(side)),
        *_environments(a, b),
        *_measured(a, b, before, after),
        *([drift] if drift else []),
    ]


def _left_out(side: Side) -> list[str]:
    """What a report lacks of the side's figures."""
    found = []
    if side.report.status == "partial":
        missing = f" ({'; '.join(side.report.unfinished)})" if side.report.unfinished else ""
        found.append(f"the report of {side.label} is partial: it holds what was measured until then{missing}")
    invalid = [p.load.name for p in side.report.speed if p.role == side.role and p.invalid]
    if invalid:
        found.append(f"left out, for they measured the client: {side.label}, {', '.join(invalid)}")
    return found


def _environments(a: Side, b: Side) -> list[str]:
    """What was asked without saying so, other software, arguments and drivers."""
    found = []
    one, two = a.report.workload.model_dump(), b.report.workload.model_dump()
    if a.report.speed and b.report.speed:
        unknown = [key for key in one if (one[key] is None) != (two[key] is None) and key not in (*ASKED, *HARMLESS)]
        if unknown:
            found.append(f"one of the reports does not say: {', '.join(map(_words, unknown))}")
    for what, old, new in (
        ("versions", a.report.environment.versions, b.report.environment.versions),
        ("systems", {"platform": a.report.environment.platform}, {"platform": b.report.environment.platform}),
    ):
        changed = [f"{name} {old[name]} and {new[name]}" for name in old if name in new and old[name] != new[name]]
        if changed:
            found.append(f"other {what}: {'; '.join(changed)}")
    commits = [side.report.environment.commit for side in (a, b)]
    if commits[0] != commits[1]:
        found.append(f"measured by other commits of qvl: {commits[0] or 'unknown'} and {commits[1] or 'unknown'}")
    if "mean_kl" in incomparable(a.report, b.report):
        found.append("fidelity is not compared: other prompts, settings or baselines")
    arguments = [" ".join(side.report.systems[side.role].serve_arguments) or "none" for side in (a, b)]
    if arguments[0] != arguments[1]:
        found.append(f"other arguments of the server: {arguments[0]}; {arguments[1]}")
    drivers = [[gpu.split(", ")[-1] for gpu in side.report.environment.gpus] for side in (a, b)]
    if drivers[0] != drivers[1] and all(drivers):
        found.append(f"other GPU drivers: {', '.join(drivers[0])} and {', '.join(drivers[1])}")
    return found


def _measured(a: Side, b: Side, before: dict[Metric, Figure], after: dict[Metric, Figure]) -> list[str]:
    """What was measured for one of them alone."""
    found = []
    for only, rest, name in ((before, after, a.label), (after, before, b.label)):
        points = sorted({m.at for m in only if m.at is not None} - {m.at for m in rest if m.at is not None})
        if points:
            found.append(f"measured for {name} alone: {', '.join(points)}")
    if (a.report.accuracy is None) != (b.report.accuracy is None):
        found.append(f"accuracy was measured for {(a if a.report.accuracy else b).label} alone")
    return found


def _drift(a: Side, b: Side) -> str | None:
    """How far the same baseline moved between two reports: what the machine did, not the candidate."""
    if (a.role, b.role) != ("candidate", "candidate") or not same_baseline(a.report, b.report):
        return None
    before, after = figures(Side(a.report, "baseline")), figures(Side(b.report, "baseline"))
    moved = {
        metric: relative(before[metric].value, after[metric].value)
        for metric in before
        if metric in after and metric.name in ("ttft_p50", "tpot_p50", "output_tokens_per_s")
    }
    if not moved:
        return None
    worst = max(moved, key=lambda metric: abs(moved[metric]))
    if abs(moved[worst]) < 0.02:
        return None
    return (
        f"the baseline, the same in both, moved by itself: {worst} by {100 * moved[worst]:+.1f}%; changes of speed are "
        "told against it, and figures of the two reports side by side hold the machine's change too"
    )
