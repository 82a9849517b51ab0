from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.paths import ROOT
from toolkit.calibration.manifest import read_manifest
from toolkit.demo import gallery
from toolkit.demo.prompt import END, answer_text, pack
from toolkit.demo.quiz import Score, is_right
from toolkit.errors import ManifestError
from toolkit.tasks import questions
from toolkit.tasks.manifests import CALIBRATION_SEED, TASKS_SEED, write_calibration, write_tasks
from toolkit.tasks.words import UNSEEN_WORDS, WORDS, pseudo_word

ALL = (*questions.TASKS, *questions.PRACTICE)
REPOSITORY = ROOT


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- images ----


@pytest.mark.parametrize("task", ALL)
def test_a_question_is_the_same_whatever_was_drawn_before(task: str) -> None:
    first = questions.question(task, "held-out", 3, 7)
    questions.question(task, "held-out", 3, 6)
    again = questions.question(task, "held-out", 3, 7)
    assert (first.question, first.answer, first.image.tobytes()) == (
        again.question,
        again.answer,
        again.image.tobytes(),
    )
    assert first.image.mode == "RGB" and all(side % 28 == 0 and 112 <= side <= 336 for side in first.image.size)


@pytest.mark.parametrize("task", [task for task in ALL if task != "unseen_words"])
def test_splits_and_seeds_share_no_image(task: str) -> None:
    def drawn(split: questions.Split, seed: int) -> set[bytes]:
        return {questions.question(task, split, seed, i, (224, 224)).image.tobytes() for i in range(6)}

    sets = [drawn("train", 1), drawn("held-out", 1), drawn("held-out", 2)]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 18


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(0, 10_000), st.sampled_from(questions.SIDES), st.sampled_from(questions.SIDES))
def test_any_task_draws_at_any_size_that_fits_it(task: str, seed: int, width: int, height: int) -> None:
    if not questions.fits(task, width, height):
        assert task in ("bars", "bar_list", "bar_table") and min(width, height) < 168
        return
    image = questions.question(task, "held-out", seed, 0, (width, height))
    assert image.image.size == (width, height)
    assert image.answer and image.question.endswith(("?", "."))
    packed = pack([image.question], [image.answer])
    assert answer_text(packed.ids[0, packed.starts[0] :].tolist()) == image.answer
    assert END in packed.ids[0]


def test_unseen_words_are_never_trained_on() -> None:
    assert not set(WORDS) & set(UNSEEN_WORDS) and len(UNSEEN_WORDS) > 50
    rng = random.Random(0)
    made_up = {pseudo_word(rng) for _ in range(20_000)}
    assert not made_up & set(UNSEEN_WORDS)
    assert all(3 <= len(word) <= 6 for word in made_up)
    with pytest.raises(ValueError, match="held out"):
        questions.question("unseen_words", "train", 1, 0)
    assert questions.question("unseen_words", "held-out", 1, 0).answer in UNSEEN_WORDS


def test_held_out_scans_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Scans:
        def __init__(self, scans: Any) -> None:
            self.scans = scans

        def __getitem__(self, at: int) -> Any:
            taken.append(at)
            return self.scans[at]

    scans, labels = questions._scans()
    monkeypatch.setattr(questions, "_scans", lambda: (Scans(scans), labels))
    for index in range(300):
        questions.question("handwritten", "train", 1, index, (112, 112))
    trained, taken[:] = set(taken), []
    for index in range(300):
        questions.question("handwritten", "held-out", 1, index, (112, 112))
    assert max(trained) < 1_397 <= min(taken)
    assert len(trained) > 200


def test_counting_counts_what_is_painted() -> None:
    for index in range(30):
        image = questions.question("counting", "held-out", 5, index)
        if image.question in ("How many shapes are in the picture?", "Count the shapes."):
            painted = len(image.image.getcolors() or []) - 1  # each shape has a shade of its own
            assert painted == int(image.answer)


def test_how_answers_are_scored() -> None:
    image = Image.new("RGB", (112, 112))
    exact = questions.ImageQuestion("digits", image, "?", "100")
    relaxed = questions.ImageQuestion("bars", image, "?", "100", metric="relaxed")
    assert is_right(exact, " 100 ") and not is_right(exact, "101") and not is_right(exact, "100.0")
    assert is_right(relaxed, "105") and is_right(relaxed, "95.0")
    assert not is_right(relaxed, "106") and not is_right(relaxed, "many") and not is_right(relaxed, "nan")
    score = Score()
    for answer in ("100", "7", *["8"] * 20):
        score.add(exact, answer)
    assert score.accuracy() == {"digits": round(1 / 22, 4)}
    assert score.wrong["digits"][0] == {"size": "112x112", "question": "?", "answer": "7", "right": "100"}
    assert len(score.wrong["digits"]) == 8


