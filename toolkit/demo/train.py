"""Train the embedded model from nothing: minutes on one GPU, many hours on a CPU.

``python -m toolkit.demo.train --out DIR`` writes a checkpoint directory with ``training.json`` (recipe, curve,
held-out accuracy) beside the weights. The worker processes that draw pictures start before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.demo import checkpoint_dir
from toolkit.demo.feed import Feed, FeedSettings

if TYPE_CHECKING:
    from toolkit.demo.learn import Learner
    from toolkit.demo.quiz import Score

__all__ = ["main"]

#: Seeds of held-out questions: asked while training (they steer how often a task is drawn) and after it.
TEST_SEED, FINAL_SEED = 777, 4242


def main(
    out: Path,
    minutes: float,
    seed: int,
    device: str,
    *,
    smoke: bool = False,
    bare: bool = False,
    graphs: bool = True,
    started: float | None = None,
) -> None:
    """Train for ``minutes`` of wall time and write a checkpoint directory into ``out``.

    ``device`` is ``cuda``, ``cpu`` or ``auto``. ``smoke`` takes a few tiny steps to show that all parts run. ``bare``
    writes the weights and training.json only. ``graphs`` allows CUDA graphs. ``started`` (epoch seconds) is when the
    time began to count, now if left out. Raises ``TrainingFailed``, or ``ResourceError`` where there is no such device.
    """
    begin = time.time() if started is None else started

    def clock() -> float:
        return time.time() - begin

    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if device == "cuda" else str(os.cpu_count() or 1))
    cores = os.cpu_count() or 1
    small = FeedSettings(seed, workers=1, slots=2, patches=1_200, most=12)
    settings = small if smoke else FeedSettings(seed, workers=max(1, cores - 2), slots=max(6, 3 * cores))
    feed = Feed(settings)
    try:
        _run(feed, out, minutes * 60, seed, device, clock, smoke=smoke, bare=bare, graphs=graphs)
    finally:
        feed.close()


def _run(
    feed: Feed, out: Path, seconds: float, seed: int, device: str, clock: Any, *, smoke: bool, bare: bool, graphs: bool
) -> None:
    import torch

    from toolkit.demo.export import export
    from toolkit.demo.learn import Learner, TrainingFailed
    from toolkit.demo.quiz import make_quiz, score

    device = _device(device)
    learner = Learner(feed, out, device, seed, graphs=graphs)
    parameters = sum(p.numel() for p in learner.model.parameters())
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"[{clock():.0f} s] {parameters} parameters on {name}, {feed.settings.workers} processes draw", flush=True)
    quiz = make_quiz(1, TEST_SEED, sizes=1) if smoke else make_quiz(96, TEST_SEED)
    if device == "cpu" and not smoke:
        learner.on_speed = lambda rate: print(_forecast(rate, seconds), flush=True)
    if smoke:
        learner.train(clock, seconds, quiz, max_steps=6, log_every=2, test_every=5.0)
    else:
        learner.train(clock, seconds, quiz)
    if not learner.steps:
        raise TrainingFailed(f"no step was taken within {seconds:.0f} s: give it more --minutes")
    trained = clock()
    learner.save()
    feed.close()
    weights = out / "model.safetensors"
    _reload(learner, weights)
    final = score(learner.model, make_quiz(1, FINAL_SEED, sizes=1) if smoke else make_quiz(400, FINAL_SEED, sizes=16))
    facts = _facts(learner, final, feed.settings, seed, name, trained)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "curve.json").unlink(missing_ok=True)  # training.json has it
    if not bare:
        export(weights, out)
    print(json.dumps(facts["accuracy"]), flush=True)
    print(f"[{clock():.0f} s] done: {out}", flush=True)


def _device(wanted: str) -> str:
    import torch

    from toolkit.errors import ResourceError

    there = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if there else "cpu"
    if wanted not in ("cuda", "cpu"):
        raise ResourceError(f"unknown device {wanted!r}: choose auto, cuda or cpu")
    if wanted == "cuda" and not there:
        raise ResourceError("no CUDA device here: use --device cpu (which takes many hours)")
    return wanted


def _forecast(rate: float, seconds: float) -> str:
    """Say how long the shipped model's training would take at ``rate`` samples a second."""
    record = checkpoint_dir() / "training.json"
    text = f"{rate:.1f} samples a second"
    if record.is_file():
        needed = int(json.loads(record.read_text(encoding="utf-8"))["samples"])
        text += (
            f": the shipped model saw {needed} samples, which would take {needed / rate / 3600:.0f} hours here; "
            f"this run will see about {100 * rate * seconds / needed:.1f}% of them"
        )
    return text


def _reload(learner: Learner, weights: Path) -> None:
    """Put the weights as saved (fp16) back into the model, so that what ships is what is tested."""
    from safetensors.torch import load_file

    state = {name: value.to(learner.device).float() for name, value in load_file(weights).items()}
    learner.model.load_state_dict(state)


def _facts(
    learner: Learner, final: Score, settings: FeedSettings, seed: int, device: str, seconds: float
) -> dict[str, Any]:
    import dataclasses

    import torch

    return {
        "accuracy": {task: round(right / asked, 4) for task, (right, asked) in final.right.items()},
        "questions": {task: asked for task, (_, asked) in final.right.items()},
        "by_size": {task: {s: list(v) for s, v in sizes.items()} for task, sizes in final.by_size.items()},
        "wrong": final.wrong,
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
        "curve": learner.curve,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded Qwen2-VL from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--minutes", type=float, default=7.5, help="wall time to train, from the start of the process")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the training questions")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that every part runs")
    parser.add_argument("--bare", action="store_true", help="write weights and training.json only")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel by itself, without CUDA graphs")
    parser.add_argument("--started", type=float, help="epoch seconds from which --minutes counts, if not now")
    return parser.parse_args()


if __name__ == "__main__":
    given = _parse()
    main(
        given.out,
        given.minutes,
        given.seed,
        given.device,
        smoke=given.smoke,
        bare=given.bare,
        graphs=not given.no_graphs,
        started=given.started,
    )
