"""Questions as files that the rest of the project reads: JSONL beside a folder of PNGs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from toolkit.errors import ManifestError
from toolkit.tasks import questions

__all__ = ["CALIBRATION_SEED", "TASKS_SEED", "write_calibration", "write_tasks"]

#: Seeds of the questions that are written where no other seed is asked for.
CALIBRATION_SEED, TASKS_SEED = 10_001, 20_001

#: What calibration images show: all that training drew, lists included, for their long answers.
_CALIBRATION_TASKS = (*(task for task in questions.TASKS if task != "unseen_words"), *questions.PRACTICE)
#: One calibration sample in so many has no image.
_TEXT_EVERY = 8


def write_tasks(out_dir: Path, per_task: int = 50, seed: int = TASKS_SEED, tasks: Sequence[str] | None = None) -> Path:
    """Write held-out questions: ``tasks.jsonl`` and ``images/*.png``; returns the JSONL's path.

    Each line: id, task, image (relative to the file), question, answers (a list), metric (``exact``, or ``relaxed``:
    a number within 5%). ``tasks`` chooses among ``toolkit.tasks.questions.TASKS`` (default: all), ``per_task``
    questions
    each. The same arguments write the same files. Raises ``ManifestError`` for an unknown task or no questions.
    """
    chosen = tuple(tasks) if tasks is not None else questions.TASKS
    for task in chosen:
        if task not in questions.TASKS:
            raise ManifestError(f"unknown task {task!r}: choose among {', '.join(questions.TASKS)}")
    if per_task < 1 or not chosen:
        raise ManifestError(f"{per_task} questions of {len(chosen)} tasks: ask for at least one of each")
    rows = []
    for task in chosen:
        for index in range(per_task):
            item = questions.question(task, "held-out", seed, index)
            name = f"{task}-{index:04d}"
            rows.append(
                {
                    "id": name,
                    "task": task,
                    "image": _save(item.image, out_dir, name),
                    "question": item.question,
                    "answers": [item.answer],
                    "metric": item.metric,
                }
            )
    return _write(out_dir / "tasks.jsonl", rows)


def write_calibration(out_dir: Path, samples: int = 64, seed: int = CALIBRATION_SEED) -> Path:
    """Write calibration samples: ``calib.jsonl`` and ``images/*.png``; returns the JSONL's path.

    Each line is ``{"messages": [...]}`` in OpenAI's chat form: a user turn with an image (a path relative to the file)
    and a question, and the right answer as the assistant's turn; every eighth sample is text only. All are drawn from
    the training split, never from what ``write_tasks`` writes. Raises ``ManifestError`` when ``samples`` < 1.
    """
    if samples < 1:
        raise ManifestError(f"{samples} calibration samples: ask for at least one")
    rows = []
    for index in range(samples):
        if index % _TEXT_EVERY == _TEXT_EVERY - 1:
            asked, answer = questions.text_question(random.Random(f"train/{seed}/text/{index}"))
            content: Any = asked
        else:
            task = _CALIBRATION_TASKS[index % len(_CALIBRATION_TASKS)]
            item = questions.question(task, "train", seed, index)
            path = _save(item.image, out_dir, f"calib-{index:04d}")
            content = [
                {"type": "image_url", "image_url": {"url": path}},
                {"type": "text", "text": item.question},
            ]
            answer = item.answer
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    return _write(out_dir / "calib.jsonl", rows)


def _save(image: Image.Image, out_dir: Path, name: str) -> str:
    """Save an image and return its path relative to ``out_dir``."""
    path = out_dir / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.relative_to(out_dir).as_posix()


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
