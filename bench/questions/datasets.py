"""DocVQA, ChartQA, TextVQA and MMMU as `tasks.Question`s, read from parquet files in the layouts of lmms-lab's
repositories: a directory of them here, or a repository on the Hugging Face hub.

Prompts are those of lmms-eval, so that scores can be held against published ones.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.questions.scoring import letters
from bench.questions.tasks import FEWEST_PEOPLE, ImageData, Question, check_image, pick, with_choices
from toolkit.errors import HubError, ManifestError, MediaError

if TYPE_CHECKING:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

__all__ = ["LAYOUTS", "Layout", "load_dataset"]

Row = dict[str, Any]

IN_A_PHRASE = "Answer the question using a single word or phrase."
IN_A_WORD = "Answer the question with a single word."


@dataclass(frozen=True, slots=True)
class Layout:
    """How one set's parquet files are laid out.

    Attributes:
        hub_id: the repository on the hub.
        folder: where in the repository the files are, ``FOLDER/SPLIT-00000-of-00006.parquet``.
        split: the one whose answers are public and on which scores are published.
        columns: those a question is made of.
        images: the columns with images, structs of ``bytes`` and ``path``, in the order they are shown.
        question: makes a question, yet without images, of a row and its number.
    """

    hub_id: str
    folder: str
    split: str
    columns: tuple[str, ...]
    images: tuple[str, ...]
    question: Callable[[Row, int], Question]


def load_dataset(
    name: str, source: str | Path | None = None, *, split: str | None = None, per_task: int | None = None, seed: int = 0
) -> list[Question]:
    """Read a set of questions with their images, in the files' order.

    Only the images of the questions that are kept are read, each is decoded once, and equal ones share their bytes;
    they stay in memory (all of DocVQA's validation split: about 600 MB).

    Args:
        name: a key of `LAYOUTS`.
        source: a directory with the parquet files, at any depth, or a repository on the hub; None: lmms-lab's.
        split: None: the one with public answers on which scores are published.
        per_task: keep at most so many questions of each task, drawn with ``seed`` (see `tasks.pick`).

    Raises:
        ManifestError: unknown set, no files of the split, a file that is no parquet file or of another layout, a row
            that is no question, a split without answers (names file and row).
        MediaError: an image that is missing or can't be read (names file and row).
        HubError: the repository can't be fetched.
    """
    if name not in LAYOUTS:
        raise ManifestError(f"unknown set of questions {name!r}; choose one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    split = split or layout.split
    files = _files(layout, str(source or layout.hub_id), split)
    questions: list[Question] = []
    rows: dict[str, tuple[Path, int]] = {}
    for file in files:
        for number, row in enumerate(_rows(file, layout.columns, layout.images)):
            where = f"{file}: row {number}"
            try:
                question = layout.question(row, len(questions))
            except (TypeError, ValueError, SyntaxError) as error:
                raise ManifestError(f"{where} is no question of {name}: {error}") from error
            if not any(answer.strip() and answer != "?" for answer in question.answers):
                raise ManifestError(f"{where}: no answers; those of split {split!r} may not be public, take another")
            if question.id in rows:
                raise ManifestError(
                    f"{where}: id {question.id!r} is there twice; were two sets put into one directory?"
                )
            rows[question.id] = (file, number)
            questions.append(question)
    if not questions:
        raise ManifestError(f"{files[0]}: no questions in it")
    if per_task is not None:
        questions = pick(questions, per_task, seed)
    return _with_images(questions, rows, layout.images)


# --- rows to questions ------------------------------------------------------------------------------------------------


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"the answers are {value!r} instead of a list of texts")
    return tuple(value)


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str) or not row[column].strip():
        raise ValueError(f"{column} is {row[column]!r} instead of a text")
    return str(row[column])


def _docvqa(row: Row, number: int) -> Question:
    return Question(
        id=f"docvqa-{row['questionId']}",
        task="docvqa",
        question=f"{_text(row, 'question')}\n{IN_A_PHRASE}",
        answers=_texts(row["answers"]),
        metric="anls",
        cluster=f"docvqa {row['docId']}",
    )


def _chartqa(row: Row, number: int) -> Question:
    # Human-written and machine-made questions are scored apart, as in the paper. There is no id of chart or question.
    kind = _text(row, "type").removesuffix("_test")
    return Question(
        id=f"chartqa-{number}",
        task=f"chartqa-{kind}",
        question=f"{_text(row, 'question')}\n{IN_A_WORD}",
        answers=(_text(row, "answer"),),
        metric="relaxed",
    )


def _textvqa(row: Row, number: int) -> Question:
    answers = _texts(row["answers"])
    if 0 < len(answers) < FEWEST_PEOPLE:
        raise ValueError(f"{len(answers)} answers instead of ten people's")
    return Question(
        id=f"textvqa-{row['question_id']}",
        task="textvqa",
        question=f"{_text(row, 'question').capitalize()}\n{IN_A_PHRASE}",
        answers=answers,
        metric="vqa",
        cluster=f"textvqa {row['image_id']}",
    )


def _mmmu(row: Row, number: int) -> Question:
    """Multiple choice as such. An open question (one in twenty) counts as right when a right answer stands in the
    answer as whole words, which is stricter than MMMU's own rules; those are ``--scoring lmms-eval``."""
    asked, gold = _text(row, "question"), _text(row, "answer")
    options = tuple(str(option) for option in _listed(row["options"]))
    if row["question_type"] == "open":
        golds = tuple(str(text) for text in _listed(gold)) if gold.startswith("[") else (gold,)
        return Question(f"mmmu-{row['id']}", "mmmu", f"{asked}\n\n{IN_A_PHRASE}", golds, "open")
    if len(options) < 2:
        raise ValueError(f"options are {row['options']!r} instead of a list of two or more")
    if gold != "?" and gold not in list(letters(len(options))):
        raise ValueError(f"the answer {gold!r} is not the letter of one of {len(options)} options")
    return Question(
        f"mmmu-{row['id']}", "mmmu", with_choices(asked, options), (gold,), metric="choice", choices=options
    )


def _listed(value: Any) -> list[Any]:
    """MMMU writes its lists as Python source in a text; copies of it have real lists."""
    parsed = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(parsed, list):
        raise ValueError(f"{value!r} is no list")
    return parsed


LAYOUTS = {
    "docvqa": Layout(
        "lmms-lab/DocVQA", "DocVQA", "validation", ("questionId", "question", "docId", "answers"), ("image",), _docvqa
    ),
    "chartqa": Layout("lmms-lab/ChartQA", "data", "test", ("type", "question", "answer"), ("image",), _chartqa),
    "textvqa": Layout(
        "lmms-lab/textvqa",
        "data",
        "validation",
        ("image_id", "question_id", "question", "answers"),
        ("image",),
        _textvqa,
    ),
    "mmmu": Layout(
        "lmms-lab/MMMU",
        "data",
        "validation",
        ("id", "question", "options", "answer", "question_type"),
        tuple(f"image_{number}" for number in range(1, 8)),
        _mmmu,
    ),
}


# --- files ------------------------------------------------------------------------------------------------------------


def _files(layout: Layout, source: str, split: str) -> list[Path]:
    """Return the split's parquet files in the order of their names, fetched if ``source`` is no directory."""
    directory = Path(source)
    if not directory.is_dir():
        directory = _fetch(source, layout, split)
    found = sorted(path for path in directory.rglob(f"{split}-*.parquet") if path.is_file())
    # DocVQA's repository holds InfographicVQA in a folder beside it.
    found = [path for path in found if path.parent.name == layout.folder] or found
    if not found:
        raise ManifestError(
            f"{source}: no files {layout.folder}/{split}-*.parquet in it; give a directory or repository laid out like "
            f"{layout.hub_id}, or another split"
        )
    for path in found:
        part = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})).*", path.name)
        for number in range(int(part[3]) if part else 0):
            wanted = f"{part[1]}{number:05}{part[2]}" if part else ""
            if not list(path.parent.glob(f"{wanted}*.parquet")):
                raise ManifestError(f"{path.parent / wanted}.parquet is missing: a part of the split; fetch it again")
    return found


