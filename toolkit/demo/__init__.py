"""The embedded Qwen2-VL: small, trained, and so able to lose quality; and the questions it can answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["CALIBRATION_SEED", "TASKS_SEED", "checkpoint_dir", "write_calibration", "write_tasks"]

#: Seeds of the questions that are written where no other seed is asked for.
CALIBRATION_SEED, TASKS_SEED = 10_001, 20_001


def checkpoint_dir() -> Path:
    """Return the directory of the embedded model's fp16 checkpoint."""
    return Path(__file__).parent / "checkpoint"


def write_tasks(out_dir: Path, per_task: int = 50, seed: int = TASKS_SEED, tasks: Sequence[str] | None = None) -> Path:
    """Write held-out questions: ``tasks.jsonl`` and ``images/*.png``; returns the JSONL's path.

    Each line: id, task, image (relative to the file), question, answers (a list), metric (``exact``, or ``relaxed``:
    a number within 5%). ``tasks`` chooses among ``toolkit.demo.pictures.TASKS`` (default: all), ``per_task`` questions
    each. The same arguments write the same files. Raises ``ManifestError`` for an unknown task or no questions.
    """
    from toolkit.demo.manifests import write_tasks as write

    return write(out_dir, per_task, seed, tasks)


def write_calibration(out_dir: Path, samples: int = 64, seed: int = CALIBRATION_SEED) -> Path:
    """Write calibration samples: ``calib.jsonl`` and ``images/*.png``; returns the JSONL's path.

    Each line is ``{"messages": [...]}`` in OpenAI's chat form: a user turn with a picture (a path relative to the file)
    and a question, and the right answer as the assistant's turn; every eighth sample is text only. All are drawn from
    the training split, never from what ``write_tasks`` writes. Raises ``ManifestError`` when ``samples`` < 1.
    """
    from toolkit.demo.manifests import write_calibration as write

    return write(out_dir, samples, seed)
