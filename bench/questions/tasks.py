"""Questions about images with their right answers.

A file of questions is JSON Lines, one object a line::

    {"id": "bars-7", "task": "bars", "image": "images/bars-7.png", "question": "...", "answers": ["40"], "metric":
    "relaxed"}

``image`` is a path relative to the file, an http(s) URL or a data URL; ``images`` takes a list of them (empty: text
only). ``metric`` is one of `scoring.METRICS` (default ``exact``):

- ``exact``, ``contains``, ``relaxed``, ``anls``, ``open`` (MMMU's open questions): any of ``answers`` is right.
- ``vqa``: ``answers`` is what several people answered, one entry a person (ten in VQA and TextVQA, four at least).
- ``choice``: ``choices`` lists the options' texts, ``answers`` the right one: its letter (A is the first) or text.
  The options are put under the question, one a line, with the request to answer with a letter.

``cluster`` names what several questions share, such as a document; they are resampled together. Without it, questions
on the same images are a cluster.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.questions import scoring
from bench.questions.scoring import METRICS, RIGHT, Grade, Scoring
from toolkit.calibration import media
from toolkit.errors import ManifestError, MediaError

__all__ = [
    "METRICS",
    "RIGHT",
    "ImageData",
    "Question",
    "check_image",
    "digest",
    "grade",
    "load_questions",
    "pick",
    "score",
    "with_choices",
]

#: With fewer people no answer could reach a VQA score of 1.
FEWEST_PEOPLE = 4
LETTER_PLEASE = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True)
class ImageData:
    """An encoded image that was decoded once to prove that it can be.

    Attributes:
        mime: e.g. ``image/png``.
        path: file to read when needed, so that thousands of scans need not fit into memory; None when ``data`` is set.
        data: the encoded bytes of an image that came by URL.
        sha256: of the encoded bytes.
    """

    mime: str
    sha256: str
    path: Path | None = None
    data: bytes | None = None

    def data_url(self) -> str:
        """Return it as a data URL.

        Raises:
            MediaError: the file was there when the questions were read and is not any more.
        """
        data = self.data
        if data is None:
            try:
                data = self.path.read_bytes() if self.path else b""
            except OSError as error:
                raise MediaError(f"image {self.path} vanished during the run: {error.strerror}") from error
        return f"data:{self.mime};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True, slots=True)
class Question:
    """One line of the file.

    Attributes:
        question: as it is asked, options included.
        answers: see `scoring.grade`; the right options' letters for the metric ``choice``.
        metric: one of `scoring.METRICS`.
        choices: the options' texts, for ``choice`` alone.
        cluster: what it shares with other questions; empty: its images.
    """

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    metric: str = "exact"
    images: tuple[ImageData, ...] = ()
    choices: tuple[str, ...] = ()
    cluster: str = ""

    @property
    def cluster_id(self) -> str:
        """What questions are resampled together by: ``cluster``, else the images, else the question alone."""
        return self.cluster or "+".join(image.sha256 for image in self.images) or f"question {self.id}"


def grade(question: Question, answer: str, by: Scoring = "paper") -> Grade:
    """Score an answer and say what a reader should know about it (see `scoring.grade`)."""
    return scoring.grade(question.metric, answer, question.answers, question.choices, by)


def score(question: Question, answer: str) -> float:
    """Return the score of ``answer``, 0 to 1. An empty answer is an answer, and wrong."""
    return grade(question, answer).score


# --- reading ----------------------------------------------------------------------------------------------------------


def load_questions(path: Path, *, timeout_s: float = 30.0) -> list[Question]:
    """Read a file of questions, decode every image once, and return the questions in the file's order.

    Raises:
        ManifestError: the file is missing, empty, or a line is not a question (names file and line).
        MediaError: an image is missing, truncated, not an image or can't be fetched (names file and line).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ManifestError(f"{path}: no such file of questions; pass --tasks FILE.jsonl, demo or none") from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: not UTF-8 text at byte {error.start}; a file of questions is JSON Lines"
        ) from error
    except OSError as error:
        raise ManifestError(f"{path}: can't be read: {error.strerror}") from error
    questions: list[Question] = []
    lines_by_id: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        question = _parse(line, path.parent, where, timeout_s)
        if question.id in lines_by_id:
            raise ManifestError(
                f"{where}: id {question.id!r} stands on line {lines_by_id[question.id]} already; ids are unique"
            )
        lines_by_id[question.id] = number
        questions.append(question)
    if not questions:
        raise ManifestError(f"{path}: no questions in it; write one JSON object a line")
    return questions


def pick(questions: Sequence[Question], per_task: int, seed: int) -> list[Question]:
    """Return at most ``per_task`` questions of each task, drawn with ``seed``, in their order in the file."""
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    chosen: set[str] = set()
    for task, group in by_task.items():
        draw = random.Random(f"{seed}/{task}")
        chosen |= {question.id for question in (group if len(group) <= per_task else draw.sample(group, per_task))}
    return [question for question in questions if question.id in chosen]


