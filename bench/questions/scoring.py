"""How an answer is scored against the right ones: the metrics of the field, each with its definition and source."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

__all__ = [
    "ARTICLES",
    "CONTRACTIONS",
    "METRICS",
    "NUMBER_WORDS",
    "RIGHT",
    "Grade",
    "Scoring",
    "anls",
    "choose",
    "contains",
    "exact",
    "grade",
    "letters",
    "normalise",
    "relaxed",
    "vqa_normalise",
    "vqa_score",
]

#: A graded score counts as right from here on: ANLS's own threshold.
RIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Grade:
    """A score, 0 to 1, and what a reader should know about it (an answer that names no option, or several)."""

    score: float
    note: str | None = None


#: Whose rules answers are scored by: those of the papers, read as a person would, or lmms-eval's own code.
Scoring = Literal["paper", "lmms-eval"]


def grade(
    metric: str, answer: str, golds: Sequence[str], choices: Sequence[str] = (), scoring: Scoring = "paper"
) -> Grade:
    """Score one answer.

    Args:
        metric: one of `METRICS`. ``vqa`` takes ``golds`` as what several people answered and ``choice`` as the right
            options' letters; for the others any of ``golds`` is right and the best match counts.
        answer: as the model gave it. An empty answer is an answer, and wrong.
        golds: at least one.
        choices: the options' texts, for ``choice`` alone.
        scoring: ``lmms-eval`` takes `bench.questions.lmms_eval` for the metrics that it has.
    """
    if scoring == "lmms-eval":
        from bench.questions import lmms_eval

        theirs = lmms_eval.grade(metric, answer, golds, choices)
        if theirs is not None:
            return theirs
    if metric == "vqa":
        return Grade(vqa_score(answer, golds))
    if metric == "choice":
        letter, note = choose(answer, choices)
        return Grade(float(letter in golds), note)
    return Grade(max(_PER_GOLD[metric](answer, gold) for gold in golds))


# --- words ------------------------------------------------------------------------------------------------------------


#: Punctuation that decides nothing at the ends of an answer.
_ENDS = " .,;:!?\"'`*。、「」『』【】“”‘’"
_LEADING = re.compile(rf"(?:[{_ENDS.replace('.', '')}]|\.(?!\d))+")  # ".5" is not "5"


def _fold(text: str) -> str:
    """Fold Unicode form (NFKC), the minus sign, case and runs of blanks."""
    folded = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").casefold()
    return " ".join(folded.split())


def normalise(text: str) -> str:
    """Fold what should not decide: Unicode form (NFKC), case, runs of blanks, punctuation and quotes at the ends."""
    folded = _fold(text).rstrip(_ENDS)
    opening = _LEADING.match(folded)
    return folded[opening.end() :] if opening else folded


def _pair(answer: str, gold: str) -> tuple[str, str]:
    """Fold both sides; punctuation at the ends counts where the gold answer has nothing else."""
    wanted = normalise(gold)
    return (normalise(answer), wanted) if wanted else (_fold(answer), _fold(gold))


def exact(answer: str, gold: str) -> float:
    """Exact match = 1 when answer and gold are equal after folding case, blanks, Unicode form and punctuation at the
    ends."""
    said, wanted = _pair(answer, gold)
    return float(said == wanted)


def contains(answer: str, gold: str) -> float:
    """Contains = 1 when the gold answer stands in the answer as whole words (both folded as for exact match).

    A number stands there as a number: -4, 0.4, 4:30, 3/4 and 4万 are not 4, but 1,000 and 1000.0 are 1000. Scripts that
    put no blanks between words (Chinese, Japanese, Korean with its particles, Thai) have no whole words to look for:
    there the characters decide.
    """
    said, wanted = _pair(answer, gold)
    return float(said == wanted or (wanted != "" and next(_places(said, wanted), None) is not None))


#: Scripts without blanks between words, as ranges of a character class: Thai to Lao, Burmese, Khmer, Han, Kana, Hangul.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
#: A letter, digit or underscore of a script whose words stand apart.
_W = rf"[^\W{_UNSPACED}]"
_WORD = re.compile(_W)
_ONE_UNSPACED = re.compile(f"[{_UNSPACED}]")
_HAN_DIGITS = "〇零一二两兩三四五六七八九十百千万萬亿億"
#: A number as far as it reaches: its sign, thousands, decimals, a clock's minutes, a denominator, a power, 万, percent.
_FIGURE = re.compile(
    rf"""(?:(?<!{_W})(?<!-)[-+–][$€£¥]?|(?<!{_W})[$€£¥]-)?
    (?: (?<![/⁄])\d+[/⁄]\d+(?![/⁄\d])
      | \d{{1,2}}:\d\d(?!\d)
      | \d{{1,3}}(?:[,'’]\d{{3}})+(?!\d)(?:\.\d+)?
      | 0,\d+
      | \d+(?:\.\d+)*
      | (?<!{_W})(?<!\.)\.\d+
    )(?:\^-?\d+)?[{_HAN_DIGITS}]*(?:\s?%)? | [{_HAN_DIGITS}]+""",
    re.VERBOSE,
)
_VALUE = re.compile(
    r"(?P<sign>[-+–]?)(?P<digits>0|[1-9]\d*|[1-9]\d{0,2}(?:[,'’]\d{3})+)?(?P<decimals>\.\d+)?(?P<unit>%?)"
)


def _places(text: str, wanted: str) -> Iterator[tuple[int, int]]:
    """Where ``wanted`` stands in ``text`` as whole words and numbers, or, for a number, where an equal one does."""
    figures = [found.span() for found in _FIGURE.finditer(text)]
    for found in re.finditer(rf"(?=({re.escape(wanted)}))", text, re.IGNORECASE):
        start, end = found.span(1)
        cut = any(a < start < b or a < end < b for a, b in figures)
        if not cut and _apart(text, start, end):
            yield start, end
    number = _value(wanted)
    if number is None:
        return
    for start, end in figures:
        other = _value(text[start:end])
        # 57% is 57 where no unit was asked for
        if other and other[0] == number[0] and number[1] in ("", other[1]) and _apart(text, start, end):
            yield start, end


def _apart(text: str, start: int, end: int) -> bool:
    """Whether no word runs on over either end."""
    return not any(0 < at < len(text) and _WORD.match(text[at - 1]) and _WORD.match(text[at]) for at in (start, end))


def _value(figure: str) -> tuple[Decimal, str] | None:
    """Return the number that a text is, and its percent sign if any; None: it is none, or a code such as 007."""
    found = _VALUE.fullmatch(re.sub(r"[$€£¥\s]", "", figure))
    if found is None or not (found["digits"] or found["decimals"]):
        return None
    digits = re.sub(r"[,'’]", "", found["digits"] or "0") + (found["decimals"] or "")
    return Decimal(found["sign"].replace("–", "-") + digits), found["unit"]


def anls(answer: str, gold: str) -> float:
    """ANLS = 1 - NL when NL < 0.5, else 0, where NL = Levenshtein distance / length of the longer text, after folding
    case and blanks (Biten et al., "Scene Text Visual Question Answering", ICCV 2019, with DocVQA's threshold of 0.5:
    Mathew et al. 2021). Punctuation counts, as in DocVQA's own evaluation."""
    said, right = (" ".join(text.lower().split()) for text in (answer, gold))
    longest = max(len(said), len(right))
    if longest == 0:
        return 1.0
    if abs(len(said) - len(right)) >= 0.5 * longest:  # so far apart in length alone
        return 0.0
    from rapidfuzz.distance import Levenshtein  # serving imports this module for its options, and has no rapidfuzz

    distance = Levenshtein.distance(said, right) / longest
    return 1.0 - distance if distance < 0.5 else 0.0


# --- numbers ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*[$€£]?\s*(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?P<exponent>e[-+]?\d+)?"
    r"\s*(?P<percent>%?)",
    re.IGNORECASE | re.ASCII,
)


def _number(text: str) -> tuple[float, bool] | None:
    """Return the number that ``text`` is, before any division by 100, and whether it is a percentage."""
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").strip(" \t\n\"'`*")
    found = _NUMBER.fullmatch(text) or _NUMBER.fullmatch(text.rstrip(".,;:!?"))
    if found is None:
        return None
    number = float(found["sign"] + found["digits"].replace(",", "") + (found["exponent"] or ""))
    return (number, bool(found["percent"])) if math.isfinite(number) else None


