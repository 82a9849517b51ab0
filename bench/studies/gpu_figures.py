"""The figures of one card: 16 bits against 4, and our kernel against vLLM's own choice, all servers up at once.

    python -m bench.studies gpu-figures prepare --shapes 7b,2b    # random weights in these shapes, and their AWQ
    python -m bench.studies gpu-figures up                        # all servers, side by side, each with its KV cache
    python -m bench.studies gpu-figures measure                   # `qvl bench` over pairs of them; then the agreement
    python -m bench.studies gpu-figures down
    python -m bench.studies gpu-figures profile --profiles DIR    # what was measured of the kernels, for `qvl serve`

`all` is the first four in a row; each can be called again, and does what is left. Speed and memory depend on the shape
of weights alone, so random ones will do; nothing here is said about answers. A shape `tiny`, two layers of the 2B's,
shows on a CPU that it all runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cli import commands
from bench.studies.settings import CardSettings
from bench.studies.sharing import beside_others
from toolkit.errors import BenchError

__all__ = ["Pair", "Shape", "pairs", "run"]

#: Systems in AWQ, and their kernels; None: vLLM's own choice, which on Hopper is Machete.
_KERNELS = {"awq": None, "awq-qvl": "qvl", "awq-qvl-head": "qvl", "awq-humming": "humming", "awq-marlin": "marlin"}
_OURS = "awq-qvl"
#: The same with its output head in 4 bits, where ``--systems`` asks for it.
_HEAD = "awq-qvl-head"
#: Images are scaled to at most so many pixels: what is reserved for the largest one is not measured here.
_MAX_PIXELS = 1280 * 28 * 28


@dataclass(frozen=True)
class Shape:
    """One model and its systems.

    Attributes:
        base: of `qvl random-model`; ``layers`` None: all of them.
        systems: what is served of it.
        kv_gib: of each server's KV cache.
        seconds: that a point is measured in each round.
        rates: requests/s of open loops.
        concurrency: requests in flight of closed loops.
        sizes: of images, "text" for none, in turn.
        agreement: the load under which our figures are held against those of `vllm bench serve`.
    """

    name: str
    base: str
    layers: int | None
    systems: tuple[str, ...]
    kv_gib: float
    seconds: float
    rates: str
    concurrency: str = "1,8,32,128"
    sizes: str = "text,448x448"
    agreement: tuple[str, ...] = ("--concurrency", "8", "--requests", "96")

    def directory(self, work: Path, system: str) -> Path:
        """Where a system's checkpoint lies; the server is called by its name."""
        return work / f"{self.name}-{system}"


@dataclass(frozen=True)
class Pair:
    """A report: candidate against baseline, with open loops or without."""

    shape: Shape
    baseline: str
    candidate: str
    rates: bool
    #: Loads up to which it is measured; None: all.
    most: int | None = None

    @property
    def concurrency(self) -> str:
        """Requests in flight of its closed loops."""
        loads = self.shape.concurrency.split(",")
        return ",".join(load for load in loads if self.most is None or int(load) <= self.most)

    @property
    def name(self) -> str:
        """Of the report's directory."""
        return f"{self.shape.name}-{self.candidate}-against-{self.baseline}"


_TINY_AGREEMENT = ("--concurrency", "1", "--requests", "3", "--image-sizes", "text", "--output-tokens", "16")
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7b", "7b", None, ("bf16", _OURS, "awq"), 4.0, 2.0, "4,12"),
        Shape("2b", "2b", None, ("bf16", _OURS, "awq"), 2.0, 2.0, "8,24"),
        Shape("qwen2.5-vl-3b", "qwen2.5-vl-3b", None, ("bf16", _OURS, "awq"), 2.0, 2.0, "8,24"),
        Shape("qwen3-vl-4b", "qwen3-vl-4b", None, ("bf16", _OURS, "awq"), 4.0, 2.0, "8,24"),
        Shape("tiny", "2b", 2, ("bf16", "awq"), 0.5, 2.0, "1", "1,2", "text,112x112", _TINY_AGREEMENT),
    )
}


def pairs(shapes: Sequence[Shape], rates: bool = True) -> list[Pair]:
    """Return the reports to make, what matters most first; with open loops, or without.

    Where the head is in 4 bits too, that is what is held against 16 bits and against vLLM's own choice; what it adds is
    measured where it counts, with few requests in flight.
    """
    best = {shape: next((s for s in (_HEAD, _OURS) if s in shape.systems), "awq") for shape in shapes}
    found = [Pair(shape, "bf16", system, rates) for shape, system in best.items()]
    for shape, system in best.items():
        found.append(Pair(shape, "awq", system if system != "awq" else _OURS, False, 32 if system == _HEAD else None))
    found += [Pair(shape, _OURS, _HEAD, False, 8) for shape in shapes]
    return [pair for pair in found if {pair.baseline, pair.candidate} <= set(pair.shape.systems)]