def digest(questions: Sequence[Question]) -> str:
    """Return a SHA-256 over everything that is asked and how it is scored: equal digests mean comparable accuracies."""
    state = hashlib.sha256()
    for question in sorted(questions, key=lambda question: question.id):
        images = [image.sha256 for image in question.images]
        fields = [question.id, question.task, question.question, question.answers, question.metric, images]
        if question.choices:
            fields.append(question.choices)
        state.update(json.dumps(fields).encode())
    return state.hexdigest()


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return the question with its options under it, a letter before each, as MMMU and lmms-eval ask it."""
    options = "\n".join(
        f"{letter}. {text}" for letter, text in zip(scoring.letters(len(choices)), choices, strict=True)
    )
    return f"{question}\n{options}\n\n{LETTER_PLEASE}"


def _parse(line: str, base: Path, where: str, timeout_s: float) -> Question:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ManifestError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    if not isinstance(entry, dict):
        raise ManifestError(f"{where}: a {type(entry).__name__} instead of an object; write one JSON object a line")
    for key in ("id", "task", "question"):
        if key == "id" and isinstance(entry.get(key), int):
            entry[key] = str(entry[key])
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ManifestError(f'{where}: "{key}" must be a text that is not empty')
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str | int | float) for a in answers):
        raise ManifestError(f'{where}: "answers" must be a list of at least one text')
    texts = tuple(str(answer) for answer in answers)
    metric = entry.get("metric", "exact")
    if metric not in METRICS:
        raise ManifestError(f"{where}: unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if metric == "vqa" and len(texts) < FEWEST_PEOPLE:
        raise ManifestError(
            f'{where}: the metric vqa needs the "answers" of {FEWEST_PEOPLE} people or more, one entry each; '
            "for a list of right answers take exact"
        )
    choices = _choices(entry, metric, where)
    if metric == "choice":
        texts = tuple(_letter(text, choices, where) for text in texts)
    cluster = entry.get("cluster", "")
    if not isinstance(cluster, str | int):
        raise ManifestError(f'{where}: "cluster" must be a text or a number')
    if ("image" in entry) == ("images" in entry):
        raise ManifestError(f'{where}: give either "image" or "images" ("images": [] for a question without an image)')
    references = entry["images"] if "images" in entry else [entry["image"]]
    if not isinstance(references, list) or not all(
        isinstance(reference, str) and reference for reference in references
    ):
        raise ManifestError(f'{where}: "image" must be a path or URL, "images" a list of them')
    return Question(
        id=entry["id"],
        task=entry["task"],
        question=with_choices(entry["question"], choices) if choices else entry["question"],
        answers=texts,
        metric=metric,
        images=tuple(_image(reference, base, where, timeout_s) for reference in references),
        choices=choices,
        cluster=str(cluster),
    )


def _choices(entry: dict[str, Any], metric: str, where: str) -> tuple[str, ...]:
    choices = entry.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(c, str | int | float) and str(c).strip() for c in choices):
        raise ManifestError(f'{where}: "choices" must be a list of texts that are not empty')
    if metric == "choice" and not 2 <= len(choices) <= 26:
        raise ManifestError(f'{where}: the metric choice needs "choices": a list of 2 to 26 texts')
    if metric != "choice" and choices:
        raise ManifestError(f'{where}: "choices" goes with "metric": "choice", not with {metric}')
    return tuple(str(choice) for choice in choices)


def _letter(gold: str, choices: Sequence[str], where: str) -> str:
    known = scoring.letters(len(choices))
    meant = [gold.upper()] if len(gold) == 1 and gold.upper() in known else []
    meant = meant or [letter for letter, text in zip(known, choices, strict=True) if text == gold]
    if len(meant) != 1:
        raise ManifestError(
            f"{where}: the answer {gold!r} is {'several' if meant else 'none'} of the choices; "
            f"give a letter from A to {known[-1]}"
        )
    return meant[0]


def _image(reference: str, base: Path, where: str, timeout_s: float) -> ImageData:
    # A URL is fetched here, once: both systems see the same bytes, and no server needs to reach the address.
    data = media.read(reference, base, where, timeout_s)
    inside = reference.startswith("data:") or media.is_url(reference)
    return check_image(data, where, media.shorten(reference), None if inside else media.local_path(reference, base))


def check_image(data: bytes, where: str, shown: str, path: Path | None = None) -> ImageData:
    """Decode an image once to prove that it can be.

    Args:
        data: the encoded bytes.
        where: what an error names first, e.g. ``tasks.jsonl:3``.
        shown: what an error calls the image.
        path: the file that ``data`` comes from; None keeps ``data``.

    Raises:
        MediaError: it is no image, truncated, damaged or too large.
    """
    mime = media.decode(data, where, shown).get_format_mimetype() or "application/octet-stream"
    return ImageData(mime=mime, sha256=hashlib.sha256(data).hexdigest(), path=path, data=data if path is None else None)
