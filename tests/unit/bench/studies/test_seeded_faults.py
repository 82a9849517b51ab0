from __future__ import annotations

import random
import re
from pathlib import Path

from bench.studies.seeded_faults import SYSTEMS, Found, Read, System, judge, table
from tests.support.factory import questions

ASKED = questions(500)
FAULT = System("bad", "ours, broken", "ours", lambda work, samples: None)
SOUND = System("ours", "ours", None, lambda work, samples: None)


def made(wrong: set[int], kl: float, seed: int = 0) -> Read:
    rng = random.Random(seed)
    size = range(len(ASKED))
    return Read(
        right=[i not in wrong for i in size],
        kl=[kl * rng.expovariate(1.0) for _ in size],
        tokens=[3] * len(ASKED),
        same=[i not in wrong for i in size],
    )


FP16 = made(set(range(20)), 0.0)
OURS = made(set(range(21)), 3e-4)


def found(other: Read, sound: Read | None) -> Found:
    return judge(FAULT if sound else SOUND, ASKED, FP16, other, sound, 0.01)


def test_the_sound_one_is_no_worse_and_a_broken_one_is() -> None:
    assert found(OURS, None).overall.verdict == "no worse"
    broken = found(made(set(range(60)), 0.3), OURS)
    assert broken.overall.verdict == "worse"
    assert broken.kl_ratio is not None and broken.kl_ratio.low > 100


def test_a_fault_that_costs_no_answers_is_told_by_the_drift_alone() -> None:
    quiet = found(Read(OURS.right, [1.5 * x for x in OURS.kl], OURS.tokens, OURS.same), OURS)
    assert quiet.overall.verdict == "no worse"
    assert quiet.kl_ratio is not None
    assert abs(quiet.kl_ratio.value - 1.5) < 1e-9 and quiet.kl_ratio.low > 1.4
    same = found(OURS, OURS)
    assert same.kl_ratio is not None and (same.kl_ratio.low, same.kl_ratio.high) == (1.0, 1.0)


def test_drift_is_per_token() -> None:
    value = found(OURS, None).kl
    assert abs(value.value - sum(OURS.kl) / sum(OURS.tokens)) < 1e-12
    assert value.low < value.value < value.high


def test_the_table_has_a_row_each_and_says_the_verdicts() -> None:
    lines = table([found(OURS, None), found(made(set(range(60)), 0.3), OURS)]).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "**no worse**" in lines[3] and "**worse**" in lines[4] and "| yes |" in lines[4]


def test_every_fault_names_what_it_would_be_without() -> None:
    names = [system.name for system in SYSTEMS]
    assert len(set(names)) == len(names)
    assert {system.sound for system in SYSTEMS} - {None} <= set(names)
    assert sum(system.sound is not None for system in SYSTEMS) == 3
    assert all(re.fullmatch(r"[a-z-]+", name) and not Path(name).is_absolute() for name in names)
