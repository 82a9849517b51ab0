"""A report calls a checkpoint with a clear fault worse and the good one no worse, and compare stops at the fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.report.render.json_file import read
from bench.studies.seeded_faults import SYSTEMS
from tests.e2e.conftest import Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.release]


def qvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_a_fault_is_worse_and_a_good_checkpoint_is_not(served: Served, awq_gemm: Path, tmp_path: Path) -> None:
    # AutoAWQ's duo scaling without the mend: docs/results/seeded-faults has what it costs, and what smaller faults do.
    found_in_the_wild = next(system for system in SYSTEMS if system.name == "autoawq-duo-cpu")
    found_in_the_wild.made(tmp_path, 8)
    faulty = tmp_path / found_in_the_wild.name
    baseline = served("demo").url
    for name, model in (("good", awq_gemm), ("bad", faulty)):
        done = qvl(
            *("bench", "--baseline", baseline, "--candidate", served(model).url, "--out", str(tmp_path / name)),
            *("--tasks", "demo", "--per-task", "20", "--margin", "5", "--concurrency", "none", "--fidelity", "16"),
            *("--question-concurrency", "8", "--answer-tokens", "40"),
        )
        assert done.returncode == 0, done.stderr
    good, bad = (read(tmp_path / name) for name in ("good", "bad"))
    assert good.verdict.accuracy == "no worse", good.verdict.sentence
    assert bad.verdict.accuracy == "worse", bad.verdict.sentence
    if good.fidelity and bad.fidelity:
        assert good.fidelity.candidate.mean_kl and bad.fidelity.candidate.mean_kl
        assert bad.fidelity.candidate.mean_kl.low > good.fidelity.candidate.mean_kl.high

    done = qvl("compare", str(tmp_path / "good"), str(tmp_path / "bad"), "--markdown", "-")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("**worse**") and "is worse beyond chance" in done.stderr
    page = tmp_path / "compare.html"
    turned = [str(tmp_path / "bad"), str(tmp_path / "good")]
    gated = qvl("compare", *turned, "--fail-if", "accuracy<-5pt", "--html", str(page))
    assert gated.returncode == 0, gated.stderr
    assert page.read_text().startswith("<!doctype html>")
