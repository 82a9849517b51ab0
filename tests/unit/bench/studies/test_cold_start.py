from __future__ import annotations

import json
from datetime import UTC, datetime

from bench.studies.cold_start import STEPS, Start, split, table

BEGAN = 1_700_000_000.0


def line(seconds: float, message: str) -> str:
    return json.dumps({"time": datetime.fromtimestamp(BEGAN + seconds, UTC).isoformat(), "message": message})


def test_steps_add_up_to_the_time_until_ready() -> None:
    log = "\n".join(
        [
            line(9, "Resolved architecture: Qwen2VLForConditionalGeneration"),
            "no JSON at all",
            line(10, "Multi-modal warmup completed in 0.9s"),
            line(11, "Initializing a V1 LLM engine (v0.32)"),
            line(20, "Starting to load model"),
            line(21.5, "Loading weights took 0.1 seconds"),
            line(50, "Starting to load model"),  # only the first of its kind counts
            line(60, "init engine (profile, create kv cache, warmup model) took 38 s"),
            line(61, "Application startup complete."),
            line(64, "ready. It answered in 3 s"),
        ]
    )
    found = split(log, BEGAN, BEGAN + 1.5)
    assert list(found) == [name for name, _ in STEPS]
    assert list(found.values()) == [1.5, 7.5, 1, 1, 9, 1.5, 38.5, 1, 3]
    assert sum(found.values()) == 64


def test_a_step_that_the_log_does_not_name_takes_no_time() -> None:
    found = split(line(5, "Starting to load model"), BEGAN, BEGAN + 1)
    assert found["set-up of the engine"] == 4 and found["weights"] == 0


def test_the_table_holds_medians_by_kind_of_start() -> None:
    starts = [
        Start("compiled", turn, seconds, seconds + 1, {name: seconds / len(STEPS) for name, _ in STEPS}, 0.1)
        for turn, seconds in (("first", 80.0), ("first", 100.0), ("first", 96.0), ("second", 48.0))
    ]
    shown = table(starts)
    assert "compiled, first start" in shown and "compiled, second start" in shown
    assert "10.7" in shown and "97.0" in shown and "49.0" in shown
