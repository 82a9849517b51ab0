"""The expected scores are what lmms-eval's own code gave (commit 75571cfe of 2026-08-06)."""

from __future__ import annotations

from typing import Any

import pytest

from bench.questions import lmms_eval
from bench.questions.scoring import grade
from bench.report.compare.comparison import compare
from bench.report.compare.figures import Side
from bench.run.config import BenchConfig
from tests.support.factory import CONFIG, questions, report
from toolkit.errors import BenchError

PEOPLE = ["yes"] * 3 + ["no"] * 7
OPTIONS = ("a dog", "a cat", "red", "vitamin C")
TABLE: list[tuple[str, str, list[str], float]] = [
    ("anls", "abcd", ["abxy"], 0.5),
    ("anls", "abcd", ["axyz"], 0.0),
    ("anls", "ab", ["ax"], 0.5),
    ("anls", "Invoice", ["invoice"], 1.0),
    ("anls", "a  b", ["a b"], 1.0),
    ("anls", "", [""], 1.0),
    ("anls", "12.5", ["12.50"], 0.8),
    ("anls", "yes", ["y"], 0.0),
    ("anls", "abcdef", ["abcxyz"], 0.5),
    ("relaxed", "57%", ["57"], 0.0),
    ("relaxed", "57%", ["0.57"], 1.0),
    ("relaxed", "0.57", ["57%"], 1.0),
    ("relaxed", "1,204", ["1204"], 0.0),
    ("relaxed", "1204", ["1,204"], 0.0),
    ("relaxed", "$12", ["12"], 0.0),
    ("relaxed", "$12", ["$12"], 1.0),
    ("relaxed", "0", ["0"], 1.0),
    ("relaxed", "0.0", ["0"], 0.0),
    ("relaxed", "104", ["100"], 1.0),
    ("relaxed", "105", ["100"], 1.0),
    ("relaxed", "106", ["100"], 0.0),
    ("relaxed", "Yes", ["yes"], 1.0),
    ("relaxed", "yes.", ["yes"], 0.0),
    ("relaxed", " 12 ", ["12"], 1.0),
    ("relaxed", "12.", ["12"], 1.0),
    ("relaxed", "2019", ["2000"], 1.0),
    ("relaxed", "-3", ["3"], 0.0),
    ("relaxed", "1e3", ["1000"], 1.0),
    ("relaxed", "nan", ["5"], 0.0),
    ("relaxed", "57 %", ["57%"], 1.0),
    ("relaxed", "58%", ["57%"], 1.0),
    ("vqa", "yes", PEOPLE, 0.9),
    ("vqa", "No.", PEOPLE, 1.0),
    ("vqa", "the no", PEOPLE, 1.0),
    ("vqa", "1,000", ["1000"] * 10, 1.0),
    ("vqa", "1,000", ["1,000"] * 10, 1.0),
    ("vqa", "1 000", ["1,000"] * 10, 0.0),
    ("vqa", "two", ["2"] * 10, 1.0),
    ("vqa", "None", ["0"] * 10, 1.0),
    ("vqa", "dont", ["don't"] * 4 + ["x"] * 6, 1.0),
    ("vqa", "bob's", ["bobs"] * 10, 0.0),
    ("vqa", "bob's", ["bob 's"] * 10, 1.0),
    ("vqa", "red, blue", ["red blue"] * 10, 1.0),
    ("vqa", "a.b", ["ab"] * 10, 1.0),
    ("vqa", "3.5", ["3.5"] * 10, 1.0),
    ("vqa", "u.s.a.", ["usa"] * 10, 1.0),
    ("vqa", "left-hand", ["left hand"] * 10, 1.0),
    ("vqa", "left - hand", ["left hand"] * 10, 1.0),
    ("vqa", "left - hand", ["left  hand"] * 10, 1.0),
    ("vqa", "?", [""] * 10, 1.0),
    ("vqa", "", ["a"] * 10, 1.0),
    ("vqa", "stop!", ["stop"] * 10, 1.0),
    ("vqa", "@home", ["home"] * 10, 1.0),
    ("vqa", "it's", ["its"] * 10, 0.0),
    ("open", "5", ["5"], 1.0),
    ("open", "5.0", ["5"], 1.0),
    ("open", "5.004", ["5"], 1.0),
    ("open", "5.01", ["5"], 0.0),
    ("open", "The answer is 1,204.", ["1204"], 1.0),
    ("open", "x = 12", ["12"], 1.0),
    ("open", "about 12 or 13", ["13"], 1.0),
    ("open", "B", ["b"], 1.0),
    ("open", "Paris", ["paris"], 1.0),
    ("open", "It is Paris, France", ["Paris"], 1.0),
    ("open", "so 4 and\nfinal 7", ["7"], 1.0),
    ("open", "so 4 and\nfinal 7", ["4"], 1.0),
    ("open", "3/4", ["3/4"], 1.0),
    ("open", "0.75", ["3/4"], 0.0),
    ("open", "57%", ["57"], 1.0),
    ("open", "-4", ["4"], 0.0),
    ("open", "1e3", ["1000"], 1.0),
    ("open", "no idea", ["5"], 0.0),
    ("open", "the result is a dog", ["cat", "dog"], 1.0),
    ("open", "$12", ["12"], 1.0),
    ("open", "x", ["x"], 1.0),
    ("open", "an x y", ["x"], 1.0),
    ("open", "24/7", ["24"], 1.0),
    ("choice", "B", ["B"], 1.0),
    ("choice", "(B)", ["B"], 1.0),
    ("choice", "B.", ["B"], 1.0),
    ("choice", "b", ["B"], 0.0),
    ("choice", "The answer is (A) or (C)", ["C"], 1.0),
    ("choice", "A and then B", ["B"], 1.0),
    ("choice", "A, no: C", ["C"], 1.0),
    ("choice", "I think it is a cat for sure", ["B"], 1.0),
    ("choice", "a cat", ["B"], 0.0),
    ("choice", "vitamin C is in it", ["C"], 1.0),
    ("choice", "it has red and a dog in it too", ["A"], 1.0),
    ("choice", "nothing of these at all I would say", ["A"], 0.0),
    ("choice", "B) a cat", ["B"], 0.0),
    ("choice", "Answer: B", ["B"], 1.0),
    ("choice", "B. a cat", ["B"], 1.0),
    ("choice", "", ["A"], 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "golds", "score"), TABLE)
