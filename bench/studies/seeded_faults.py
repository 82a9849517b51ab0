"""Are faults that are known to be there found? The embedded model, quantized well and with faults, each against fp16:
accuracy on thousands of held-out questions and drift from fp16, judged by what judges reports (`bench.judge.verdict`).

    python -m bench.studies seeded-faults --work out/seeded --out docs/results/seeded-faults --per-task 500

No server: weights are read back to float32 and each right answer goes through the model once. A question counts as
right when every token of the right answer, its end included, is the likeliest after those before it, which is when
greedy decoding gives that answer. KL divergence is over the whole vocabulary, on the same tokens.

What was found of each system is kept in WORK, so that a run that is stopped goes on; ``--system NAME`` does one and
writes no report. The faults are `bench.studies.faulty_checkpoints`' and one found in the wild: AutoAWQ's duo scaling
on a CPU, which
spoils the weights while it searches (docs/awq-on-cpu.md); this toolkit's mend is taken out for it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.judge import stats
from bench.judge.stats import Interval
from bench.machine import environment
from bench.questions import tasks
from bench.questions.tasks import Question
from bench.report import words
from bench.report.accuracy import Pair, rows
from bench.report.schema import TaskAccuracy
from bench.studies.faulty_checkpoints import perturb_scales, round_linears, unfold
from bench.studies.settings import SeededFaultsSettings
from toolkit.errors import BenchError, QvlError
from toolkit.paths import demo_checkpoint
from toolkit.quantize import quantize
from toolkit.tasks.manifests import write_tasks

__all__ = ["SYSTEMS", "Found", "Read", "System", "make", "read", "run", "table"]

FP16 = "fp16"
#: Scales of this layer of the embedded model's five are perturbed: the one in the middle.
FAULTY_LAYER = 2


@dataclass(frozen=True, slots=True)
class System:
    """What is compared with fp16.

    Attributes:
        name: of its directory in WORK.
        about: how it was made.
        sound: name of what it would be without its fault; None for what has none.
        made: writes it, given the WORK directory and the number of calibration chats.
    """

    name: str
    about: str
    sound: str | None
    made: Callable[[Path, int], object]


def _quantized(name: str, **settings: Any) -> Callable[[Path, int], object]:
    return lambda work, samples: quantize("demo", work / name, samples=samples, force=True, **settings)


def _as_autoawq_does(work: Path, samples: int) -> object:
    """AutoAWQ's search with duo scaling, and without the copies of the weights that this toolkit makes it restore."""
    from toolkit.quantize.search import autoawq as quantizer

    with patch.object(quantizer, "_copied_state", contextlib.nullcontext):
        return _quantized("autoawq-duo-cpu", search="autoawq", rounding="nearest", scaling="duo")(work, samples)


SYSTEMS = (
    System(
        "rtn",
        "rounded to nearest",
        None,
        lambda work, _: round_linears(work / "ours", work / "rtn", demo_checkpoint(), force=True),
    ),
    System("autoawq", "AutoAWQ's search, plain", None, _quantized("autoawq", search="autoawq", rounding="nearest")),
    System(
        "autoawq-duo",
        "AutoAWQ's search, duo, weights copied",
        None,
        _quantized("autoawq-duo", search="autoawq", rounding="nearest", scaling="duo"),
    ),
    System("ours", "second moments, compensated", None, _quantized("ours")),
    System(
        "scales",
        f"ours, layer {FAULTY_LAYER}'s scales off by 5%",
        "ours",
        lambda work, _: perturb_scales(work / "ours", work / "scales", FAULTY_LAYER, 0.05, force=True),
    ),
    System(
        "unfolded",
        "AutoAWQ's plain, the most scaled layer's norms not divided",
        "autoawq",
        lambda work, _: unfold(work / "autoawq", work / "unfolded", demo_checkpoint(), force=True),
    ),
    System("autoawq-duo-cpu", "AutoAWQ's search, duo, as it is on a CPU", "autoawq-duo", _as_autoawq_does),
)


def make(work: Path, samples: int) -> None:
    """Write every checkpoint that is not in ``work`` yet; those that others are made of come first."""
    order = ["ours", "autoawq", *(system.name for system in SYSTEMS)]
    for name in dict.fromkeys(order):
        if not (work / name).exists():
            next(system for system in SYSTEMS if system.name == name).made(work, samples)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """What a system makes of the right answers, by question.

    Attributes:
        right: whether greedy decoding gives the answer.
        kl: KL divergence from fp16 summed over the answer's tokens, nats.
        tokens: of the answer, its end included.
        same: whether its likeliest tokens are fp16's.
    """

    right: list[bool]
    kl: list[float]
    tokens: list[int]
    same: list[bool]