def relaxed(answer: str, gold: str) -> float:
    """Relaxed accuracy = 1 when both are numbers and |answer - gold| <= 5% of |gold|, else exact match (ChartQA: Masry
    et al. 2022, section 5.1, after Methani et al. 2020).

    Thousands separators and a currency sign are taken off. Where one side alone has a percent sign, 57% may mean 0.57
    or 57 and either counts: ChartQA's charts hold both. A gold answer that is a year is a number like any other, as in
    the original, so 1950 counts for 2000.
    """
    said, right = _number(answer), _number(gold)
    if said is None or right is None:
        return exact(answer, gold)
    (value, percent), (target, target_percent) = said, right
    if percent == target_percent:
        readings = [(value, target)]
    elif percent:
        readings = [(value, target), (value / 100.0, target)]
    else:
        readings = [(value, target), (value, target / 100.0)]
    return float(any(abs(a - b) <= 0.05 * abs(b) + 1e-12 for a, b in readings))


# --- ten people's answers ---------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}
_WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
you'll you're you've
"""
#: A contraction that lacks one of its apostrophes -> the contraction.
CONTRACTIONS = {
    whole[:at] + whole[at + 1 :]: whole for whole in _WHOLE.split() for at, char in enumerate(whole) if char == "'"
}


def vqa_normalise(text: str) -> str:
    """Fold an answer as the VQA evaluation does: punctuation, case, number words to digits, articles, contractions
    (visualqa.org/evaluation; the same rules TextVQA uses).

    A punctuation mark next to a blank, or in a text with a comma between digits, vanishes; any other becomes a blank;
    periods vanish unless a digit follows. ``none`` and ``zero`` to ``ten`` become digits, ``a``, ``an``, ``the``
    vanish, and a contraction without its apostrophe gets it back (``dont``, ``don't``).
    """
    text = " ".join(text.split())
    folded, comma = text, _BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            folded = folded.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    words = (NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", folded).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer: str, golds: Sequence[str]) -> float:
    """VQA score = mean over the people of min(how many of the *others* gave this answer / 3, 1), all answers folded by
    `vqa_normalise` (Antol et al., "VQA: Visual Question Answering", ICCV 2015; TextVQA: Singh et al. 2019).

    With ten people: 0.3, 0.6, 0.9, 1 for an answer that one, two, three, four or more gave.
    """
    said, people = vqa_normalise(answer), len(golds)
    # What folds to nothing ("", "?", "the") is equal only to itself: no answer is not the answer "?".
    fold = vqa_normalise if said else _fold
    said = fold(answer)
    same = sum(fold(gold) == said for gold in golds)
    return (same * min((same - 1) / 3, 1.0) + (people - same) * min(same / 3, 1.0)) / people if same else 0.0


# --- one of several options -------------------------------------------------------------------------------------------


def letters(count: int) -> str:
    """The letters of ``count`` options, ``ABCD`` for 4."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]


def choose(answer: str, choices: Sequence[str]) -> tuple[str | None, str | None]:
    """Read from a free answer which option it names, as in MMMU (Yue et al., CVPR 2024), but never by a guess.

    The first of these that finds something decides:

    1. the answer is a letter and nothing else: ``B``, ``b.``, ``(B)``, ``**B**``
    2. the answer is an option's text
    3. a letter after "answer is", "answer:", "option" or "choice", or the like in Chinese, Japanese and Korean:
       ``The answer is B``, ``答案是B``
    4. a letter that opens the answer: ``B. a text``, ``B) a text``, ``(B) a text``, ``B: a text``
    5. letters in brackets: ``It must be (B)``
    6. letters that stand alone, then options' texts in the answer

    MMMU's own evaluation takes the last of several and draws one at random from none. Here both are wrong, since a draw
    would flip answers between two equal systems.

    Returns:
        The letter, or None; and when None, why: the answer names no option, or several.
    """
    known = letters(len(choices))
    answer, choices = (unicodedata.normalize("NFKC", answer), [unicodedata.normalize("NFKC", text) for text in choices])
    for rule in (_alone, _whole_text, _announced, _opening, _bracketed, _standing):
        found = rule(answer, choices, known)
        if len(found) == 1:
            return found.pop(), None
        if found:
            return None, f"ambiguous: names {' and '.join(sorted(found))}"
    return None, "names none of the options"


def _alone(answer: str, choices: Sequence[str], known: str) -> set[str]:
    bare = answer.strip(_ENDS + "\t\n()[]{}").upper()
    return {bare} if len(bare) == 1 and bare in known else set()


def _whole_text(answer: str, choices: Sequence[str], known: str) -> set[str]:
    said = normalise(answer)
    return {letter for letter, text in zip(known, choices, strict=True) if said and normalise(text) == said}


def _announced(answer: str, choices: Sequence[str], known: str) -> set[str]:
    # A small letter must not be the word "a" or begin one.
    letter = rf"[\s:*({{\[]*(?:([{known}])(?!{_W}|['’]\w)|([{known.lower()}])(?=[)\].,*]|\s*$)){_alone_of(known)}"
    cue = r"(?i:\banswer(?:\s+is\b|\s*:)|\boption\b|\bchoice\b)(?i:\s+(?:is|option|choice)\b)*"
    return {(big or small).upper() for big, small in re.findall(f"(?:{cue}|{_CJK_CUE}){letter}", answer)}


#: "The answer is", "choose option" and the like in Chinese, Japanese and Korean.
_CJK_CUE = "(?:答案|正解|答え|解答|选|選|정답|답)(?:应该|應該|是|为|為|は|은|选|選|择|擇|项|項|択肢|:|\\s)*"


def _opening(answer: str, choices: Sequence[str], known: str) -> set[str]:
    found = re.match(rf"[\s*(\[]*([{known}{known.lower()}])[*]*(?:[)\]]|[.:](?=\s|\*|$)){_alone_of(known)}", answer)
    return {found[1].upper()} if found else set()


def _alone_of(known: str) -> str:
    """A pattern that fails where another letter is listed: "A and B", "(A), (B)"."""
    return rf"(?!\W*?(?:[,/&、和或与與及와과]|\band\b|\bor\b)\W*(?:option\s+)?[{known}](?!{_W}))"


def _bracketed(answer: str, choices: Sequence[str], known: str) -> set[str]:
    return {letter.upper() for letter in re.findall(rf"[(\[]([{known}{known.lower()}])[)\]]", answer)}


def _standing(answer: str, choices: Sequence[str], known: str) -> set[str]:
    rest, texts = answer, set()
    # Longest first, and taken out: "dark red" is not "red", and the C of "vitamin C" is no letter of an option.
    for text, letter in sorted(zip(choices, known, strict=True), key=lambda pair: -len(pair[0])):
        wanted = text.strip()
        if len(wanted) > 1 or _ONE_UNSPACED.match(wanted):
            places = list(_places(rest, wanted))
            texts |= {letter} if places else set()
            rest = _without(rest, places)
    # "A" and "I" are words before most others in small letters: "A dog", "I think", but "A or B", "A because".
    article = r"[AI]\s+(?!(?:or|and|as|because|due|for|is|since)\b)[a-z]"
    alone = set(re.findall(rf"(?<!{_W})(?<!['’])(?!{article})([{known}])(?!{_W}|['’]\w)", rest))
    return alone or texts


def _without(text: str, places: Sequence[tuple[int, int]]) -> str:
    """Blank out what stands at ``places``, which may overlap."""
    chars = list(text)
    for start, end in places:
        chars[start:end] = " " * (end - start)
    return "".join(chars)


_PER_GOLD: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "relaxed": relaxed,
    "contains": contains,
    "open": contains,
    "anls": anls,
}
#: The names of all metrics.
METRICS = (*_PER_GOLD, "vqa", "choice")
