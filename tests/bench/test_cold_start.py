from __future__ import annotations

from pathlib import Path

import pytest

from bench.cold_start import BEFORE, STARTS, Start, draw, markdown, phases, summarise
from toolkit.errors import BenchError

LINES = [
    (1.0, "starting demo on port 8123: importing vLLM (0 s)"),
    (1.1, "some warning"),
    (9.0, "starting demo on port 8123: loading weights (8 s)"),
    (12.0, "starting demo on port 8123: importing vLLM (11 s)"),
    (12.5, "ready: demo at http://127.0.0.1:8123/v1 after 11 s"),
    (99.0, "log: somewhere"),
]


def test_phases_add_up_to_the_time_until_ready() -> None:
    found = phases(LINES)
    assert found == {BEFORE: 1.0, "importing vLLM": 8.5, "loading weights": 3.0}
    assert sum(found.values()) == 12.5


def test_a_start_that_fails_shows_what_was_printed() -> None:
    with pytest.raises(BenchError, match="error: no such directory"):
        phases([(0.5, "error: no such directory")])


def test_the_report_says_medians_and_the_ratio_of_pairs(tmp_path: Path) -> None:
    seconds = [(100, 50), (80, 48), (200, 60)]
    starts = [
        Start(kind, float(value), {"compiling": value - 10.0, "weights": 10.0})
        for pair in seconds
        for kind, value in zip(STARTS, pair, strict=True)
    ]
    summary = summarise(starts)
    assert summary["median_seconds"] == {"empty caches": 100, "kept caches": 50}
    assert summary["median_phases"]["kept caches"] == {"compiling": 40, "weights": 10}
    assert summary["second_over_first"] == 0.5
    page = markdown(
        {"summary": summary, "command": "qvl serve demo", "runs": 3, "cpu": "a CPU", "gpus": [], "versions": {"v": "1"}}
    )
    assert "| compiling | 90.0 | 40.0 |" in page and "**100.0** | **50.0**" in page and "first: 50%" in page
    draw(summary, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
