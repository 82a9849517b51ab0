from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.load import metrics
from bench.studies.cli import app
from bench.studies.false_claims import Noise, Server, accuracy_claims, simulated, speed_claims
from tests.support.command import exit_code
from tests.support.paths import RESULTS

CALM = Noise(0.0, 0.0, 0.0)


def test_a_simulated_load_is_that_of_its_server() -> None:
    block = simulated(Server(0.1, 0.01, share=0.5), 2, 6, np.random.default_rng(0), 1.0, CALM)
    assert [trace.number for trace in block.traces] == list(range(6))
    assert block.wall_s == pytest.approx(3 * 1.5 * (0.1 + 31 * 0.01))  # three waves, half as slow again for two
    assert {round(metrics.tpot(trace) or 0.0, 6) for trace in block.traces} == {0.015}


def test_what_is_far_apart_is_claimed_and_what_is_equal_is_not() -> None:
    server = Server()
    slow = speed_claims({"baseline": server, "candidate": server.slower(1.3)}, 8, 0, Noise())
    assert set(slow["headlines"].values()) == {"worse"} and len(slow["headlines"]) == 3
    same = speed_claims({"baseline": server, "candidate": server}, 3, 0, Noise())
    assert "worse" not in same["headlines"].values()
    assert accuracy_claims(400, 0.2, 0.0, 0) == "worse" and accuracy_claims(400, 0.0, 0.0, 0) == "no worse"


def test_the_study_writes_what_it_found(tmp_path: Path) -> None:
    few = ("--runs", 2, "--searches", 2, "--rounds", 3, "--questions", 200)
    assert exit_code(app, "false-claims", "--out", tmp_path / "r", *few) == 0
    found = json.loads((tmp_path / "r" / "false-claims.json").read_text())
    assert found["identical"]["headlines"] == 8
    assert "headlines claim a difference" in (tmp_path / "r" / "README.md").read_text()


def test_of_identical_servers_at_most_one_headline_in_twenty_claims_a_difference() -> None:
    found = json.loads((RESULTS / "false-claims" / "false-claims.json").read_text())
    assert found["identical"]["runs"] >= 24
    assert found["identical"]["claims"] <= 0.05 * found["identical"]["headlines"]
    assert found["5% slower"]["8 rounds"]["any"] >= 0.85 * found["5% slower"]["8 rounds"]["runs"]
    assert found["2 points worse"]["worse"] >= 0.85 * found["2 points worse"]["runs"]
