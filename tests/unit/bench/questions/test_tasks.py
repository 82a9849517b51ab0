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

from bench.questions import scoring, tasks
from bench.questions.scoring import choose, vqa_normalise
from bench.questions.tasks import Question, digest, grade, load_questions, pick, score
from serve.settings.limits import Limits
from tests.support.fake_server import serving
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
    assert first.images[0].data_url() == "data:image/png;base64," + base64.b64encode(png()).decode()
    assert (second.id, second.answers, len(second.images)) == ("7", ("b", "3"), 2)
    assert second.images[1].data_url() == url


def test_a_question_may_have_no_image_when_it_says_so(tmp_path: Path) -> None:
    assert load_questions(write(tmp_path, entry(image=None, images=[])))[0].images == ()


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
        (entry(metric="vqa", answers=["red"] * 3), "4 people"),
        (entry(metric="choice"), 'needs "choices"'),
        (entry(metric="choice", choices=["red"]), 'needs "choices"'),
        (entry(metric="choice", choices=["red", " "]), "texts that are not empty"),
        (entry(metric="choice", choices="red"), "list of texts"),
        (entry(choices=["red", "blue"]), 'goes with "metric": "choice", not with exact'),
        (entry(metric="choice", choices=["red", "blue"], answers=["C"]), "'C' is none of the choices; give a letter"),
        (entry(metric="choice", choices=["blue", "green"]), "'red' is none of the choices"),
        (entry(metric="choice", choices=["red", "red"]), "'red' is several of the choices"),
        (entry(cluster=[1]), '"cluster"'),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, words: str) -> None:
    file = write(tmp_path, entry(id="first"), "", line)
    with pytest.raises(ManifestError) as caught:
        load_questions(file)
    assert f"{file}:3: " in str(caught.value)
    assert words in str(caught.value)


def test_choices_are_asked_and_the_answer_is_a_letter(tmp_path: Path) -> None:
    choices = ["blue", "red", 7]
    lines = [entry(id=str(n), metric="choice", choices=choices, answers=[a]) for n, a in enumerate(["B", "red", "c"])]
    found = load_questions(write(tmp_path, *lines))
    assert [question.answers for question in found] == [("B",), ("B",), ("C",)]
    assert found[0].choices == ("blue", "red", "7")
    assert found[0].question == "What?\nA. blue\nB. red\nC. 7\n\n" + tasks.LETTER_PLEASE
    assert [score(found[0], answer) for answer in ("B", "red", "blue")] == [1.0, 1.0, 0.0]


def test_questions_on_one_image_are_a_cluster_unless_told(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png("blue"))
    lines = [
        entry(id="1"),
        entry(id="2"),
        entry(id="3", image="b.png"),
        entry(id="4", image=None, images=["a.png", "b.png"]),
        entry(id="5", cluster="book 1"),
        entry(id="6", image="b.png", cluster="book 1"),
        entry(id="7", image=None, images=[], cluster=12),
        entry(id="8", image=None, images=[]),
        entry(id="9", image=None, images=[]),
    ]
    found = [question.cluster_id for question in load_questions(write(tmp_path, *lines))]
    assert found[0] == found[1] != found[2]
    assert found[4:7] == ["book 1", "book 1", "12"]
    assert len(set(found)) == 7


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
        (None, "no file at"),
        (b"hello", "is not an image"),
        (png()[:60], "truncated or damaged"),
        (b"", "is empty"),
    ],
)
def test_a_bad_image_is_named(tmp_path: Path, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / "b.png").write_bytes(data)
    file = write(tmp_path, entry(), entry(id="b", image="b.png"))
    with pytest.raises(MediaError, match=words) as caught:
        load_questions(file)
    assert f"{file}:2: " in str(caught.value) and "b.png" in str(caught.value)


@pytest.mark.parametrize("url", ["data:image/png;base64,@@", "data:image/png,red", "data:"])
def test_a_broken_data_url_is_said(tmp_path: Path, url: str) -> None:
    with pytest.raises(MediaError, match="data URL"):
        load_questions(write(tmp_path, entry(image=url)))


def test_an_address_without_an_image_is_said(tmp_path: Path) -> None:
    with serving() as server:
        with pytest.raises(MediaError, match="HTTP 404"):
            load_questions(write(tmp_path, entry(image=f"{server.url}/a.png")))
        with pytest.raises(MediaError, match="is not an image"):
            load_questions(write(tmp_path, entry(image=f"{server.url}/version")))
        gone = server.url
    with pytest.raises(MediaError, match="can't be fetched"):
        load_questions(write(tmp_path, entry(image=f"{gone}/a.png")))


