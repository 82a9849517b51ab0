"""Train the embedded model from nothing: eight minutes on an H100, days on a CPU, which is said before they pass.

:func:`main` (``qvl demo-model``) writes a checkpoint directory with the recipe and the curve (training.json), accuracy
through transformers (accuracy.json) and a model card beside the weights.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.console import note
from toolkit.console import out as stdout
from toolkit.demo.feed import Feed, FeedSettings
from toolkit.demo.record import TRAINING, read_record, write_record
from toolkit.errors import CheckpointError, QvlError, ResourceError
from toolkit.paths import demo_checkpoint
from toolkit.tasks.questions import PRACTICE, TASKS

if TYPE_CHECKING:
    from toolkit.demo.learn import Learner
    from toolkit.demo.quiz import Quiz, Score

__all__ = ["main"]

#: Seeds of held-out questions: asked while training (they steer how often a task is drawn) and after it.
TEST_SEED, FINAL_SEED = 777, 4242
#: training.json keeps at most so many points of the curve.
_CURVE_POINTS = 34


@dataclass(frozen=True, slots=True)
class _Plan:
    """What differs between a GPU, a CPU and a smoke test: batches (see ``FeedSettings``), exams, the log."""

    feed: FeedSettings
    quiz: int
    exam: int
    sizes: int
    evaluated: int
    log_every: int
    test_every: float
    max_steps: int | None = None
    tasks: tuple[str, ...] = (*TASKS, *PRACTICE)

    def make_quiz(self, per_task: int, seed: int) -> Quiz:
        """Draw held-out questions for the training code."""
        from toolkit.demo.quiz import make_quiz

        return make_quiz(per_task, seed, self.tasks, self.sizes)


def _plan(seed: int, device: str, smoke: bool) -> _Plan:
    cores = os.cpu_count() or 1
    if smoke:
        tiny = FeedSettings(seed, workers=1, slots=2, patches=1_200, most=12)
        return _Plan(tiny, 1, 1, sizes=1, evaluated=1, log_every=1, test_every=2, max_steps=3, tasks=TASKS)
    if device == "cpu":
        # An eighth of the batches: a whole one takes minutes and gigabytes here.
        small = FeedSettings(seed, workers=1, slots=4, patches=7_168, most=56)
        return _Plan(small, quiz=6, exam=10, sizes=2, evaluated=25, log_every=20, test_every=900)
    full = FeedSettings(seed, workers=max(1, cores - 2), slots=max(6, 3 * cores))
    return _Plan(full, quiz=96, exam=400, sizes=16, evaluated=200, log_every=200, test_every=60)


def main(out: Path, minutes: float, seed: int, device: str, *, smoke: bool = False) -> None:
    """Train for ``minutes`` of wall time, measure the result, and write a checkpoint directory into ``out``.

    ``device`` is ``cuda``, ``cpu`` or ``auto``. ``smoke`` takes a few tiny steps, to show that all parts run. The
    weights and ``curve.json`` appear in ``out`` while training goes on. Raises ``TrainingFailed``; ``ResourceError``
    where there is no such device; ``CheckpointError`` when ``out`` holds another model.
    """
    began = time.monotonic()

    def clock() -> float:
        return time.monotonic() - began

    if not (math.isfinite(minutes) and minutes > 0):
        raise QvlError(f"--minutes {minutes}: training needs a time above zero")
    if any(out.glob("*.safetensors")) and not ((out / TRAINING).exists() or (out / "curve.json").exists()):
        raise CheckpointError(f"{out} holds weights that this training did not write: choose another --out")
    device = _device(device)
    if device == "cpu" and not smoke:
        note(_shipped_time())
    plan = _plan(seed, device, smoke)
    out.mkdir(parents=True, exist_ok=True)
    feed = Feed(plan.feed)
    try:
        facts = _train(feed, plan, _Run(out, minutes * 60, seed, device, clock))
    finally:
        feed.close()
    write_record(out / TRAINING, facts)
    (out / "curve.json").unlink(missing_ok=True)  # training.json has it
    _finish(plan, out, device, clock)


@dataclass(frozen=True)
class _Run:
    out: Path
    seconds: float
    seed: int
    device: str
    #: Seconds since the command began.
    clock: Callable[[], float]


def _train(feed: Feed, plan: _Plan, run: _Run) -> dict[str, Any]:
    """Train, save, ask the final exam; return what training.json says."""
    import torch

    from toolkit.demo.learn import Learner, TrainingFailed
    from toolkit.demo.quiz import score

    learner = Learner(feed, run.out, run.device, run.seed)
    parameters = sum(p.numel() for p in learner.model.parameters())
    name = torch.cuda.get_device_name() if run.device == "cuda" else platform.processor() or platform.machine()
    note(f"[{run.clock():.0f} s] {parameters} parameters on {name}, {feed.settings.workers} processes draw")
    if run.device == "cpu" and plan.max_steps is None:
        learner.on_speed = lambda rate: note(_forecast(rate, run.seconds))
    learner.train(
        run.clock,
        run.seconds,
        plan.make_quiz(plan.quiz, TEST_SEED),
        max_steps=plan.max_steps,
        log_every=plan.log_every,
        test_every=plan.test_every,
    )
    if not learner.steps:
        raise TrainingFailed(f"no step was taken within {run.seconds:.0f} s: give it more --minutes")
    trained = run.clock()
    learner.save()
    feed.close()
    _reload(learner, run.out / "model.safetensors")
    note(f"[{run.clock():.0f} s] final exam: {plan.exam} questions of each task")
    final = score(learner.model, plan.make_quiz(plan.exam, FINAL_SEED))
    return _facts(learner, final, feed.settings, run.seed, name, trained)


def _finish(plan: _Plan, out: Path, device: str, clock: Callable[[], float]) -> None:
    """Make a checkpoint of the weights and measure it through transformers."""
    from toolkit.demo.evaluate import record_accuracy
    from toolkit.demo.export import export

    export(out / "model.safetensors", out)
    note(f"[{clock():.0f} s] the same through transformers: {plan.evaluated} questions of each task")
    facts = record_accuracy(out, plan.evaluated, device)
    for task, share in facts["accuracy"].items():
        note(f"  {task:<14}{share:7.1%}")
    note(f"[{clock():.0f} s] done")
    stdout.print(str(out), highlight=False, markup=False)


def _device(wanted: str) -> str:
    # Counting GPUs this way starts nothing on them, so the processes forked later are sound.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    there = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if there else "cpu"
    if wanted not in ("cuda", "cpu"):
        raise ResourceError(f"unknown device {wanted!r}: choose auto, cuda or cpu")
    if wanted == "cuda" and not there:
        raise ResourceError("no CUDA device here: use --device cpu (which takes days)")
    return wanted


def _shipped_time() -> str:
    record = read_record(demo_checkpoint() / TRAINING)
    return (
        f"the shipped model took {record['seconds'] / 60:.1f} minutes on {record['device']} and saw "
        f"{record['samples']:,} questions; what that would take on this CPU is said after a few steps"
    )


def _forecast(rate: float, seconds: float) -> str:
    """Say how long the shipped model's training would take at ``rate`` samples a second."""
    needed = int(read_record(demo_checkpoint() / TRAINING)["samples"])
    hours = needed / rate / 3600
    return (
        f"{rate:.1f} questions a second: as many as the shipped model saw would take {hours:.0f} hours here "
        f"(--minutes {hours * 60:.0f}); this run ends after {seconds / 60:g} minutes, "
        f"with about {100 * rate * seconds / needed:.2g}% of them"
    )


