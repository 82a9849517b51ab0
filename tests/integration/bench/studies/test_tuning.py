"""The steps of `make tune-bench`: each once, in order, and none after the time is up."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.studies.tuning import OutOfTime, _Steps, spreads

CODES = {"fails": 2, "late": 3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    found: list[list[str]] = []

    def call(command: list[str]) -> int:
        found.append(command[2:])  # without `python -m`
        return next((code for word, code in CODES.items() if word in command), 0)

    monkeypatch.setattr("bench.cli.commands.subprocess.call", call)
    return found


def test_a_step_is_done_once(tmp_path: Path, calls: list[list[str]]) -> None:
    for _ in range(2):
        _Steps(tmp_path, 1).run("a", ["x", "y"])
    assert calls == [["toolkit.cli", "x", "y"]]


def test_what_a_step_makes_is_its_mark(tmp_path: Path, calls: list[list[str]]) -> None:
    steps, made = _Steps(tmp_path, 1), tmp_path / "made"
    steps.run("a", ["x"], made=made)
    steps.run("a", ["x"], made=made)  # it made nothing: again
    made.mkdir()
    steps.run("a", ["x"], made=made)
    assert len(calls) == 2


def test_a_step_that_fails_is_not_done(tmp_path: Path, calls: list[list[str]]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            _Steps(tmp_path, 1).run("a", ["fails"])
        assert caught.value.code == 2
    assert len(calls) == 2


def test_out_of_time(tmp_path: Path, calls: list[list[str]]) -> None:
    with pytest.raises(OutOfTime):
        _Steps(tmp_path, 0).run("a", ["x"])
    assert calls == []
    with pytest.raises(OutOfTime):
        _Steps(tmp_path, 1).run("a", ["late"])  # a step that has minutes of its own
    _Steps(tmp_path, 1).run("a", ["x"])
    assert calls == [["toolkit.cli", "late"], ["toolkit.cli", "x"]]


@pytest.mark.parametrize(
    ("gpus", "on_gpu", "names"),
    [
        (1, True, ["one"]),
        (2, True, ["one", "tp2", "dp2"]),
        (4, True, ["one", "tp2", "dp2", "tp4", "dp4", "tp2-dp2"]),
        (0, False, ["one", "tp2", "dp2"]),
    ],
)
def test_spreads_take_no_more_gpus_than_there_are(gpus: int, on_gpu: bool, names: list[str]) -> None:
    found = spreads(gpus, on_gpu)
    assert list(found) == names
    assert all(tp * dp <= max(gpus, 2 - on_gpu) for tp, dp in found.values())