def asked_for(settings: CardSettings) -> list[Shape]:
    """Return the shapes to measure, with the systems and loads that were asked for.

    Raises:
        BenchError: one that there is not.
    """
    shapes = []
    for name in settings.shapes.split(","):
        if name not in SHAPES:
            raise BenchError(f"--shapes: {name!r} is none of {', '.join(SHAPES)}")
        shape = SHAPES[name]
        if settings.systems:
            systems = tuple(settings.systems.split(","))
            known = (*shape.systems, *((_HEAD,) if _OURS in shape.systems else ()))
            if unknown := set(systems) - set(known):
                raise BenchError(f"--systems: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
            shape = replace(shape, systems=systems)
        loads, seconds = settings.concurrency or shape.concurrency, settings.seconds or shape.seconds
        shapes.append(replace(shape, concurrency=loads, seconds=seconds))
    return shapes


class Given:
    """What was asked for, its directories whole and its minutes running."""

    def __init__(self, settings: CardSettings) -> None:
        self.settings = settings
        self.work, self.out = settings.work.resolve(), settings.out.resolve()
        self.end = time.monotonic() + 60 * settings.minutes


def _must(command: Sequence[object]) -> None:
    if code := commands.run(command):
        raise SystemExit(code)


def prepare(given: Given, shapes: Sequence[Shape]) -> None:
    """Make the checkpoints that are not there yet. A kernel is no other checkpoint: its name is a link."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in shapes:
        source, awq = shape.directory(given.work, "bf16"), shape.directory(given.work, "awq")
        if not source.exists():
            made: list[object] = ["random-model", "--shape", shape.base, "--out", source, "--device", device]
            made += ["--layers", shape.layers] if shape.layers else []
            _must(made + (["--tokenizer", given.settings.tokenizer] if given.settings.tokenizer else []))
        quantize = ["quantize", "--model", source, "--samples", given.settings.samples, "--no-verdict"]
        if not awq.exists():
            _must([*quantize, "--out", awq])
        head = shape.directory(given.work, _HEAD)
        if _HEAD in shape.systems and not head.exists():
            _must([*quantize, "--out", head, "--lm-head"])
        for system in shape.systems:
            directory = shape.directory(given.work, system)
            if not directory.exists():
                directory.symlink_to(awq.name)


def _all(shapes: Sequence[Shape]) -> Iterator[tuple[int, Shape, str]]:
    for number, (shape, system) in enumerate((s, system) for s in shapes for system in s.systems):
        yield number, shape, system


def up(given: Given, shapes: Sequence[Shape]) -> None:
    """Start every server that does not run, all at once, and wait until the last is ready."""
    from serve.process import state
    from serve.process.lifecycle import start
    from serve.settings.backend import find_gpus
    from serve.settings.config import ServerConfig
    from serve.settings.engine import EngineSettings
    from toolkit.console import note

    card = max((gpu.total for gpu in find_gpus()), default=0)

    def boot(number: int, shape: Shape, system: str) -> str:
        directory, port = shape.directory(given.work, system), given.settings.port + number
        known = state.load(port)
        if known is not None and known.alive and known.ready:
            return f"{directory.name}: runs on {known.url}"
        kernel = _KERNELS.get(system) if card else None
        options = ServerConfig(
            port=port,
            served_model_name=directory.name,  # a link's own name
            max_model_len=4096,
            max_num_seqs=256 if card else None,
            images_per_request=1,
            videos_per_request=0,
            probe_every=3600,  # a probe's question would count among those that are measured
            timeout=900,
            settings=EngineSettings(kernel=kernel, max_pixels=_MAX_PIXELS),
        )
        server = start(str(directory), beside_others(directory, options, shape.kv_gib))
        return f"{directory.name}: {server.url} after {server.boot_seconds:.0f} s"

    with ThreadPoolExecutor(len(list(_all(shapes)))) as pool:
        for booted in [pool.submit(boot, *each) for each in _all(shapes)]:
            note(booted.result())


def measure(given: Given, shapes: Sequence[Shape]) -> None:
    """Make the reports that are not there yet, then hold our figures against those of `vllm bench serve`."""
    from toolkit.console import note, warn

    urls = {
        (shape.name, system): f"http://127.0.0.1:{given.settings.port + number}"
        for number, shape, system in _all(shapes)
    }
    for pair in pairs(shapes, given.settings.rates):
        out, shape = given.out / pair.name, pair.shape
        begun = out.exists()
        if begun and _whole(out):
            continue
        if time.monotonic() > given.end:
            note(f"the time is up before {pair.name}: the same command goes on")
            return
        command: list[object] = ["bench", "--baseline", urls[shape.name, pair.baseline]]
        command += ["--candidate", urls[shape.name, pair.candidate], "--out", out, "--tasks", "none"]
        command += ["--concurrency", pair.concurrency, "--duration", shape.seconds, "--rounds", 8]
        command += ["--image-sizes", shape.sizes, "--output-tokens", 128]
        command += ["--prompt-tokens", 64, "--slo", "ttft=500ms,tpot=15ms"]
        command += ["--resume"] if begun else []
        if code := commands.run(command + (["--rate", shape.rates] if pair.rates else [])):
            warn(f"{pair.name} ended with {code}; going on")
    shape = shapes[-1]
    agreement = given.out / "agreement.json"
    if time.monotonic() > given.end or agreement.exists():
        return
    served = next(system for system in ("awq", _OURS, *shape.systems) if system in shape.systems)
    url, tokenizer = urls[shape.name, served], str(shape.directory(given.work, served))
    command = ["agreement", "--url", url, "--tokenizer", tokenizer, "--out", agreement, *shape.agreement]
    if code := commands.run(command, "bench.studies"):
        warn(f"the agreement ended with {code}")


def _whole(out: Path) -> bool:
    """Whether a directory holds a report of all that was to be measured."""
    from bench.report.render.json_file import read

    path = out / "report.json"
    return path.exists() and read(path).status == "ok"


def down(given: Given, shapes: Sequence[Shape]) -> None:
    """Stop the servers that run."""
    from serve.process import state

    for number, _, _ in _all(shapes):
        if state.load(given.settings.port + number) is not None:
            commands.run(["stop", "--port", given.settings.port + number])


def profile(given: Given, shapes: Sequence[Shape]) -> None:
    """Write a profile of each shape's kernels, at each load of its reports."""
    from bench.report.render.json_file import read
    from serve.plan.capacity import shape as published
    from serve.settings.engine import EngineSettings
    from serve.settings.profiles import Key, Measured, Profile, format_key, model_key, save
    from toolkit.console import note

    named = {"bf16": "fp16"} | {system: kernel or "vllm" for system, kernel in _KERNELS.items()}
    for shape in shapes:
        figures: dict[int, dict[str, float]] = {}
        reports = []
        # The pair of kernels counts for both of them, that with 16 bits for 16 bits alone where there are both.
        for pair in (pair for pair in pairs([shape]) if pair.candidate != _HEAD):
            path = given.out / pair.name / "report.json"
            if not path.exists():
                continue
            report = read(path)
            reports.append(pair.name)
            for point in report.speed:
                rate = point.throughput("output_tokens_per_s")
                if point.load.concurrency is not None and rate is not None and not point.burst:
                    system = pair.baseline if point.role == "baseline" else pair.candidate
                    figures.setdefault(point.load.concurrency, {})[named[system]] = rate
        if not reports:
            continue
        gpu = report.environment.gpus[0].split(",")[0]
        version = report.systems["candidate"].server_version or "unknown"
        key = Key(gpu, model_key(published(shape.base, True).text_config), format_key(128), version)
        candidates = {kernel or "vllm": EngineSettings(kernel=kernel) for kernel in _KERNELS.values()}
        present = {name for found in figures.values() for name in found}
        measured = tuple(
            Measured(count, {name: found[name] for name in sorted(found) if name != "fp16"}, found.get("fp16"))
            for count, found in sorted(figures.items())
            if found.keys() - {"fp16"}
        )
        made = Profile(
            key,
            {name: settings for name, settings in candidates.items() if name in present},
            measured,
            provenance={
                "what": "output tokens/s in closed loops, texts and images of 448x448 in turn, 128 output tokens, "
                "random weights of the real shape",
                "when": report.created.isoformat(),
                "reports": reports,
            },
        )
        note(str(save(made, given.settings.profiles)))


STEPS = {"prepare": prepare, "up": up, "measure": measure, "down": down, "profile": profile}


def run(step: str, settings: CardSettings) -> None:
    """Take a step, or with ``all`` the first four in a row.

    Raises:
        BenchError: no such step or shape.
        QvlError: a server does not boot.
    """
    if step not in (*STEPS, "all"):
        raise BenchError(f"{step!r} is no step: choose among {', '.join((*STEPS, 'all'))}")
    shapes = asked_for(settings)
    given = Given(settings)
    for directory in (given.work, given.out):
        directory.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("QVL_CACHE", str(given.work / "cache"))
    if step != "all":
        STEPS[step](given, shapes)
        return
    try:
        for first in (prepare, up, measure):
            first(given, shapes)
    finally:
        down(given, shapes)