def _reload(learner: Learner, weights: Path) -> None:
    """Put the weights as saved (fp16) back into the model, so that what ships is what is tested."""
    from safetensors.torch import load_file

    state = {name: value.to(learner.device).float() for name, value in load_file(weights).items()}
    learner.model.load_state_dict(state)


def _facts(
    learner: Learner, final: Score, settings: FeedSettings, seed: int, device: str, seconds: float
) -> dict[str, Any]:
    import torch

    return {
        "accuracy": final.accuracy(),
        "questions": {task: asked for task, (_, asked) in final.right.items()},
        "device": device,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "steps": learner.steps,
        "samples": learner.samples,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "seeds": {"train": seed, "test_while_training": TEST_SEED, "final_test": FINAL_SEED},
        "rates": dataclasses.asdict(learner.rates),
        "batches": {"patches": settings.patches, "most": settings.most, "reused": learner.supply.reused},
        "graphs": {"shapes": learner.step.captured, "seconds": round(learner.step.capture_seconds, 1)},
        "tests": learner.tests,
        "curve": _thin(learner.curve),
    }


def _thin(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep evenly spaced points, the last among them, without the losses by task."""
    every = math.ceil(len(curve) / _CURVE_POINTS)
    kept = ("seconds", "step", "loss", "samples_per_second", "rate")
    return [{key: row[key] for key in kept} for row in curve[::-1][:: max(1, every)][::-1]]