def encoded(kind: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB", frames: int = 1) -> bytes:
    buffer = io.BytesIO()
    more = [Image.new(mode, size, number) for number in range(1, frames)]
    options: dict[str, Any] = {"save_all": True, "append_images": more} if more else {}
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(mode="I;16"), "16 bits of gray"),
        (encoded("GIF", mode="L", frames=3), "3 frames or pages"),
        (encoded(size=(402, 2)), "402 x 2, and the model takes images up to 200 times"),
    ],
    ids=["deep", "frames", "strip"],
)
def test_an_image_that_no_server_shows_is_refused_with_its_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(data)
    path = write(tmp_path, entry(id="1", image="a.png"), entry(id="2", image="b.png"))
    with pytest.raises(MediaError, match=rf"jsonl:2: b\.png .*{words}"):
        load_questions(path)


@pytest.mark.parametrize(
    ("data", "count", "limits", "words"),
    [
        (encoded(), 1, {"max_image_pixels": 1199}, "an image has 1,200 pixels, and `qvl serve` takes 1,199, unless"),
        (encoded(), 1, {"max_image_bytes": 50}, "larger --max-image-bytes"),
        (encoded(), 3, {"max_images": 2}, "there are 3 images, and `qvl serve` takes 2"),
        (encoded(), 3, {"max_request_pixels": 3599}, "its images have 3,600 pixels"),
        (encoded("TIFF"), 1, {}, "a guarded server will refuse this: An image is TIFF"),
        (encoded() + b"more", 1, {}, "4 bytes after its end"),
    ],
    ids=["pixels", "bytes", "number", "pixels of all", "format", "what follows"],
)
def test_what_a_guard_would_refuse_is_said_with_its_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    count: int,
    limits: dict[str, Any],
    words: str,
) -> None:
    (tmp_path / "b.png").write_bytes(data)
    question = entry(id="2") | {"images": ["b.png"] * count}
    question.pop("image")
    path = write(tmp_path, question)
    assert len(load_questions(path)) == 1  # servers without a guard take it
    assert capsys.readouterr().err == ""
    load_questions(path, limits=Limits(**limits))
    told = capsys.readouterr().err
    assert f"{path}:1: " in told and words in told


def test_an_image_that_vanishes_is_said(tmp_path: Path) -> None:
    question = load_questions(write(tmp_path, entry()))[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(MediaError, match="vanished"):
        question.images[0].data_url()


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


def test_the_digest_covers_the_choices() -> None:
    one, two = (Question("a", "t", "q", ("A",), "choice", choices=choices) for choices in (("x", "y"), ("x", "z")))
    assert digest([one]) != digest([two])


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
        # what folds to nothing is equal only to itself
        ("exact", "", "?", 0),
        ("exact", "!", "?", 0),
        ("exact", " ? ", "?", 1),
        ("exact", ".5", "5", 0),
        ("exact", "−4", "-4", 1),
        ("exact", "「红色」。", "红色", 1),
        ("contains", "", "?", 0),
        ("contains", "a. b", "", 0),
        ("contains", "what? no", "?", 1),
        ("relaxed", "", "?", 0),
        # a number is found as a number, whole
        ("contains", "-4", "4", 0),
        ("contains", "The value is −4.", "4", 0),
        ("contains", "是-4", "4", 0),
        ("contains", "-$4", "4", 0),
        ("contains", "-4", "-4", 1),
        ("contains", "4", "-4", 0),
        ("contains", "+4", "4", 1),
        ("contains", "$4", "4", 1),
        ("contains", "a 4-door car", "4", 1),
        ("contains", "pages 3-4", "4", 1),
        ("contains", "no.4", "4", 1),
        ("contains", "3, 4 and 5", "4", 1),
        ("contains", "0.5", "5", 0),
        ("contains", ".5", "5", 0),
        ("contains", "0,5", "5", 0),
        ("contains", "0.5", ".5", 1),
        ("contains", "5.1", "5", 0),
        ("contains", "It is 5.", "5", 1),
        ("contains", "5.0", "5", 1),
        ("contains", "1.5.2", "5", 0),
        ("contains", "1,000", "1", 0),
        ("contains", "1,000", "000", 0),
        ("contains", "1,000", "1000", 1),
        ("contains", "1000 people", "1,000", 1),
        ("contains", "1,234,567.50", "1234567.5", 1),
        ("contains", "$1,000 in all", "$1000", 1),
        ("contains", "12345678901234567890", "12345678901234567891", 0),
        ("contains", "at 4:30", "4", 0),
        ("contains", "3/4", "4", 0),
        ("contains", "½", "1", 0),
        ("contains", "on 04/05/2020", "2020", 1),
        ("contains", "10^4", "4", 0),
        ("contains", "57%", "57", 1),
        ("contains", "57", "57%", 0),
        ("contains", "4th", "4", 0),
        ("contains", "agent 007", "7", 0),
        ("contains", "24 apples", "4 apples", 0),
        ("contains", "2.4 apples", "4 apples", 0),
        # scripts without blanks
        ("contains", "图中是红色的汽车", "红色", 1),
        ("contains", "图中是蓝色的汽车", "红色", 0),
        ("contains", "これは赤い車です。", "赤い車", 1),
        ("contains", "빨간색입니다", "빨간색", 1),
        ("contains", "รถสีแดงจอดอยู่", "สีแดง", 1),
        ("contains", "共有4个苹果", "4", 1),
        ("contains", "共有14个苹果", "4", 0),
        ("contains", "人口4万", "4", 0),
        ("contains", "共十三个", "三", 0),
        ("contains", "共三个", "三", 1),
        ("contains", "是BMW牌", "bmw", 1),
        ("contains", "Ein Gürtel", "rt", 0),
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
        ("relaxed", "57%", "57", 1),
        ("relaxed", "57 %", "0.57", 1),
        ("relaxed", "0.57", "57%", 1),
        ("relaxed", "57", "57%", 1),
        ("relaxed", "5.7%", "57", 0),
        ("relaxed", "0.57", "57", 0),
        ("relaxed", "1,234,567", "1234567", 1),
        ("relaxed", "1,2", "12", 0),
        ("relaxed", ".5", "0.5", 1),
        ("relaxed", ".5", "5", 0),
        ("relaxed", "$1,000.", "1000", 1),
        ("relaxed", "−95", "-100", 1),
        ("relaxed", "95", "-100", 0),
        ("relaxed", "1.02e3", "1000", 1),
        ("relaxed", "nan", "nan", 1),
        ("relaxed", "infinity", "3", 0),
        ("relaxed", "40 apples", "40", 0),
        ("anls", "hello", "hello", 1),
        ("anls", "hallo", "hello", 0.8),
        ("anls", "hexxx", "hello", 0),
        ("anls", "", "hello", 0),
        ("anls", "  Hello \n World", "hello world", 1),
        ("anls", "hello.", "hello", 5 / 6),
        ("anls", "ab", "abcd", 0),  # NL = 0.5 is not below the threshold
        ("anls", "abc", "abcde", 0.6),
    ],
)
def test_scores(metric: str, answer: str, gold: str, expected: float) -> None:
    assert ask(metric, answer, gold) == pytest.approx(expected)