def _questions(work: Path, per_task: int) -> list[Question]:
    directory = work / f"questions-{per_task}"
    file = directory / "tasks.jsonl"
    return tasks.load_questions(file if file.exists() else write_tasks(directory, per_task=per_task))


@lru_cache(maxsize=1)
def _chats(per_task: int) -> tuple[list[Any], list[int], int]:
    """The questions with their right answers as model inputs; the ids that open an answer, and the one that ends it."""
    from toolkit.compat import patch_torchvision
    from toolkit.demo.fidelity import held_out_chats

    patch_torchvision()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_checkpoint())
    opening = processor.tokenizer.encode("<|im_start|>assistant\n")
    return held_out_chats(processor, per_task), opening, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def _logits(path: Path | None, per_task: int, seen: Path) -> tuple[Any, Any]:
    """Log-probabilities [tokens, vocabulary] of each right answer and its token ids [tokens].

    Args:
        path: a checkpoint; None is fp16, and writes what the vision tower makes of the images to ``seen``. AWQ leaves
            the tower in fp16, so the others read it from there.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from toolkit.demo.fidelity import answer_logits, load

    chats, opening, end = _chats(per_task)
    model = load(path)
    tower = model.model.visual
    images = iter(torch.load(seen, weights_only=False) if path else ())
    embeddings: list[Any] = []
    look = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        known = next(images, None)
        if known is None:
            made = look(*args, **kwargs)
            embeddings.append(made.pooler_output)
            return made
        return BaseModelOutputWithPooling(pooler_output=known)

    tower.forward = forward
    found = answer_logits(model, chats, opening, end)
    if path is None:
        torch.save(embeddings, seen)
    ids = []
    for chat, logits in zip(chats, found, strict=True):
        whole = chat.inputs["input_ids"][0]
        stop = int((whole == end).nonzero()[-1]) + 1  # the answer's end is the chat's last
        ids.append(whole[stop - len(logits) : stop])
    return found, ids


def read(work: Path, name: str, per_task: int) -> Read:
    """Return what ``name`` makes of the answers, from WORK if it is there."""
    import torch

    file = work / f"{name}-{per_task}.json"
    if file.exists():
        return Read(**json.loads(file.read_text()))
    kept, seen = work / f"{FP16}-{per_task}.pt", work / f"images-{per_task}.pt"
    if not kept.exists():
        torch.save(_logits(None, per_task, seen), kept)
    reference, ids = torch.load(kept)
    logits = reference if name == FP16 else _logits(work / name, per_task, seen)[0]
    found = Read(
        right=[bool((x.argmax(-1) == answer).all()) for x, answer in zip(logits, ids, strict=True)],
        kl=[float((r.exp() * (r - x)).sum()) for r, x in zip(reference, logits, strict=True)],
        tokens=[len(x) for x in logits],
        same=[bool((r.argmax(-1) == x.argmax(-1)).all()) for r, x in zip(reference, logits, strict=True)],
    )
    file.write_text(json.dumps(asdict(found)))
    return found


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a system.

    Attributes:
        overall: accuracy beside fp16's; `tasks` likewise.
        kl: mean divergence from fp16, nats a token, bootstrap over questions.
        same: share of answers whose tokens are all fp16's.
        kl_ratio: divergence / that of the system without the fault, paired by question; None for what has none.
    """

    system: System
    overall: TaskAccuracy
    tasks: list[TaskAccuracy]
    kl: Interval
    same: float
    kl_ratio: Interval | None