# ---- files ----


def test_tasks_as_files(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "a", per_task=2)
    rows = lines(path)
    assert path == tmp_path / "a" / "tasks.jsonl"
    assert [row["task"] for row in rows] == [task for task in questions.TASKS for _ in range(2)]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "task", "image", "question", "answers", "metric"}
        assert row["metric"] == ("relaxed" if row["task"] == "bars" else "exact")
        assert len(row["answers"]) == 1 and row["question"]
    asked = questions.question("words", "held-out", TASKS_SEED, 1)
    row = rows[questions.TASKS.index("words") * 2 + 1]
    assert (row["question"], row["answers"]) == (asked.question, [asked.answer])
    with Image.open(path.parent / row["image"]) as image:
        assert image.convert("RGB").tobytes() == asked.image.tobytes()
    write_tasks(tmp_path / "b", per_task=2, seed=TASKS_SEED)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    write_tasks(tmp_path / "c", per_task=1, seed=3, tasks=["where", "bars"])
    assert [row["task"] for row in lines(tmp_path / "c" / "tasks.jsonl")] == ["where", "bars"]


def test_calibration_as_files(tmp_path: Path) -> None:
    path = write_calibration(tmp_path / "a", samples=24)
    rows = lines(path)
    assert path == tmp_path / "a" / "calib.jsonl" and len(rows) == 24
    with_image = 0
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert isinstance(assistant["content"], str) and assistant["content"]
        if isinstance(user["content"], list):
            with_image += 1
            url = user["content"][0]["image_url"]["url"]
            assert not Path(url).is_absolute() and (path.parent / url).is_file()
    assert with_image == 21
    samples = read_manifest(path)
    assert len(samples) == 24
    assert sum(part["type"] == "image" for s in samples for m in s.messages for part in m["content"]) == 21
    write_calibration(tmp_path / "b", samples=24, seed=CALIBRATION_SEED)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_calibration_shows_nothing_that_is_asked_later(tmp_path: Path) -> None:
    def shown(directory: Path) -> set[bytes]:
        return {p.read_bytes() for p in (directory / "images").iterdir()}

    write_calibration(tmp_path / "calib", samples=40, seed=TASKS_SEED)
    write_tasks(tmp_path / "tasks", per_task=5)
    assert not shown(tmp_path / "calib") & shown(tmp_path / "tasks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["counting", "chess"]}, "unknown task 'chess': choose among colour_shape, counting"),
        ({"tasks": ["spelling"]}, "unknown task 'spelling'"),
        ({"tasks": []}, "at least one"),
        ({"per_task": 0}, "at least one"),
        ({"per_task": -3}, "at least one"),
    ],
)
def test_tasks_that_cannot_be_written(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        write_tasks(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("samples", [0, -1])
def test_calibration_that_cannot_be_written(tmp_path: Path, samples: int) -> None:
    with pytest.raises(ManifestError, match="at least one"):
        write_calibration(tmp_path / "out", samples=samples)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "seed", "other"), [("tasks", TASKS_SEED, 1), ("calibration", CALIBRATION_SEED, 2)])
def test_the_verb_takes_the_seed_of_its_kind(tmp_path: Path, kind: str, seed: int, other: int) -> None:
    from typer.testing import CliRunner

    from toolkit.cli import app

    def written(*options: str) -> dict[str, bytes]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        result = CliRunner().invoke(app, ["demo-data", "--out", str(out), "--kind", kind, "--number", "1", *options])
        assert result.exit_code == 0, result.output
        return files(out)

    by_default = written()
    assert by_default == written("--seed", str(seed))
    assert by_default != written("--seed", str(other))


def test_the_verb_refuses_an_unknown_kind(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from toolkit.cli import app

    result = CliRunner().invoke(app, ["demo-data", "--out", str(tmp_path), "--kind", "poems"])
    assert isinstance(result.exception, ManifestError) and "choose tasks or calibration" in str(result.exception)


# ---- images of the README ----


def test_the_image_that_make_ask_shows_is_the_drawn_one() -> None:
    item = gallery.shapes_image()
    assert (item.question, item.answer) == ("How many shapes are in the picture?", "5")
    with Image.open(REPOSITORY / "docs" / "images" / "shapes.png") as image:
        assert image.convert("RGB").tobytes() == item.image.tobytes()


def test_a_gallery_is_a_png(tmp_path: Path) -> None:
    asked = [questions.question(task, "held-out", 1, 0) for task in questions.TASKS[:5]]
    gallery.draw_gallery([(image, "red") for image in asked], tmp_path / "tasks.png")
    with Image.open(tmp_path / "tasks.png") as image:
        assert image.size == (1000, 660)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 500
