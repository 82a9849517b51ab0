"""`qvl bench` with the embedded model on real vLLM servers that it boots and stops itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.report.render.json_file import read
from bench.run.boot import free_ports
from tests.e2e.conftest import BOOT_SECONDS
from tests.e2e.test_serve import imports_torch
from tests.support.command import exit_code
from toolkit.cli import app

pytestmark = pytest.mark.e2e

QVL = [sys.executable, "-m", "toolkit.cli"]
TINY = [
    *("--per-task", "2", "--answer-tokens", "32", "--concurrency", "1,2", "--requests", "4", "--rounds", "2"),
    *("--output-tokens", "8", "--image-sizes", "112x112,168x112", "--fidelity", "4"),
]
LOADED = ["--rate", "3", "--slo", "ttft=5s,tpot=1s"]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"QVL_CACHE": str(cache)}


def servers(cache: Path) -> list[psutil.Process]:
    """The servers written down under this cache that still run."""
    alive = []
    for file in (cache / "servers").glob("*.json"):
        try:
            alive.append(psutil.Process(json.loads(file.read_text())["pid"]))
        except (psutil.NoSuchProcess, OSError, ValueError):
            continue
    return alive


def test_the_embedded_model_against_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where the zygote boots its servers; a bench as a process of its own is interrupted below."""
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    out, port = tmp_path / "report", free_ports(2)[0]
    command = ["bench", "--baseline", "demo", "--candidate", "demo", "--out", out, "--port", port, *TINY, *LOADED]
    assert exit_code(app, *command) == 0, capsys.readouterr().err
    report = read(out)
    assert report.status == "ok"
    assert any("the same model" in warning for warning in report.warnings)

    assert report.accuracy is not None
    assert report.accuracy.overall.n == 2 * len(report.accuracy.tasks) >= 12
    # Which requests share a step may tip a close call between equal models, not more.
    assert report.accuracy.overall.baseline.value >= 0.75
    assert report.accuracy.overall.difference.lost + report.accuracy.overall.difference.won <= 2

    assert [(point.load.name, point.role) for point in report.speed] == [
        (name, role) for name in ("1 in flight", "2 in flight", "3 requests/s") for role in ("baseline", "candidate")
    ]
    for point in report.speed:
        assert point.output_tokens == 8 * point.requests  # the length that was asked for, as the server counts it
        assert point.ttft_ms and point.tpot_ms and point.itl_ms and point.e2e_ms and point.client_lag_ms
        assert 0 < point.tpot_ms.p50 < point.ttft_ms.p50 < point.e2e_ms.p50
        # Less where a server that is short of time put several tokens into the first chunk.
        assert point.ttft_ms.mean < point.e2e_ms.mean < 1.02 * (point.ttft_ms.mean + 7 * point.tpot_ms.mean)
        assert point.output_tokens_per_s == pytest.approx(8 * point.requests_per_s)
        if point.concurrency:
            assert point.wall_s * 1000 * point.concurrency >= 0.9 * point.e2e_ms.mean * point.requests
            assert point.client_lag_ms.p50 < 0.1 * point.ttft_ms.p50
        assert point.errors == {} and point.stopped == [] and point.rounds == 2
        assert point.goodput and 0 < point.goodput.share <= 1
        # What the server counts agrees with what was sent: nothing came from a cache of images.
        assert point.server is not None
        assert point.server.finished == point.requests
        assert point.server.image_cache_share in (None, 0.0)
        assert point.server.preemptions == 0
    # On a busy machine a point may be marked invalid; then nothing is said about it.
    told = {point.load.name for point in report.speed} - {point.load.name for point in report.speed if point.invalid}
    assert {ratio.load for ratio in report.speed_ratios} == told

    fidelity = report.fidelity
    assert fidelity is not None and len(fidelity.items) == 4 and fidelity.missing == []
    assert fidelity.candidate.mean_kl is not None and fidelity.candidate.mean_kl.value < 1e-4  # the same model
    assert fidelity.candidate.greedy is not None and fidelity.candidate.greedy > 0.9
    for system in report.systems.values():
        assert system.booted and system.quantization == "float16"
        assert 10e6 < (system.disk_weights_bytes or 0) < 13e6
        assert 0.3e9 < (system.memory.host_bytes or 0) < 8e9
        assert system.server_version
        assert (system.memory.kv_cache_tokens or 0) > 1000
    assert "float16" in (out / "report.html").read_text()
    assert servers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.release)])
def test_an_interrupted_bench_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    command = [*QVL, "bench", "--baseline", "demo", "--candidate", "demo", "--out", str(tmp_path / "report"), *TINY]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + BOOT_SECONDS
        while sum(map(imports_torch, started := servers(tmp_path))) < 2:  # both boot
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "interrupted" in error and "Traceback" not in error
    assert not any(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in started)
    assert not (tmp_path / "report").exists()