def test_scores_are_those_of_lmms_eval(metric: str, answer: str, golds: list[str], score: float) -> None:
    choices = OPTIONS if metric == "choice" else ()
    assert grade(metric, answer, golds, choices, "lmms-eval").score == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("What's that", "what 's that"),
        ("somebody'd cant", "somebodyd can't"),
        ("a/b c?", "b c"),
        ("None, and ten!", "0 and 10"),
        ("3.5 e.g. U.S.", "3.5 eg us"),
        ("the (big) dog", "big dog"),
    ],
)
def test_answers_are_folded_as_there(text: str, folded: str) -> None:
    assert lmms_eval.vqa_fold(text) == folded


@pytest.mark.parametrize(
    ("metric", "answer", "gold", "paper", "theirs"),
    [
        ("anls", "abcd", "abxy", 0.0, 0.5),
        ("relaxed", "57%", "57", 1.0, 0.0),
        ("relaxed", "1,204", "1204", 1.0, 0.0),
        ("relaxed", "$12", "12", 1.0, 0.0),
        ("open", "57%", "57", 1.0, 1.0),
        ("open", "24/7", "24", 0.0, 1.0),
        ("exact", "Yes.", "yes", 1.0, 1.0),  # no rule of theirs
    ],
)
def test_the_two_differ_where_they_are_said_to(
    metric: str, answer: str, gold: str, paper: float, theirs: float
) -> None:
    assert (grade(metric, answer, [gold]).score, grade(metric, answer, [gold], (), "lmms-eval").score) == (
        paper,
        theirs,
    )


def config(**given: Any) -> BenchConfig:
    return BenchConfig(baseline="http://a", candidate="http://b", out=CONFIG.out, **given)


def test_limits_of_tokens_are_theirs_unless_told() -> None:
    for tasks, limit in (("docvqa", 32), ("chartqa:dir@test", 16), ("textvqa", 128), ("mmmu@dev", 128)):
        assert config(tasks=tasks, scoring="lmms-eval").answer_tokens == limit
    assert config(tasks="docvqa", scoring="lmms-eval", answer_tokens=7).answer_tokens == 7
    assert config(tasks="docvqa").answer_tokens == config(tasks="q.jsonl", scoring="lmms-eval").answer_tokens == 64
    with pytest.raises(BenchError, match="--scoring 'vlmeval': write paper or lmms-eval"):
        config(scoring="vlmeval")


def test_a_report_says_whose_rules_it_scores_by_and_is_compared_with_its_like() -> None:
    asked = [type(q)(q.id, q.task, q.question, ("yxes",), "relaxed") for q in questions(4)]
    theirs = report(asked=asked, settings=CONFIG.replaced(scoring="lmms-eval"))
    assert theirs.workload.scoring == "lmms-eval" and report().workload.scoring == "paper"
    with pytest.raises(BenchError, match="scored by the rules of paper and of lmms-eval"):
        compare(Side(report(asked=asked), "candidate"), Side(theirs, "candidate"))
