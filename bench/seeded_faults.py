"""Does the benchmark find faults that are known to be there? The embedded model, quantized well and with faults, each
against fp16: accuracy on thousands of held-out questions, and fidelity, through the real server.

    python -m bench.seeded_faults --work out/seeded --out docs/results/seeded-faults --per-task 500

Answers are kept in WORK as they come, so that a run that is stopped goes on where it was; ``--system NAME`` asks one
system and writes no report. The faults are `toolkit.faults`' and one found in the wild: AutoAWQ's duo scaling on a CPU,
which spoils the weights while it searches (docs/awq-on-cpu.md); this toolkit's mend is taken out for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pickle
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import environment, fidelity, tasks
from bench.boot import free_ports
from bench.client import ChatRequest, Trace, ask
from bench.endpoint import Endpoint, discover, http_client
from bench.load import closed_loop
from bench.observe import Observed, items_from_questions, observe
from bench.report import words
from bench.report.accuracy import Pair, rows
from bench.report.model import TaskAccuracy
from bench.tasks import Question
from toolkit.demo import checkpoint_dir, write_tasks
from toolkit.errors import BenchError, QvlError
from toolkit.faults import perturb_scales, round_linears, unfold
from toolkit.quantize import quantize

__all__ = ["SYSTEMS", "Found", "System", "make", "table"]

ANSWER_TOKENS = 40
CONCURRENCY = 8
#: Questions between two saves.
CHUNK = 160
FP16 = "fp16"
#: Scales of this layer of the embedded model's five are perturbed: the one in the middle.
FAULTY_LAYER = 2


@dataclass(frozen=True, slots=True)
class System:
    """What is compared with fp16.

    Attributes:
        name: of its directory in WORK.
        about: how it was made.
        faulty: whether it has a fault.
        made: writes it, given the sample count and the WORK directory.
    """

    name: str
    about: str
    faulty: bool
    made: Callable[[Path, int], object]


def _quantized(name: str, **settings: Any) -> Callable[[Path, int], object]:
    return lambda work, samples: quantize("demo", work / name, samples=samples, force=True, **settings)


def _as_autoawq_does(work: Path, samples: int) -> object:
    """AutoAWQ's search with duo scaling, and without the copies of the weights that this toolkit makes it restore."""
    from toolkit.quantize import quantizer

    with patch.object(quantizer, "_copied_state", contextlib.nullcontext):
        return _quantized("autoawq-duo-cpu", search="autoawq", rounding="nearest", scaling="duo")(work, samples)


SYSTEMS = (
    System(
        "rtn",
        "rounded to nearest",
        False,
        lambda work, _: round_linears(work / "ours", work / "rtn", checkpoint_dir(), force=True),
    ),
    System("autoawq", "AutoAWQ's search, plain", False, _quantized("autoawq", search="autoawq", rounding="nearest")),
    System(
        "autoawq-duo",
        "AutoAWQ's search, duo, weights copied",
        False,
        _quantized("autoawq-duo", search="autoawq", rounding="nearest", scaling="duo"),
    ),
    System("ours", "second moments, compensated", False, _quantized("ours")),
    System(
        "scales",
        f"ours, layer {FAULTY_LAYER}'s scales off by 5%",
        True,
        lambda work, _: perturb_scales(work / "ours", work / "scales", FAULTY_LAYER, 0.05, force=True),
    ),
    System(
        "unfolded",
        "AutoAWQ's plain, the most scaled layer's norms not divided",
        True,
        lambda work, _: unfold(work / "autoawq", work / "unfolded", checkpoint_dir(), force=True),
    ),
    System("autoawq-duo-cpu", "AutoAWQ's search, duo, as it is on a CPU", True, _as_autoawq_does),
)


def make(work: Path, samples: int) -> None:
    """Write every checkpoint that is not in ``work`` yet; those that others are made of come first."""
    order = ["ours", "autoawq", *(system.name for system in SYSTEMS)]
    for name in dict.fromkeys(order):
        if not (work / name).exists():
            next(system for system in SYSTEMS if system.name == name).made(work, samples)


# --- asking -----------------------------------------------------------------------------------------------------------


def _questions(work: Path, per_task: int) -> list[Question]:
    directory = work / f"questions-{per_task}"
    file = directory / "tasks.jsonl"
    return tasks.load_questions(file if file.exists() else write_tasks(directory, per_task=per_task))