def _fetch(hub_id: str, layout: Layout, split: str) -> Path:
    """Return the local snapshot of a repository's one split, fetching what is not in the hub's cache."""
    import httpx
    from huggingface_hub import constants, errors, snapshot_download

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        return Path(
            snapshot_download(
                hub_id,
                repo_type="dataset",
                endpoint=endpoint,
                cache_dir=Path(constants.HF_HUB_CACHE).expanduser(),
                allow_patterns=f"{layout.folder}/{split}-*.parquet",
            )
        )
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated: ask for access at {endpoint}/datasets/{hub_id}, then log in with `hf auth login` or "
            "set HF_TOKEN."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise HubError(
            f"{hub_id} is neither a directory here nor a data set on {endpoint}. Check the spelling; for a private "
            "one, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{hub_id} is no directory here, is not in the cache, and {endpoint} can't be reached. Run again when it "
            "can, or give a directory with its parquet files."
        ) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"{hub_id} could not be fetched from {endpoint}: {reason}. Run again: what is fetched already is kept."
        ) from error


def _open(file: Path) -> parquet.ParquetFile:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{file}: not a parquet file, or cut short: {str(error).splitlines()[0]}") from error


def _rows(file: Path, columns: Sequence[str], images: Sequence[str]) -> Iterator[Row]:
    with _open(file) as opened:
        present = set(opened.schema_arrow.names)
        missing = [column for column in (*columns, images[0]) if column not in present]
        if missing:
            raise ManifestError(
                f"{file}: no column {', '.join(missing)} in it, only {', '.join(opened.schema_arrow.names)}; "
                "is it another set?"
            )
        yield from opened.read(columns=list(columns)).to_pylist()


