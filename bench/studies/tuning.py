"""The figures of docs/tuning.md and docs/multi-gpu.md, in steps that can each be killed and called again.

    make tune-bench ARGS="--shape 7b --minutes 9"      # again until it says that nothing is left
    python -m bench.studies tuning --shape demo            # the dry run, on a CPU too

Makes a model of the shape with random weights (speed and memory depend on shapes alone), its AWQ, then: `qvl tune`
with fp16 beside it, a decode step's profile of both, `qvl plan` against boots on cards of 16 and 24 GiB, and, where
there are two GPUs, tensor and data parallel over two against one. All results lie in OUT/SHAPE-results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.cli import commands
from bench.studies.settings import TuningSettings
from bench.tune.config import TuneConfig
from bench.tune.journal import Journal
from bench.tune.measure import tune
from bench.tune.profile import table_rows

__all__ = ["run", "spreads"]

#: Loads, requests, output tokens and images: of a published shape on a GPU, and of the dry run.
_REAL = {"loads": "1,8,32,128", "requests": 64, "tokens": 128, "sizes": "448x448", "steps": 64, "only": None}
_DRY = {"loads": "1,2", "requests": 6, "tokens": 8, "sizes": "112x112", "steps": 12, "only": "vllm,few-sequences"}


#: What `qvl tune --fail-if-left` exits with when its minutes were up.
_TIME_UP = 3


class OutOfTime(Exception):
    """The minutes are up; what is done is kept."""


class _Steps:
    """Runs commands one after the other; one that has been done is not done again."""

    def __init__(self, results: Path, minutes: float) -> None:
        self.results = results
        self.end = time.monotonic() + 60 * minutes
        self.results.mkdir(parents=True, exist_ok=True)

    @property
    def minutes_left(self) -> float:
        return max(0.0, (self.end - time.monotonic()) / 60)

    def run(
        self, name: str, command: Sequence[object], module: str = "toolkit.cli", *, made: Path | None = None
    ) -> None:
        """Run the command unless ``made``, or a mark that it was done, is there. Raises OutOfTime where it says so."""
        mark = made or self.results / f".{name}.done"
        if mark.exists():
            return
        if time.monotonic() >= self.end:
            raise OutOfTime(name)
        code = commands.run(command, module)
        if code == _TIME_UP:
            raise OutOfTime(name)
        if code:
            raise SystemExit(code)
        if made is None:
            mark.touch()


def spreads(gpus: int, on_gpu: bool) -> dict[str, tuple[int, int]]:
    """Return (tp, dp) by name, of what so many GPUs can be compared in; on a CPU, two processes."""
    found = {"one": (1, 1)}
    if gpus >= 2 or not on_gpu:
        found |= {"tp2": (2, 1), "dp2": (1, 2)}
    if gpus >= 4:
        found |= {"tp4": (4, 1), "dp4": (1, 4), "tp2-dp2": (2, 2)}
    return found


def _parallel(model: str, results: Path, config: TuneConfig, minutes: float) -> bool:
    """Measure a model over one and more GPUs; return whether all is measured."""
    from bench.machine.environment import gpu_names, versions
    from bench.run.boot import free_ports, server_of
    from serve.settings.config import ServerConfig
    from serve.settings.parallel import Parallel, visible_gpus

    on_gpu = ServerConfig().on_gpu
    ways = spreads(visible_gpus(), on_gpu)
    journal = Journal(results / "parallel.json", {"model": model, "gpus": gpu_names(), "versions": versions()})

    def options(name: str) -> ServerConfig:
        tp, dp = ways[name]
        return ServerConfig(port=free_ports(1)[0], parallel=Parallel(tp=tp, dp=dp), timeout=900)

    settings = {name: {"tp": tp, "dp": dp} for name, (tp, dp) in ways.items()}
    return tune(settings, config, lambda name: server_of(model, options(name)), journal, seconds=60 * minutes)


def run(settings: TuningSettings) -> None:
    """Run what is left, until the minutes are up; exits with 3 then."""
    from bench.load.workload import parse_sizes
    from bench.run.config import parse_concurrencies
    from toolkit.console import note

    size = _DRY if settings.shape == "demo" else _REAL
    results = settings.out / f"{settings.shape}-results"
    config = TuneConfig(
        concurrencies=parse_concurrencies(str(size["loads"])),
        requests=int(str(size["requests"])),
        output_tokens=int(str(size["tokens"])),
        image_sizes=parse_sizes(str(size["sizes"])),
    )
    try:
        _all(settings, size, config, _Steps(results, settings.minutes))
    except OutOfTime as late:
        note(f"the time is up before or in the step {late}: the same command goes on")
        raise SystemExit(_TIME_UP) from None
    told = json.loads((results / "parallel.json").read_text())
    for name, cells in table_rows(
        list(Journal(results / "parallel.json", told["about"]).trials.values()), config.concurrencies
    ):
        note(f"{name}: {', '.join(cells)} tokens/s at {size['loads']} in flight")
    note(f"nothing is left; results are in {results}")


def _all(settings: TuningSettings, size: Mapping[str, object], config: TuneConfig, steps: _Steps) -> None:
    """Take every step that is left, in order."""
    from serve.settings.backend import choose

    dry, results = settings.shape == "demo", steps.results
    source = "demo" if dry else str(settings.out / f"{settings.shape}-bf16")
    awq = settings.out / f"{settings.shape}-awq"
    load = ["--image-sizes", str(size["sizes"])]
    if not dry:
        device = "cuda" if choose() == "gpu" else "cpu"
        made = ["random-model", "--shape", settings.shape, "--out", source, "--device", device]
        steps.run("weights", made, made=Path(source))
    steps.run("awq", ["quantize", "--model", source, "--out", awq, "--samples", 16], made=awq)
    for name, model in (("awq", str(awq)), ("fp16", source)):
        out = results / f"step-{name}"
        profiled = ["step-profile", model, "--out", out, "--steps", size["steps"], *load]
        steps.run(f"step-{name}", profiled, "bench.studies", made=out / "step.json")
    steps.run("capacity", ["capacity-check", source, awq, "--out", results / "capacity.json"], "bench.studies")
    if not _parallel(str(awq), results, config, steps.minutes_left):
        raise OutOfTime("parallel")
    command: list[object] = ["tune", awq, "--fp16", source, "--concurrency", size["loads"], *load]
    command += ["--requests", size["requests"], "--output-tokens", size["tokens"]]
    command += ["--minutes", f"{steps.minutes_left:.1f}", "--out", results / "profile", "--fail-if-left"]
    only = settings.only or size["only"]
    steps.run("tune", [*command, *(["--only", only] if only else [])])
