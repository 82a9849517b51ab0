"""Questions about pictures with their right answers, and how an answer is scored.

A file of questions is JSON Lines, one object a line::

    {"id": "bars-7", "task": "bars", "image": "images/bars-7.png", "question": "...", "answers": ["40"], "metric":
    "relaxed"}

``image`` is a path relative to the file, an http(s) URL or a data URL; ``images`` takes a list of them (empty: text
only).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import math
import random
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import ManifestError, MediaError

__all__ = ["METRICS", "RIGHT", "Picture", "Question", "digest", "load_questions", "pick", "score"]

#: A graded score counts as right from here on: ANLS's own threshold.
RIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image that was decoded once to prove that it can be.

    Attributes:
        mime: e.g. ``image/png``.
        path: file to read when needed, so that thousands of scans need not fit into memory; None when ``data`` is set.
        data: the encoded bytes of a picture that came by URL.
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
    """One line of the file. ``metric`` is a key of `METRICS`; any of ``answers`` is right."""

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    metric: str = "exact"
    pictures: tuple[Picture, ...] = ()


# --- scores -----------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Fold what should not decide: Unicode form (NFKC), case, runs of blanks, punctuation and quotes at the ends."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,;:!?\"'`*")


def exact(answer: str, gold: str) -> float:
    """Exact match = 1 when answer and gold are equal after folding case, blanks, Unicode form and punctuation at the
    ends."""
    return float(normalise(answer) == normalise(gold))


def contains(answer: str, gold: str) -> float:
    """Contains = 1 when the gold answer stands in the answer as whole words (both folded as for exact match)."""
    wanted = normalise(gold)
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalise(answer)) is not None)


def _number(text: str) -> float | None:
    text = normalise(text).replace(",", "")
    try:
        number = float(text.removesuffix("%")) / 100.0 if text.endswith("%") else float(text.removeprefix("$"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "infinity" and "nan" are words


def relaxed(answer: str, gold: str) -> float:
    """Relaxed accuracy = 1 when both are numbers and |answer - gold| <= 5% of |gold|, else exact match (ChartQA, Masry
    et al. 2022)."""
    said, right = _number(answer), _number(gold)
    if said is None or right is None:
        return exact(answer, gold)
    return float(abs(said - right) <= 0.05 * abs(right) + 1e-12)


def anls(answer: str, gold: str) -> float:
    """ANLS = 1 - d where d = Levenshtein distance / longer length (folded); 0 when d >= 0.5 (Biten et al. 2019)."""
    said, right = normalise(answer), normalise(gold)
    longest = max(len(said), len(right))
    if longest == 0:
        return 1.0
    distance = _levenshtein(said, right) / longest
    return 1.0 - distance if distance < 0.5 else 0.0


def _levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


#: name -> score of one answer against one gold answer, 0 to 1.
METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "relaxed": relaxed,
    "contains": contains,
    "anls": anls,
}


def score(question: Question, answer: str) -> float:
    """Return the best score of ``answer`` over the question's gold answers, 0 to 1. An empty answer is an answer, and
    wrong."""
    return max(METRICS[question.metric](answer, gold) for gold in question.answers)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_questions(path: Path, *, timeout_s: float = 30.0) -> list[Question]:
    """Read a file of questions, decode every picture once, and return the questions in the file's order.

    Raises:
        ManifestError: the file is missing, empty, or a line is not a question (names file and line).
        MediaError: a picture is missing, truncated, not a picture or can't be fetched (names file and line).
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
        pictures = [picture.sha256 for picture in question.pictures]
        fields = [question.id, question.task, question.question, question.answers, question.metric, pictures]
        state.update(json.dumps(fields).encode())
    return state.hexdigest()


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
    metric = entry.get("metric", "exact")
    if metric not in METRICS:
        raise ManifestError(f"{where}: unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if ("image" in entry) == ("images" in entry):
        raise ManifestError(f'{where}: give either "image" or "images" ("images": [] for a question without a picture)')
    references = entry["images"] if "images" in entry else [entry["image"]]
    if not isinstance(references, list) or not all(
        isinstance(reference, str) and reference for reference in references
    ):
        raise ManifestError(f'{where}: "image" must be a path or URL, "images" a list of them')
    return Question(
        id=entry["id"],
        task=entry["task"],
        question=entry["question"],
        answers=tuple(str(answer) for answer in answers),
        metric=metric,
        pictures=tuple(_picture(reference, base, where, timeout_s) for reference in references),
    )


def _picture(reference: str, base: Path, where: str, timeout_s: float) -> Picture:
    if reference.startswith("data:"):
        return _checked(_from_data_url(reference, where), where, "the data URL")
    if reference.startswith(("http://", "https://")):
        # Fetched here, once: both systems see the same bytes, and no server needs to reach the address.
        return _checked(_fetch(reference, where, timeout_s), where, reference)
    path = base / reference
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError(f"{where}: image {reference} is missing (looked for {path})") from error
    except OSError as error:
        raise MediaError(f"{where}: image {reference} can't be read: {error.strerror}") from error
    return _checked(data, where, reference, path)


def _from_data_url(reference: str, where: str) -> bytes:
    head, comma, payload = reference.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error) as error:
        raise MediaError(f"{where}: the data URL is broken; write data:image/png;base64,...") from error


def _fetch(url: str, where: str, timeout_s: float) -> bytes:
    import httpx

    try:
        response = httpx.get(url, timeout=timeout_s, follow_redirects=True)
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise MediaError(f"{where}: image {url} answers HTTP {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MediaError(f"{where}: image {url} can't be fetched ({type(error).__name__})") from error
    return response.content


def _checked(data: bytes, where: str, shown: str, path: Path | None = None) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                mime = Image.MIME.get(image.format or "", "application/octet-stream")
                image.load()  # the header alone says nothing about truncation
    except UnidentifiedImageError as error:
        raise MediaError(f"{where}: image {shown} is not a picture that can be read") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MediaError(f"{where}: image {shown} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"{where}: image {shown} is truncated or damaged ({error})") from error
    return Picture(mime=mime, sha256=hashlib.sha256(data).hexdigest(), path=path, data=data if path is None else None)