async def _answer(endpoint: Endpoint, questions: Sequence[Question], file: Path) -> None:
    """Ask what ``file`` holds no answer to, a chunk at a time. Raises BenchError when a request fails."""
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    left = [question for question in questions if question.id not in known]
    async with http_client(endpoint.url, connections=CONCURRENCY) as http:

        async def send(question: Question, due: float) -> Trace:
            pictures = tuple(picture.data_url() for picture in question.pictures)
            request = ChatRequest(question.question, pictures, ANSWER_TOKENS)
            trace = await ask(http, request.body(endpoint.model), timeout_s=300.0, scheduled=due)
            if trace.failure:
                raise BenchError(f"{question.id}: {trace.failure.kind}: {trace.failure.message}")
            known[question.id] = trace.text
            return trace

        for start in range(0, len(left), CHUNK):
            await closed_loop(send, left[start : start + CHUNK], CONCURRENCY)
            file.write_text(json.dumps(known, indent=0))
            print(f"{file.stem}: {len(known)} of {len(questions)} questions", file=sys.stderr, flush=True)


async def _drift(endpoint: Endpoint, questions: Sequence[Question], file: Path, reference: Path | None) -> None:
    """Observe the server on ``questions``, unless ``file`` is there."""
    if file.exists():
        return
    before: Observed | None = pickle.loads(reference.read_bytes()) if reference else None
    found = await observe(
        endpoint, items_from_questions(questions), reference=before, max_tokens=ANSWER_TOKENS, concurrency=CONCURRENCY
    )
    file.write_bytes(pickle.dumps(found))


def _few(questions: Sequence[Question], per_task: int) -> list[Question]:
    """The first so many of each task."""
    counts: dict[str, int] = {}
    chosen = []
    for question in questions:
        counts[question.task] = counts.get(question.task, 0) + 1
        if counts[question.task] <= per_task:
            chosen.append(question)
    return chosen


