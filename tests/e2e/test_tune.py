"""`qvl tune` on the embedded model under the real vLLM: measured, killed, resumed, and then served with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.studies.capacity_check import compare, read_log
from serve.plan.capacity import kv_tokens
from serve.plan.tuned import tuned
from serve.settings.config import ServerConfig
from serve.settings.profiles import Profile
from tests.e2e.conftest import Served, free_port
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.paths import cache_dir, demo_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]

COMMAND = [sys.executable, "-m", "toolkit.cli", "tune", "demo", "--concurrency", "1,2", "--requests", "4"]
COMMAND += ["--output-tokens", "6", "--image-sizes", "112x112", "--only", "vllm,few-sequences", "--boot-timeout", "240"]
COMMAND += ["--max-model-len", "1024", "--json"]


def journal() -> list[dict[str, object]]:
    files = list(cache_dir("tune").glob("*.json"))
    if not files:
        return []
    trials: list[dict[str, object]] = json.loads(files[0].read_text())["trials"]
    return trials


@pytest.mark.release
def test_killed_resumed_and_served(cache: Path) -> None:
    first = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 280
    while not any(trial["figures"] for trial in journal()):  # until a load has been measured
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = next(trial for trial in journal() if trial["figures"])
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["complete"] and [trial["failed"] for trial in told["trials"]] == [None, None]
    after = next(trial for trial in told["trials"] if trial["name"] == before["name"])
    for load, figures in dict(before["figures"]).items():  # type: ignore[call-overload]
        assert after["figures"][load] == figures  # measured once
    (path,) = cache_dir("profiles").glob("*.json")
    profile = Profile.loads_text(path.read_text(), path.name)
    assert {load.concurrency for load in profile.loads} == {1, 2}
    assert all(figure > 0 for load in profile.loads for figure in load.figures.values())
    notes: list[str] = []
    options = tuned("demo", ServerConfig(port=free_port(), profile="latency"), notes.append)
    assert notes[0].startswith(f"profile latency: {profile.chosen('latency')}")
    assert options.settings == profile.candidates[profile.chosen("latency")]


def test_the_plan_counts_the_tokens_that_vllm_reports(served: Served) -> None:
    checkpoint, options = Checkpoint.open(demo_checkpoint()), ServerConfig(port=free_port())
    given = options.kv_bytes_for(checkpoint)  # what `serve` tells vLLM to take
    reported = read_log(served("demo").log.read_text(errors="replace"))
    estimated = {"kv_tokens": kv_tokens(checkpoint, given, options.dtype_for(checkpoint))}
    assert abs(compare(estimated, reported)["kv_tokens"]) <= 1.0