def test_the_best_gold_answer_counts() -> None:
    assert ask("anls", "hallo", "xyz", "hello") == pytest.approx(0.8)


@given(st.text(max_size=12), st.text(max_size=12))
def test_scores_are_shares_and_equal_answers_are_right(answer: str, gold: str) -> None:
    for metric in ("exact", "contains", "relaxed", "anls"):
        assert 0.0 <= ask(metric, answer, gold) <= 1.0
        assert ask(metric, gold, gold) == 1.0


def levenshtein(a: str, b: str) -> int:
    """How many characters must be inserted, removed or replaced to turn ``a`` into ``b``, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@given(st.text("aé😀", max_size=12), st.text("aé😀", max_size=12))
def test_anls_is_what_its_definition_gives(answer: str, gold: str) -> None:
    said, right = answer.lower(), gold.lower()
    longest = max(len(said), len(right))
    distance = levenshtein(said, right) / longest if longest else 0.0
    assert scoring.anls(answer, gold) == (1.0 - distance if distance < 0.5 else 0.0)


# --- ten people's answers


@pytest.mark.parametrize(
    ("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)  # the values that the VQA evaluation gives for ten people
def test_the_vqa_score_counts_people(same: int, expected: float) -> None:
    people = ["yes"] * same + [f"no {number}" for number in range(10 - same)]
    assert ask("vqa", "Yes", *people) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=12), st.sampled_from("bcde"))
def test_the_vqa_score_is_the_mean_over_those_left_out(people: list[str], said: str) -> None:
    shares = [min(sum(o == said for o in people[:i] + people[i + 1 :]) / 3, 1) for i in range(len(people))]
    assert ask("vqa", said, *people) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("The Red  car.", "red car"),
        ("a an the", ""),
        ("TWO dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("wont", "won't"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("well-known", "well known"),
        ("what?!", "what"),
        ("new\nyork\t city", "new york city"),
        ("11:30", "11:30"),
    ],
)
def test_answers_are_folded_as_vqa_does(text: str, folded: str) -> None:
    assert vqa_normalise(text) == folded


@given(st.text(" abtheone'.,", max_size=16))
def test_folding_twice_changes_case_and_blanks_no_more(text: str) -> None:
    assert vqa_normalise(text.upper()) == vqa_normalise(f"  {text} ")


# --- options

FRUIT = ("red apple", "apple", "vitamin C", "24", "none of these")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" b. ", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B. apple", "B"),
        ("B) apple", "B"),
        ("(b) apple", "B"),
        ("B: apple", "B"),
        ("**B.** apple", "B"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("The correct answer is: B. apple", "B"),
        ("Answer: b", "B"),
        ("The correct option is B", "B"),
        ("I would choose option B because (A) is green", "B"),
        ("B. It can't be (A).", "B"),
        ("It must be (B)", "B"),
        ("I think it is B", "B"),
        ("A because it is red", "A"),
        ("The answer is A", "A"),
        ("\\boxed{D}", "D"),
        ("Apple.", "B"),
        ("It shows a red apple.", "A"),
        ("That is vitamin C", "C"),
        ("The answer is 24", "D"),
        ("There are 24 of them", "D"),
        ("None of these", "E"),
        ("The answer is a red apple", "A"),
        ("B, since a red apple is larger", "B"),
    ],
)
def test_an_option_is_read_from_a_free_answer(answer: str, letter: str) -> None:
    assert choose(answer, FRUIT) == (letter, None)


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("", "names none of the options"),
        ("I can't tell.", "names none of the options"),
        ("F", "names none of the options"),
        ("A dog", "names none of the options"),
        ("124.5", "names none of the options"),
        ("A or B", "ambiguous: names A and B"),
        ("(A) and (D)", "ambiguous: names A and D"),
        ("A, D", "ambiguous: names A and D"),
        ("The answer is A and B", "ambiguous: names A and B"),
        ("Answer: A, B, D", "ambiguous: names A and B and D"),
        ("The answer is A. No, the answer is B.", "ambiguous: names A and B"),
        ("An apple, or vitamin C", "ambiguous: names B and C"),
    ],
)
def test_an_answer_that_names_no_single_option_is_wrong_and_said_so(answer: str, note: str) -> None:
    assert choose(answer, FRUIT) == (None, note)
    for gold in "ABCDE":
        found = grade(Question("i", "t", "q", (gold,), "choice", choices=FRUIT), answer)
        assert (found.score, found.note) == (0.0, note)


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        ("答案是B", ("红色", "蓝色"), "B"),
        ("答案：Ｂ。", ("红色", "蓝色"), "B"),
        ("（B）蓝色", ("红色", "蓝色"), "B"),
        ("B。", ("红色", "蓝色"), "B"),
        ("答案是B，因为A是绿色的", ("红色", "蓝色"), "B"),
        ("选B", ("红色", "蓝色"), "B"),
        ("図の答えはBです", ("赤", "青"), "B"),
        ("정답은 B입니다", ("빨강", "파랑"), "B"),
        ("图中是红色的汽车", ("红色", "蓝色"), "A"),
        ("是女人", ("男", "女"), "B"),
        ("答案是A和B", ("红色", "蓝色"), None),
        ("红色或蓝色", ("红色", "蓝色"), None),
        ("答案是C", ("红色", "蓝色"), None),
        ("\\boxed{B}", ("a dog", "a cat"), "B"),
        ("Die Antwort ist B.", ("rot", "blau"), "B"),
        ("It is -24", ("24", "12"), None),
        ("It is -24", ("24", "-24"), "B"),
        ("It is 10,000", ("10", "10000"), "B"),
        ("It is 0.25", ("25", "50"), None),
    ],
)
def test_options_in_other_scripts_and_numbers(answer: str, choices: tuple[str, ...], letter: str | None) -> None:
    assert choose(answer, choices)[0] == letter


@pytest.mark.parametrize(
    ("answer", "gold", "expected"), [("", "?", 0.0), ("!", "?", 0.0), ("?", "?", 1.0), ("The.", "yes", 0.0)]
)
def test_no_answer_is_not_what_folds_to_nothing(answer: str, gold: str, expected: float) -> None:
    assert ask("vqa", answer, *[gold] * 10) == expected


def test_options_of_equal_text_are_ambiguous_by_text_alone() -> None:
    assert choose("Red", ("red", "Red.", "blue"))[1] == "ambiguous: names A and B"
    assert choose("A", ("red", "Red.", "blue"))[0] == "A"


@given(st.integers(2, 26), st.data())
def test_every_letter_is_read_whatever_stands_around_it(count: int, data: st.DataObject) -> None:
    known = scoring.letters(count)
    letter = data.draw(st.sampled_from(known))
    form = data.draw(st.sampled_from(["{}", "({})", "{}.", "{}) opt", "The answer is {}", "Answer: {}", "[{}]"]))
    assert choose(form.format(letter), [f"text {number}" for number in range(count)]) == (letter, None)