def ask_system(work: Path, name: str, questions: Sequence[Question], read_per_task: int) -> None:
    """Serve a system and take down what it answers; fp16, which the others are held against, also a second time."""
    from serve import lifecycle
    from serve.options import ServeOptions

    answers, drift = work / f"{name}.json", work / f"{name}.drift"
    reference = None if name == FP16 else work / f"{FP16}.drift"
    asked = len(json.loads(answers.read_text())) if answers.exists() else 0
    if asked == len(questions) and drift.exists():
        return
    model = "demo" if name == FP16 else str(work / name)
    few = _few(questions, read_per_task)
    with lifecycle.start(model, ServeOptions(port=free_ports(1)[0], timeout=400.0), attached=True) as server:
        endpoint = asyncio.run(discover(server.url))
        asyncio.run(_drift(endpoint, few, drift, reference))
        if name == FP16:
            asyncio.run(_drift(endpoint, few, work / f"{FP16}-again.drift", drift))
        asyncio.run(_answer(endpoint, questions, answers))


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a system."""

    system: System
    overall: TaskAccuracy
    tasks: list[TaskAccuracy]
    drift: fidelity.Drift


def _find(work: Path, system: System, questions: Sequence[Question], read_per_task: int, margin: float) -> Found:
    before, after = (json.loads((work / f"{name}.json").read_text()) for name in (FP16, system.name))
    pairs = [
        Pair(
            task=question.task,
            metric=question.metric,
            cluster=question.cluster_id,
            before=tasks.score(question, before[question.id]),
            after=tasks.score(question, after[question.id]),
        )
        for question in questions
    ]
    overall, by_task = rows(pairs, seed=0, margin=margin)
    items = items_from_questions(_few(questions, read_per_task))
    base, other = (pickle.loads((work / f"{name}.drift").read_bytes()) for name in (FP16, system.name))
    return Found(system, overall, by_task, fidelity.compare(items, base, other, top_k=20).candidate)


def table(found: Sequence[Found], noise: fidelity.Drift | None) -> str:
    """Return the table in markdown."""
    lines = [
        "| | fault | accuracy | difference, points (95%) | lost/won | verdict | mean KL, nats (95%) | p99 KL | same |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    if found:
        base = found[0].overall.baseline
        kl = f"{noise.mean_kl.value:.1e}" if noise and noise.mean_kl else "–"
        p99 = f"{noise.p99_kl.value:.1e}" if noise and noise.p99_kl else "–"
        same = words.percent(noise.identical.value) if noise and noise.identical else "–"
        lines.append(f"| fp16, and asked again | | {words.percent(base.value)} | | | | {kl} | {p99} | {same} |")
    for one in found:
        row, drift = one.overall, one.drift
        d = row.difference
        verdict = f"**{row.verdict}**"
        if row.items_needed:
            verdict += f", {words.questions(row.items_needed)} questions would tell"
        worse = [task.task for task in one.tasks if task.verdict == "worse"]
        if worse and row.verdict != "worse":
            verdict += f"; worse in {', '.join(worse)}"
        kl = f"{drift.mean_kl.value:.5f} ({drift.mean_kl.low:.5f}–{drift.mean_kl.high:.5f})" if drift.mean_kl else "–"
        lines.append(
            f"| {one.system.about} | {'yes' if one.system.faulty else ''} | {words.percent(row.candidate.value)} "
            f"| {words.points(d.value)} ({words.interval(d)}) | {d.lost}/{d.won} | {verdict} | {kl} "
            f"| {f'{drift.p99_kl.value:.4f}' if drift.p99_kl else '–'} "
            f"| {words.percent(drift.identical.value) if drift.identical else '–'} |"
        )
    return "\n".join(lines)


def _interval(value: Any) -> dict[str, float] | None:
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}


def _data(found: Found) -> dict[str, Any]:
    drift = found.drift
    return {
        "name": found.system.name,
        "made": found.system.about,
        "faulty": found.system.faulty,
        "accuracy": found.overall.model_dump(),
        "tasks": [task.model_dump() for task in found.tasks],
        "fidelity": {
            "tokens": drift.tokens,
            **{name: _interval(getattr(drift, name)) for name in ("mean_kl", "p99_kl", "top1_agreement", "identical")},
            "perplexity_ratio": _interval(drift.perplexity_ratio),
        },
    }


def _report(work: Path, out: Path, questions: Sequence[Question], given: argparse.Namespace) -> str:
    found = [_find(work, system, questions, given.read_per_task, given.margin / 100.0) for system in SYSTEMS]
    items = items_from_questions(_few(questions, given.read_per_task))
    base, again = (pickle.loads((work / f"{FP16}{end}.drift").read_bytes()) for end in ("", "-again"))
    noise = fidelity.compare(items, base, again, top_k=20).candidate
    command = shlex.join(["python", "-m", "bench.seeded_faults", *sys.argv[1:]])
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": environment.cpu_name(),
        "platform": environment.system_name(),
        "versions": environment.versions(),
        "questions": len(questions),
        "questions_sha256": tasks.digest(questions),
        "read": len(items),
        "calibration_samples": given.samples,
        "margin": given.margin / 100.0,
        "noise": {"mean_kl": _interval(noise.mean_kl), "identical": _interval(noise.identical)},
        "systems": [_data(one) for one in found],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    shown = table(found, noise)
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions().items())
    (out / "table.md").write_text(
        f"{shown}\n\n{len(questions):,} held-out questions, {found[0].overall.clusters:,} pictures; fidelity on "
        f"{len(items)} of them, {found[0].drift.tokens:,} tokens of fp16's answers. Verdicts against a margin of "
        f"{words.limit(given.margin / 100.0)}. {environment.cpu_name()}; {versions}; {facts['created'][:10]}.\n\n"
        f"    {command}\n"
    )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m bench.seeded_faults``."""
    parser = argparse.ArgumentParser(prog="python -m bench.seeded_faults", description=(__doc__ or "").split("\n")[0])
    names = [FP16, *(system.name for system in SYSTEMS)]
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qvl-seeded", help="kept files")
    parser.add_argument("--out", type=Path, default=Path("docs/results/seeded-faults"), help="table.md, results.json")
    parser.add_argument("--per-task", type=int, default=500, help="questions of each of the eight tasks")
    parser.add_argument("--read-per-task", type=int, default=50, help="of them, those fidelity is measured on")
    parser.add_argument("--samples", type=int, default=48, help="calibration chats")
    parser.add_argument("--margin", type=float, default=1.0, help="loss, in points, that would not matter")
    parser.add_argument("--system", choices=names, help="ask this one and write no report (fp16 comes first)")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        make(given.work, given.samples)
        questions = _questions(given.work, given.per_task)
        for name in [given.system] if given.system else names:
            ask_system(given.work, name, questions, given.read_per_task)
        if given.system is None:
            print(_report(given.work, given.out, questions, given))
    except QvlError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
