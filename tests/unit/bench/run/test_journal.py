from __future__ import annotations

from pathlib import Path

import pytest

from bench.load.client import Failure, Trace
from bench.load.loops import Block
from bench.machine.server_metrics import ServerPoint
from bench.questions.observe import Answer, Observation, Observed, Position
from bench.report.schema import Load
from bench.run.journal import Journal
from bench.run.measured import Stretch
from toolkit.errors import BenchError

TRACE = Trace(
    1.25, 1.5, 2.0, (1.75, 1.8750001), "\u2028 \ud83d\ude00 \x00".encode("utf-16", "surrogatepass").decode("utf-16"),
    7, 2, "stop", None, 0.25, 3, 0.125,
)  # fmt: skip
FAILED = Trace(1.0, 1.0, 2.0, failure=Failure("http", "HTTP 500", 500))
SEEN = ServerPoint(100, 10, 4, 0, None, 100, 20, 4, 0.001, 50, 800)


def test_what_was_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    load = Load.at_rate(2.5, "poisson")
    stretch = Stretch(Block((TRACE, FAILED), 1.5, 0.5, (TRACE,), 3, "stopped", (0.001, 0.002)), 2.5, SEEN, 12.5)
    bare = (Load.in_flight(4), Stretch(Block((), 0.0)))
    halves = Answer("é", "stop", (5, 6), (b"\xc3", b"\xa9"), (1, 2, 3))  # a token may hold half a character
    observed = Observed(
        {
            "a": Observation(halves, (Position(5, "", {5: -0.125, 9: -2.5}),)),
            "b": Observation(failure=Failure("mismatch", "other tokens")),
            "c": Observation(Answer("plain")),
        },
        "no prompt_logprobs",
    )
    journal = Journal(tmp_path / "out", {"--seed": "0"})
    journal.answer("baseline", "q1", TRACE)
    journal.unit("candidate", load.name, 2, [(load, stretch), bare])
    journal.unit("candidate", "too much", 2, [])
    journal.observed("again", observed)
    journal.close()

    found = Journal(tmp_path / "out", {"--seed": "0"}).resume()
    assert found.answers == {"baseline": {"q1": TRACE}}
    assert found.units == {
        ("candidate", load.name, 2): [(load, stretch), bare],
        ("candidate", "too much", 2): [],
    }
    assert found.observed == {"again": observed}
    assert not found.failures


def test_a_journal_is_gone_on_with_not_begun_anew(tmp_path: Path) -> None:
    for question in ("q1", "q2"):
        journal = Journal(tmp_path, {"--seed": "0"})
        journal.answer("baseline", question, TRACE)
        journal.close()
    assert set(Journal(tmp_path, {"--seed": "0"}).resume().answers["baseline"]) == {"q1", "q2"}
    assert (tmp_path / "run.jsonl").read_text().count('"settings"') == 2  # one line, which says so twice


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_wherever_a_process_was_killed_the_lines_before_are_good(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path, {})
    for number in range(3):
        journal.answer("baseline", f"q{number}", TRACE)
    journal.close()
    file = tmp_path / "run.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = Journal(tmp_path, {})
    assert set(again.resume().answers["baseline"]) == {"q0", "q1"}
    again.answer("baseline", "q2", TRACE)
    again.close()
    assert set(Journal(tmp_path, {}).resume().answers["baseline"]) == {"q0", "q1", "q2"}


def test_an_option_that_was_not_there_then_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"--seed": "0"})
    journal.answer("baseline", "q", TRACE)
    journal.close()
    with pytest.raises(BenchError, match="--images was not given, is scans"):
        Journal(tmp_path, {"--seed": "0", "--images": "scans"}).resume()


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, where a directory should be")
    with pytest.raises(BenchError, match=r"run\.jsonl can't be written"):
        Journal(tmp_path / "out", {}).answer("baseline", "q", TRACE)


def test_a_run_that_counted_more_goes_on(tmp_path: Path) -> None:
    before = Journal(tmp_path, {})
    load = Load.in_flight(1)
    before.unit("baseline", load.name, 0, [(load, Stretch(Block((), 0.0), server=SEEN))])
    before.close()
    written = before.file.read_text()
    before.file.write_text(written.replace('"kv_blocks"', '"busy_before":3,"kv_blocks"'))
    assert "busy_before" in before.file.read_text()
    assert Journal(tmp_path, {}).resume().units["baseline", load.name, 0][0][1].server == SEEN
