from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench import tasks
from bench.tasks import Question, digest, load_questions, pick, score
from tests.bench.fake_server import serving
from toolkit.errors import ManifestError, MediaError


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def entry(**changes: Any) -> dict[str, Any]:
    line = {"id": "a", "task": "t", "image": "a.png", "question": "What?", "answers": ["red"]} | changes
    return {key: value for key, value in line.items() if value is not None}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    (path / "a.png").write_bytes(png())
    file = path / "tasks.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


# --- reading


def test_questions_are_read(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    file = write(tmp_path, entry(), "", entry(id=7, image=None, images=["a.png", url], metric="anls", answers=["b", 3]))
    first, second = load_questions(file)
    assert first.metric == "exact"
    assert first.pictures[0].data_url() == "data:image/png;base64," + base64.b64encode(png()).decode()
    assert (second.id, second.answers, len(second.pictures)) == ("7", ("b", "3"), 2)
    assert second.pictures[1].data_url() == url


def test_a_question_may_have_no_picture_when_it_says_so(tmp_path: Path) -> None:
    assert load_questions(write(tmp_path, entry(image=None, images=[])))[0].pictures == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", "not JSON"),
        ("[1]", "list instead of an object"),
        (entry(id=None), '"id"'),
        (entry(task=" "), '"task"'),
        (entry(question=3), '"question"'),
        (entry(answers=[]), '"answers"'),
        (entry(answers="red"), '"answers"'),
        (entry(answers=None), '"answers"'),
        (entry(metric="bleu"), "unknown metric 'bleu'; choose one of exact"),
        (entry(image=None), '"image" or "images"'),
        (entry(images=[]), '"image" or "images"'),
        (entry(image=5), '"image" must be'),
        (entry(id="first"), "stands on line 1 already"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, words: str) -> None:
    file = write(tmp_path, entry(id="first"), "", line)
    with pytest.raises(ManifestError) as caught:
        load_questions(file)
    assert f"{file}:3: " in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_or_empty_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(ManifestError, match="no such file"):
        load_questions(tmp_path)
    with pytest.raises(ManifestError, match="no questions"):
        load_questions(write(tmp_path, ""))


def test_a_binary_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(png())
    with pytest.raises(ManifestError, match="not UTF-8"):
        load_questions(file)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "is missing"),
        (b"hello", "is not a picture"),
        (png()[:60], "truncated or damaged"),
        (b"", "is not a picture"),
    ],
)
def test_a_bad_picture_is_named(tmp_path: Path, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / "b.png").write_bytes(data)
    file = write(tmp_path, entry(), entry(id="b", image="b.png"))
    with pytest.raises(MediaError, match=words) as caught:
        load_questions(file)
    assert f"{file}:2: image b.png" in str(caught.value)


def test_a_truncated_jpeg_is_seen(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "JPEG")
    (tmp_path / "b.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(MediaError, match="truncated"):
        load_questions(write(tmp_path, entry(image="b.jpg")))


@pytest.mark.parametrize("url", ["data:image/png;base64,@@", "data:image/png,red", "data:"])
def test_a_broken_data_url_is_said(tmp_path: Path, url: str) -> None:
    with pytest.raises(MediaError, match="data URL is broken"):
        load_questions(write(tmp_path, entry(image=url)))


def test_an_address_without_a_picture_is_said(tmp_path: Path) -> None:
    with serving() as server:
        with pytest.raises(MediaError, match="HTTP 404"):
            load_questions(write(tmp_path, entry(image=f"{server.url}/a.png")))
        with pytest.raises(MediaError, match="is not a picture"):
            load_questions(write(tmp_path, entry(image=f"{server.url}/version")))
        gone = server.url
    with pytest.raises(MediaError, match="can't be fetched"):
        load_questions(write(tmp_path, entry(image=f"{gone}/a.png")))


def test_a_picture_that_vanishes_is_said(tmp_path: Path) -> None:
    question = load_questions(write(tmp_path, entry()))[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(MediaError, match="vanished"):
        question.pictures[0].data_url()


def test_a_sample_is_per_task_seeded_and_in_order() -> None:
    questions = [Question(f"{task}{i}", task, "q", ("a",)) for i in range(50) for task in "xy"]
    chosen = pick(questions, 5, seed=1)
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=questions.index)
    assert chosen == pick(questions, 5, seed=1) != pick(questions, 5, seed=2)
    assert pick(questions, 99, seed=1) == questions


def test_the_digest_covers_what_is_asked(tmp_path: Path) -> None:
    one = load_questions(write(tmp_path, entry(), entry(id="b")))
    assert digest(one) == digest(one[::-1])
    changed = [load_questions(write(tmp_path, entry(answers=["blue"]), entry(id="b")))]
    (tmp_path / "a.png").write_bytes(png("blue"))
    changed.append(load_questions(tmp_path / "tasks.jsonl"))
    assert len({digest(one), *map(digest, changed)}) == 3


# --- scores


def ask(metric: str, answer: str, *golds: str) -> float:
    return score(Question("i", "t", "q", golds, metric), answer)


@pytest.mark.parametrize(
    ("metric", "answer", "gold", "expected"),
    [
        ("exact", " Red  Circle. ", "red circle", 1),
        ("exact", "ｒｅｄ", "red", 1),
        ("exact", "redcircle", "red circle", 0),
        ("exact", "", "red", 0),
        ("contains", "It is a red circle.", "Red", 1),
        ("contains", "It is scored", "red", 0),
        ("contains", "14", "4", 0),
        ("contains", "a+b? yes", "a+b?", 1),
        ("relaxed", "104.9", "100", 1),
        ("relaxed", "105", "100", 1),
        ("relaxed", "105.1", "100", 0),
        ("relaxed", "-95", "-100", 1),
        ("relaxed", "0", "0", 1),
        ("relaxed", "0.01", "0", 0),
        ("relaxed", "1,020", "1000", 1),
        ("relaxed", "51%", "50%", 1),
        ("relaxed", "Yes", "yes", 1),
        ("relaxed", "forty", "40", 0),
        ("anls", "hello", "hello", 1),
        ("anls", "hallo", "hello", 0.8),
        ("anls", "hexxx", "hello", 0),
        ("anls", "", "hello", 0),
    ],
)
def test_scores(metric: str, answer: str, gold: str, expected: float) -> None:
    assert ask(metric, answer, gold) == pytest.approx(expected)


def test_the_best_gold_answer_counts() -> None:
    assert ask("anls", "hallo", "xyz", "hello") == pytest.approx(0.8)


@given(st.text(max_size=12), st.text(max_size=12))
def test_scores_are_shares_and_equal_answers_are_right(answer: str, gold: str) -> None:
    for metric in tasks.METRICS:
        assert 0.0 <= ask(metric, answer, gold) <= 1.0
        assert ask(metric, gold, gold) == 1.0


@given(st.text("ab", max_size=8), st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    distance = tasks._levenshtein
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))
