"""How long a start takes, from the command to the first answer, and where the time goes.

    python -m bench.studies cold-start --out docs/results/cold-start [--model demo] [--repeat 3]

Starts `qvl serve --detach` with and without compiling, each first with an empty compile cache, then with the one that
was kept. Times come from the time stamps of the server's own JSON log. Runs on a GPU unchanged.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from bench.machine.environment import cpu_name, gpu_names, system_name, versions
from bench.run.boot import free_ports
from bench.studies.settings import ColdStartSettings
from serve.http.images import sample_image
from serve.process import state
from serve.process.supervisor import stopped_by_signals

__all__ = ["STEPS", "Start", "run", "split"]

#: What is over when a line of the log says so for the first time. Steps that do not occur take no time.
STEPS = (
    ("interpreter, checks before the boot", None),
    ("imports of the API server", "Resolved architecture"),
    ("config, processor, warm-up of images", "Multi-modal warmup completed"),
    ("start and imports of the engine", "Initializing a V1 LLM engine"),
    ("set-up of the engine", "Starting to load model"),
    ("weights", "Loading weights took"),
    ("profiling, compiling, KV cache, warm-up", "init engine (profile"),
    ("endpoint", "Application startup complete"),
    ("first probe", '"message": "ready.'),
)


@dataclass
class Start:
    """One start. Times in seconds."""

    #: "compiled" or "not compiled".
    mode: str
    #: "first" with an empty compile cache, "second" with what the first has left there.
    turn: str
    #: From the command to ready, as the server itself sees it.
    ready: float
    #: From the command to the first answer to a client that asked as soon as `qvl serve --detach` returned.
    first_answer: float
    steps: dict[str, float]
    #: The machine's load average over the last minute, before the start.
    load: float


def split(log: str, began: float, spawned: float) -> dict[str, float]:
    """Return the seconds of each step, from a JSON log and the times (since the epoch) of command and first process."""
    marks = [text for _, text in STEPS]
    seen: dict[str, float] = {}
    for line in log.splitlines():
        if not line.startswith('{"time"'):
            continue
        for mark in marks:
            if mark is not None and mark not in seen and mark in line.replace('\\"', '"'):
                seen[mark] = datetime.fromisoformat(json.loads(line)["time"]).timestamp()
    steps, last = {}, began
    for name, mark in STEPS:
        at = spawned if mark is None else seen.get(mark, last)
        steps[name] = round(at - last, 2)
        last = at
    return steps


def start(model: str, mode: str, turn: str, caches: Path, scratch: Path) -> Start:
    """Start a server, ask it once, stop it."""
    load = os.getloadavg()[0]
    port = free_ports(1)[0]
    qvl = [sys.executable, "-m", "toolkit.cli"]
    flag = "--compile" if mode == "compiled" else "--no-compile"
    environment = {
        **os.environ,
        "QVL_CACHE": str(scratch),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    began = time.time()
    command = [*qvl, "serve", model, "--detach", "--port", str(port), "--log-format", "json", flag]
    try:
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        known = json.loads((scratch / "servers" / f"{port}.json").read_text())
        spawned = time.time() - state.ServerState(**known).uptime
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": sample_image()}},
            {"type": "text", "text": "Which shape?"},
        ]
        body = {"model": known["model_name"], "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False).raise_for_status()
        first_answer = time.time() - began
        log = Path(known["log"]).read_text()
    finally:
        subprocess.run([*qvl, "stop", "--port", str(port)], env=environment, check=False, stdout=subprocess.DEVNULL)
    steps = split(log, began, spawned)
    return Start(mode, turn, round(sum(steps.values()), 2), round(first_answer, 2), steps, round(load, 2))


def measure(model: str, modes: list[str], repeat: int) -> list[Start]:
    """Start first and second of each mode, alternating, so that a slow minute of the machine hits all alike."""
    found: list[Start] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(repeat):
            for mode in modes:
                caches = Path(scratch, f"{mode} {number}".replace(" ", "-"))
                for turn in ("first", "second"):
                    one = start(model, mode, turn, caches, Path(scratch))
                    print(json.dumps(asdict(one)), flush=True)
                    found.append(one)
    return found


def table(starts: list[Start]) -> str:
    """Return medians as a Markdown table."""
    groups = sorted({(one.mode, one.turn) for one in starts}, key=lambda g: (g[0] == "compiled", g[1]))
    of = {group: [one for one in starts if (one.mode, one.turn) == group] for group in groups}
    lines = ["| step (s) | " + " | ".join(f"{mode}, {turn} start" for mode, turn in groups) + " |"]
    lines += ["|---|" + "---|" * len(groups)]
    for name, _ in STEPS:
        cells = [f"{statistics.median(one.steps[name] for one in of[group]):.1f}" for group in groups]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, pick in (("**ready**", "ready"), ("**first answer**", "first_answer")):
        cells = [f"**{statistics.median(getattr(one, pick) for one in of[group]):.1f}**" for group in groups]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("| starts | " + " | ".join(str(len(of[group])) for group in groups) + " |")
    return "\n".join(lines)


def run(settings: ColdStartSettings) -> None:
    """Measure and write cold-start.json and table.md."""
    with stopped_by_signals():
        starts = measure(settings.model, settings.modes.split(","), settings.repeat)
    settings.out.mkdir(parents=True, exist_ok=True)
    environment = {"versions": versions(), "system": system_name(), "cpu": cpu_name(), "gpus": gpu_names()}
    record = {"model": settings.model, "environment": environment, "starts": [asdict(one) for one in starts]}
    (settings.out / "cold-start.json").write_text(json.dumps(record, indent=1) + "\n")
    (settings.out / "table.md").write_text(table(starts) + "\n")
