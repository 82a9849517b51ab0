"""Per-question logs of lmms-eval (``--log_samples``), read as scores that can be paired.

A run writes ``<date>_samples_<task>.jsonl``, a line a question: ``doc_id``, ``target``, ``filtered_resps`` (the
answer), ``doc_hash`` from some versions on, and what the task's own code made of the answer under a name of its own:
``anls``, ``relaxed_overall``, ``exact_match``, ``mmmu_acc``. That is a number, or an object with a ``score`` or, for
MMMU, with the answer that was read (``parsed_pred``) beside the right one.

Source: `lmms_eval/evaluator.py` and `lmms_eval/loggers/evaluation_tracker.py` of EvolvingLMMs-Lab/lmms-eval.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import BenchError

__all__ = ["Pairs", "Sample", "pair", "read_logs"]

_MARK = "_samples_"
#: Keys of a line that are no metric.
_NO_METRIC = frozenset(
    (
        "doc_id",
        "doc",
        "target",
        "arguments",
        "input",
        "resps",
        "filtered_resps",
        "token_counts",
        "success",
        "submission",
    )
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A question as one run scored it.

    Attributes:
        score: a share of 1.
        question: what tells that two runs asked the same: lmms-eval's own hash of it, else the right answer.
    """

    score: float
    question: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two runs' scores of one task on the same questions, in the same order.

    Attributes:
        metric: the name under which lmms-eval has the score.
    """

    metric: str
    before: tuple[float, ...]
    after: tuple[float, ...]


def read_logs(path: Path, metrics: Sequence[str] = ()) -> dict[str, tuple[str, dict[str, Sample]]]:
    """Read the logs of one run.

    Args:
        path: a file, or a directory that holds them at any depth.
        metrics: which metric is the score, where a task has several: NAME, or TASK=NAME.

    Returns:
        By task: the metric's name, and the samples by ``doc_id``.

    Raises:
        BenchError: no logs there, two runs of one task, or a line without a score; names file and line.
    """
    files = [path] if path.is_file() else sorted(path.rglob(f"*{_MARK}*.jsonl"))
    if not files:
        raise BenchError(f"{path}: no *{_MARK}TASK.jsonl there; run lmms-eval with --log_samples --output_path {path}")
    by_task: dict[str, Path] = {}
    for file in files:
        task = file.stem.rpartition(_MARK)[2] or file.stem
        if task in by_task:
            raise BenchError(f"{task} was run twice: {by_task[task]} and {file}; give the directory of one run")
        by_task[task] = file
    return {task: _read(file, task, metrics) for task, file in by_task.items()}


def pair(
    before: Mapping[str, tuple[str, dict[str, Sample]]], after: Mapping[str, tuple[str, dict[str, Sample]]]
) -> dict[str, Pairs]:
    """Pair two runs question by question; tasks that only one of them has are left out.

    Raises:
        BenchError: no task in common, other questions, or another metric.
    """
    common = [task for task in before if task in after]
    if not common:
        raise BenchError(f"no task in common: {_names(before)} in the first run, {_names(after)} in the second")
    found = {}
    for task in common:
        (metric, old), (other, new) = before[task], after[task]
        if metric != other:
            raise BenchError(f"{task}: scored by {metric} in the first run, by {other} in the second; choose: --metric")
        alone = old.keys() ^ new.keys()
        if alone:
            raise BenchError(
                f"{task}: {len(old)} questions in the first run, {len(new)} in the second, {len(alone)} of them in one "
                f"alone (doc_id {min(alone)}); run both with the same --limit and version of the data"
            )
        for name, sample in old.items():
            if sample.question != new[name].question:
                raise BenchError(f"{task}: doc_id {name} is another question in the second run: other data or prompts")
        found[task] = Pairs(
            metric, tuple(sample.score for sample in old.values()), tuple(new[name].score for name in old)
        )
    return found


def _read(file: Path, task: str, metrics: Sequence[str]) -> tuple[str, dict[str, Sample]]:
    rows: dict[str, tuple[int, dict[str, Any]]] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{file}: can't be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{file}: line {number}: no JSON ({error})") from error
        if not isinstance(row, dict) or "doc_id" not in row:
            raise BenchError(f"{file}: line {number}: no sample of lmms-eval (an object with a doc_id)")
        name = str(row["doc_id"])
        if name in rows:
            raise BenchError(f"{file}: line {number}: doc_id {name} again: a log of several runs or filters; keep one")
        rows[name] = number, row
    if not rows:
        raise BenchError(f"{file}: no samples in it")
    metric = _metric(file, task, (row for _, row in rows.values()), metrics)
    samples = {}
    for name, (number, row) in rows.items():
        score = _score(row.get(metric))
        if score is None:
            raise BenchError(f"{file}: line {number}: {metric} holds no score between 0 and 1: {row.get(metric)!r}")
        samples[name] = Sample(score, str(row.get("doc_hash") or row.get("target")))
    return metric, samples


def _metric(file: Path, task: str, rows: Iterable[dict[str, Any]], metrics: Sequence[str]) -> str:
    """Return the name of the one metric that every line has, or of the one that was asked for."""
    held, total = Counter[str](), 0
    for row in rows:
        total += 1
        held.update(name for name in row if name not in _NO_METRIC and not name.endswith("_hash"))
    wanted = {name.partition("=")[2] for name in metrics if name.partition("=")[:2] == (task, "=")}
    wanted = wanted or {name for name in metrics if "=" not in name} & held.keys()
    everywhere = sorted(name for name, count in held.items() if count == total)
    chosen = sorted(wanted) or everywhere
    if len(chosen) == 1:
        return chosen[0]
    told = f"{_names(everywhere)} in every line" if everywhere else f"{_names(held) or 'nothing'} in some lines alone"
    raise BenchError(f"{file}: which metric is the score? {told}; choose: --metric {task}=NAME")


def _score(value: object) -> float | None:
    """Return a metric's value as a share of 1; None where it is none."""
    if isinstance(value, dict):
        if "score" in value:
            return _score(value["score"])
        if "parsed_pred" in value and "answer" in value:  # MMMU: right where the letter that was read is the answer's
            right = value["answer"]
            return float(value["parsed_pred"] in right if isinstance(right, list) else value["parsed_pred"] == right)
        return None
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    return None


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
