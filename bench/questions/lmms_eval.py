"""Scores as lmms-eval gives them, quirks and all, for figures that are to stand beside published ones.

Each function does what the task of lmms-eval does with an answer (`lmms_eval/api/metrics.py`, `tasks/chartqa`,
`tasks/textvqa`, `tasks/mmmu`; MMMU's rules are its authors' own). Where they differ from the papers, and so from
`bench.questions.scoring`:

- ANLS: an answer at a distance of exactly one half scores 0.5; lengths are those before blanks are folded.
- Relaxed accuracy: ``57%`` is 0.57, ``1,204`` and ``$12`` are no numbers; a right answer of 0 must be matched as text.
- VQA: ``,`` and ``?`` vanish first and ``'s`` becomes a word; all periods but those before a digit vanish.
- MMMU, several options: the last one named. An answer that names none gets one at random there; here it is wrong,
  since a draw would flip answers between two equal systems.
- MMMU, open questions: any number or phrase after "is", "so", "answer" and the like, numbers to two decimals; a text
  that holds the right one is right.

Tested against tables that lmms-eval's own code made (commit 75571cfe of 2026-08-06).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.questions.scoring import ARTICLES, CONTRACTIONS, NUMBER_WORDS, Grade, letters

__all__ = ["CAPS", "anls", "choice", "grade", "open_answer", "relaxed", "vqa", "vqa_fold"]

#: Longest answers in tokens, by set. TextVQA has no limit but that of the model's class there, Qwen2-VL's.
CAPS = {"docvqa": 32, "chartqa": 16, "textvqa": 128, "mmmu": 128}


def grade(metric: str, answer: str, golds: Sequence[str], choices: Sequence[str] = ()) -> Grade | None:
    """Score an answer by one of these rules; None where lmms-eval has no rule of that name."""
    if metric == "anls":
        return Grade(anls(answer, golds))
    if metric == "relaxed":
        return Grade(max(relaxed(answer, gold) for gold in golds))
    if metric == "vqa":
        return Grade(vqa(answer, golds))
    if metric == "open":
        return Grade(open_answer(answer, golds))
    if metric == "choice":
        letter = choice(answer, choices)
        return Grade(float(letter in golds), None if letter else "names none of the options")
    return None


def anls(answer: str, golds: Sequence[str]) -> float:
    """ANLS = 1 - the least distance to a right answer / length of the longer text, and 0 below 0.5."""
    from rapidfuzz.distance import Levenshtein

    distances = []
    for gold in golds:
        said, right = (" ".join(text.lower().split()) for text in (answer, gold))
        longest = max(len(gold.upper()), len(answer.upper()))
        distances.append(Levenshtein.distance(said, right) / longest if longest else 0.0)
    found = 1.0 - min(distances)
    return found if found >= 0.5 else 0.0


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(answer: str, gold: str) -> float:
    """Relaxed accuracy = 1 when both are Python's numbers, a percentage divided by 100, and |answer - gold| / |gold| is
    at most 5%; else when they are equal but for case."""
    said, right = _float(answer), _float(gold)
    if said is not None and right:
        return float(abs(said - right) / abs(right) <= 0.05)
    return float(answer.lower() == gold.lower())


#: In the order in which they are taken out. Whether one vanishes or becomes a blank is told by the text before.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
#: That many periods are taken out: a flag stands in the place of a count there.
_PERIODS = 32


#: Of "somebody" the processor takes the apostrophe away, and gives none.
_CONTRACTIONS = {short: whole for short, whole in CONTRACTIONS.items() if short != "somebodyd"} | {
    "somebody'd": "somebodyd"
}


def vqa_fold(text: str) -> str:
    """Fold an answer as the EvalAI processor of VQA does, in TextVQA's version."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    folded, comma = text, _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in _MARKS:
        gone = comma or f"{mark} " in text or f" {mark}" in text
        folded = folded.replace(mark, "" if gone else " ")
    folded = _PERIOD.sub("", folded, count=_PERIODS)
    words = [NUMBER_WORDS.get(word, word) for word in folded.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(answer: str, golds: Sequence[str]) -> float:
    """VQA score = mean over the people of min(how many of the others gave this answer / 3, 1), folded."""
    said, people = vqa_fold(answer), [vqa_fold(gold) for gold in golds]
    same = sum(gold == said for gold in people)
    shares = [min(1.0, (same - (gold == said)) / 3) for gold in people]
    return sum(shares) / len(shares)


# --- MMMU -------------------------------------------------------------------------------------------------------------


def choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the option that an answer names last: its letter in brackets, else before a blank, else before a period,
    else, of answers of more than five words, its text; None where there is none."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    known = letters(len(choices))
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in known if form.format(letter) in answer]
        if named:
            return _last(named, [answer.rfind(place.format(letter)) for letter in named])
    if len(answer.split()) <= 5:
        return None
    lower = answer.lower()
    by_text = [(letter, text.lower()) for letter, text in zip(known, choices, strict=True) if text.lower() in lower]
    return _last([letter for letter, _ in by_text], [lower.rfind(text) for _, text in by_text]) if by_text else None


def _last(named: Sequence[str], places: Sequence[int]) -> str:
    return named[max(range(len(named)), key=lambda at: places[at])]


_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    )
)


def open_answer(answer: str, golds: Sequence[str]) -> float:
    """Open questions of MMMU: 1 when a number in what the answer comes down to equals a right one, to two decimals, or
    a text in it holds a right one."""
    wanted = [form for gold in golds for form in _forms(gold)]
    parts = _essence(answer)
    parts += [found for part in parts for pattern in _NUMBERS for found in pattern.findall(part)]
    said = {form for part in parts for form in _forms(part)}
    texts = [form for form in wanted if isinstance(form, str)]
    return float(any(any(text in form for text in texts) if isinstance(form, str) else form in wanted for form in said))


def _forms(text: str) -> list[str | float]:
    """A number to two decimals; else the text, a single letter with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _essence(answer: str) -> list[str]:
    """What an answer comes down to: of each line the shortest part behind a cue, of the last behind ``=`` too."""
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")  # a sentence would end before a capital, of which there is none any more
    found = []
    for number, line in enumerate(lines):
        cues = (*_CUES, "=") if number == len(lines) - 1 else _CUES
        tails = [line.split(cue)[-1].strip() for cue in cues if cue in line]
        shortest = ""
        for tail in tails:  # an empty one gives way to the next
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [whole]