def _ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Mean / mean of values of the same questions, with a bootstrap interval."""
    mean = sum(below) / len(below)
    found = stats.ratio_of_means([x / mean for x in above], [x / mean for x in below], seed=0)
    assert found is not None  # given 10 questions
    return found


def judge(
    system: System, questions: Sequence[Question], fp16: Read, other: Read, sound: Read | None, margin: float
) -> Found:
    """Judge a system as a report does.

    Args:
        sound: of `System.sound`.
    """
    pairs = [
        Pair(question.task, question.metric, question.cluster_id, float(before), float(after))
        for question, before, after in zip(questions, fp16.right, other.right, strict=True)
    ]
    overall, by_task = rows(pairs, seed=0, margin=margin)
    per_token = _ratio(other.kl, [float(count) for count in other.tokens])
    return Found(
        system=system,
        overall=overall,
        tasks=by_task,
        kl=per_token,
        same=sum(other.same) / len(other.same),
        kl_ratio=_ratio(other.kl, sound.kl) if sound else None,
    )


def table(found: Sequence[Found]) -> str:
    """Return the table in markdown."""
    lines = [
        "| | fault | accuracy | difference, points (95%) | lost/won | verdict | KL (95%) | KL / sound one's (95%) |",
        "|---|---|---:|---:|---:|---|---:|---:|",
        f"| fp16 | | {words.percent(found[0].overall.baseline.value)} | | | | | |",
    ]
    for one in found:
        row = one.overall
        d = row.difference
        verdict = f"**{row.verdict}**"
        if row.items_needed:
            verdict += f", {words.questions(row.items_needed)} questions would tell"
        worse = [task.task for task in one.tasks if task.verdict == "worse"]
        if worse and row.verdict != "worse":
            verdict += f"; worse in {', '.join(worse)}"
        r = one.kl_ratio
        ratio = f"{words.number(r.value)} ({words.number(r.low)}–{words.number(r.high)})" if r else ""
        lines.append(
            f"| {one.system.about} | {'yes' if one.system.sound else ''} | {words.percent(row.candidate.value)} "
            f"| {words.points(d.value)} ({words.interval(d)}) | {d.lost}/{d.won} | {verdict} "
            f"| {one.kl.value:.5f} ({one.kl.low:.5f}–{one.kl.high:.5f}) | {ratio} |"
        )
    return "\n".join(lines)


def _report(settings: SeededFaultsSettings) -> str:
    work, out = settings.work, settings.out
    margin = settings.margin / 100.0
    questions = _questions(work, settings.per_task)
    fp16 = read(work, FP16, settings.per_task)
    known = {system.name: read(work, system.name, settings.per_task) for system in SYSTEMS}
    found = [
        judge(system, questions, fp16, known[system.name], known[system.sound] if system.sound else None, margin)
        for system in SYSTEMS
    ]
    command = shlex.join(["python", "-m", "bench.studies", *sys.argv[1:]])
    created = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {
        "created": created,
        "command": command,
        "device": environment.cpu_name(),
        "platform": environment.system_name(),
        "versions": environment.versions(),
        "questions": len(questions),
        "questions_sha256": tasks.digest(questions),
        "answer_tokens": sum(fp16.tokens),
        "calibration_samples": settings.samples,
        "margin": margin,
        "systems": [
            {
                "name": one.system.name,
                "made": one.system.about,
                "faulty": one.system.sound is not None,
                "accuracy": one.overall.model_dump(),
                "tasks": [task.model_dump() for task in one.tasks],
                "mean_kl": asdict(one.kl),
                "mean_kl_ratio_to_the_sound_one": asdict(one.kl_ratio) if one.kl_ratio else None,
                "same_answers": one.same,
            }
            for one in found
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions().items())
    shown = table(found)
    (out / "table.md").write_text(
        f"{shown}\n\n{len(questions):,} held-out questions, {sum(fp16.tokens):,} tokens of right answers, "
        f"{settings.samples} calibration chats; verdicts against a margin of {words.limit(margin)}; KL: mean "
        f"divergence from fp16, nats a token. {environment.cpu_name()}; {versions}; {created[:10]}.\n\n    {command}\n"
    )
    return shown


def run(settings: SeededFaultsSettings) -> None:
    """Make, read and judge every system and write the report, or read one alone. Exits with 1 where one can't be made.

    Raises:
        BenchError: no such system.
    """
    names = [FP16, *(system.name for system in SYSTEMS)]
    if settings.system is not None and settings.system not in names:
        raise BenchError(f"--system: {settings.system!r} is none of {', '.join(names)}")
    settings.work.mkdir(parents=True, exist_ok=True)
    try:
        make(settings.work, settings.samples)
        for name in [settings.system] if settings.system else names:
            read(settings.work, name, settings.per_task)
            print(f"{name}: read", file=sys.stderr, flush=True)
        if settings.system is None:
            print(_report(settings))
    except QvlError as error:
        sys.exit(str(error))