def _with_images(
    questions: Sequence[Question], rows: dict[str, tuple[Path, int]], images: Sequence[str]
) -> list[Question]:
    wanted: dict[Path, dict[int, Question]] = {}
    for question in questions:
        file, number = rows[question.id]
        wanted.setdefault(file, {})[number] = question
    known: dict[str, ImageData] = {}
    whole = {
        question.id: replace(question, images=_images(row, images, file, number, known))
        for file, by_row in wanted.items()
        for number, question, row in _chosen(file, by_row, images)
    }
    return [whole[question.id] for question in questions]


def _chosen(file: Path, by_row: dict[int, Question], images: Sequence[str]) -> Iterator[tuple[int, Question, Row]]:
    """Read the image columns of some rows, touching only the row groups that hold them."""
    with _open(file) as opened:
        columns = [column for column in images if column in opened.schema_arrow.names]
        first = 0
        for group in range(opened.num_row_groups):
            end = first + opened.metadata.row_group(group).num_rows
            numbers = [number for number in sorted(by_row) if first <= number < end]
            if numbers:
                table = opened.read_row_group(group, columns=columns).take([number - first for number in numbers])
                for number, row in zip(numbers, table.to_pylist(), strict=True):
                    yield number, by_row[number], row
            first = end


def _images(
    row: Row, columns: Sequence[str], file: Path, number: int, known: dict[str, ImageData]
) -> tuple[ImageData, ...]:
    where, images = f"{file}: row {number}", []
    for column in columns:
        cell = row.get(column)
        if cell is None:
            continue
        data = cell.get("bytes") if isinstance(cell, dict) else None
        if data is None:
            raise MediaError(f"{where}: {column} has no bytes; write the set with its images embedded")
        key = hashlib.sha256(data).hexdigest()
        if key not in known:
            known[key] = check_image(data, where, column)
        images.append(known[key])
    if not images:
        raise MediaError(f"{where}: no image in {columns[0]}")
    return tuple(images)
