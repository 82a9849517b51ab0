"""Servers of one model started in different ways, beside each other: what a flag or a variable brings, in ms a token.

    python -m bench.studies boots 2b-awq --out out/boots --concurrency 1,8 \\
        --way "ours=" --way "no-stats=-- --disable-log-stats" --way "old-runner=VLLM_USE_V2_MODEL_RUNNER=0"

A way is a name and, behind "=", environment variables, then options of `qvl serve`, then behind "--" flags of vLLM's;
``model=DIR`` among the variables serves another directory. The first is booted alone, for what compilers keep, the
others side by side (`--together`: all). Then one is asked after the other, in rounds, while the others wait: an idle
server takes nothing but memory. `--stacks` shows where the first one's host time goes, sampled by py-spy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.studies.settings import BootsSettings
from toolkit.errors import BenchError
from toolkit.files import write_whole

if TYPE_CHECKING:
    from bench.load.client import Trace

__all__ = ["Way", "parse_way", "run"]

#: What vLLM says of the kernels that it takes.
_KERNEL = re.compile(r"Using (\S*Kernel) for|no kernel of qvl for .*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Way:
    """A way of starting a server: variables, words for `qvl serve`, and words for vLLM."""

    name: str
    variables: dict[str, str]
    words: tuple[str, ...]
    flags: tuple[str, ...]


def parse_way(text: str) -> Way:
    """Read ``NAME=[VARIABLE=VALUE ...] [OPTION ...] [-- FLAG ...]``.

    Raises:
        BenchError: it has no name, or one that is no file's.
    """
    name, given, rest = text.partition("=")
    if not given or not re.fullmatch(r"[\w.-]+", name):
        raise BenchError(f"--way {text!r}: give NAME=, and behind it variables, options of qvl serve, -- flags of vLLM")
    words = rest.split()
    variables = {}
    while words and _VARIABLE.match(words[0]):
        key, _, value = words.pop(0).partition("=")
        variables[key] = value
    cut = words.index("--") if "--" in words else len(words)
    return Way(name, variables, tuple(words[:cut]), tuple(words[cut + 1 :]))


def run(model: str, settings: BootsSettings) -> None:
    """Boot all ways, measure, and write results.json and README.md as it goes.

    Raises:
        BenchError: a way can't be read, or none boots.
    """
    study = _Study(model, settings, [parse_way(text) for text in settings.way])
    try:
        study.boot()
        study.measure()
    finally:
        study.stop()


class _Study:
    """The servers of a run, and what was found."""

    def __init__(self, model: str, settings: BootsSettings, ways: Sequence[Way]) -> None:
        if len({way.name for way in ways}) < len(ways) or not ways:
            raise BenchError("give each --way a name of its own, and one at least")
        self.model, self.settings, self.ways = model, settings, ways
        self.end = time.monotonic() + settings.seconds
        self.found: dict[str, Any] = {"model": model, "ways": {}}
        settings.out.mkdir(parents=True, exist_ok=True)

    def _port(self, way: Way) -> int:
        return self.settings.port + self.ways.index(way)

    def boot(self) -> None:
        """Start all servers; what does not start is written down with its reason."""
        alone = 0 if self.settings.together else 1
        for way in self.ways[:alone]:
            self._boot(way)
        with ThreadPoolExecutor(len(self.ways)) as pool:
            list(pool.map(self._boot, self.ways[alone:]))
        if not any("seconds" in found for found in self.found["ways"].values()):
            raise BenchError(f"none of the servers booted: see {self.settings.out}")

    def _boot(self, way: Way) -> None:
        began = time.monotonic()
        environment = {**os.environ, **way.variables}
        model = environment.pop("model", self.model)
        command = [sys.executable, "-m", "toolkit.cli", "serve", model, "--port", str(self._port(way)), "--detach"]
        command += ["--served-model-name", "m", "--probe-every", "3600", *self.settings.options.split(), *way.words]
        flags = [*self.settings.flags.split(), *way.flags]
        log = self.settings.out / f"{way.name}.log"
        with log.open("wb") as stream:
            left = max(1.0, self.end - time.monotonic())
            try:
                code = subprocess.run(
                    [*command, "--", *flags] if flags else command,
                    env=environment,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=left,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        entry: dict[str, Any] = {
            "asked": " ".join([*(f"{k}={v}" for k, v in way.variables.items()), *way.words, *flags])
        }
        if code:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            entry["failed"] = " ".join(lines[-4:])[:600] if lines and code > 0 else "the time was up while it booted"
        else:
            entry |= {"seconds": round(time.monotonic() - began, 1), "kernels": self._kernels(way), "loads": {}}
        self.found["ways"][way.name] = entry
        print(f"{way.name}: {entry.get('failed') or entry['seconds']} {entry.get('kernels', '')}", flush=True)
        self._write()

    def _kernels(self, way: Way) -> list[str]:
        from serve.process import state

        server = state.load(self._port(way))
        text = Path(server.log).read_text(errors="replace") if server is not None else ""
        return list(dict.fromkeys(match[1] or match[0] for match in _KERNEL.finditer(text)))

    def measure(self) -> None:
        """Ask the servers in turns; each load in rounds."""
        up = [way for way in self.ways if "seconds" in self.found["ways"][way.name]]
        loads = [int(number) for number in self.settings.concurrency.split(",")]
        for turn in range(self.settings.rounds + 1):  # the first warms up
            for concurrency in loads:
                for way in up if turn % 2 else reversed(up):
                    if time.monotonic() > self.end:
                        print(f"the time is up in round {turn}", flush=True)
                        return
                    measured = asyncio.run(self._asked(way, concurrency, turn))
                    if turn:
                        found = self.found["ways"][way.name]["loads"].setdefault(str(concurrency), [])
                        found.append(measured)
                        print(f"{way.name}, {concurrency} in flight: {measured}", flush=True)
            self._write()
        if up and self.settings.stacks and time.monotonic() < self.end:
            asyncio.run(self._stacks(up[0]))

    async def _asked(self, way: Way, concurrency: int, turn: int) -> dict[str, float]:
        """Keep so many answers under way until each worker has had its requests; return medians."""
        from bench.load.client import ask
        from bench.load.endpoint import discover, http_client
        from bench.load.inputs import SpeedInputs
        from bench.load.workload import Lengths, parse_sizes

        settings, url = self.settings, f"http://127.0.0.1:{self._port(way)}"
        end = await discover(url)
        sizes, length = parse_sizes(settings.image_sizes), Lengths.fixed(settings.prompt_tokens)
        inputs = SpeedInputs(f"{way.name}/{turn}/{time.time()}", sizes, settings.output_tokens, length)
        count = settings.requests if turn else min(2, settings.requests)
        bodies = inputs.bodies(f"load-{concurrency}", concurrency * count, end.model)
        traces: list[Trace] = []
        async with http_client(url, connections=concurrency + 1, timeout_s=120) as http:

            async def worker(first: int) -> None:
                for body in bodies[first::concurrency]:
                    traces.append(await ask(http, body, timeout_s=120))

            began = time.perf_counter()
            await asyncio.gather(*(worker(number) for number in range(concurrency)))
            took = time.perf_counter() - began
        good = [trace for trace in traces if trace.failure is None and (trace.completion_tokens or 0) > 1]
        if not good:
            raise BenchError(f"{way.name}: no request succeeded ({traces[0].failure})")
        tokens = [trace.completion_tokens or 0 for trace in good]
        each = [1e3 * (t.chunks[-1] - t.chunks[0]) / (n - 1) for t, n in zip(good, tokens, strict=True)]
        return {
            "ms_a_token": round(median(each), 4),
            "ttft_ms": round(median(1e3 * (trace.chunks[0] - trace.started) for trace in good), 3),
            "tokens_a_second": round(sum(tokens) / took, 1),
            "failed": len(traces) - len(good),
        }

    async def _stacks(self, way: Way) -> None:
        """Sample the server's processes while one answer after the other is streamed."""
        import psutil

        from serve.process import state

        server, spy = state.load(self._port(way)), shutil.which("py-spy")
        if server is None or spy is None:
            print("no py-spy on the PATH: no stacks", flush=True)
            return
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        watching = []
        for process in processes:
            name = re.sub(r"\W+", "-", process.name())[:30]
            out = self.settings.out / f"{way.name}-{name}-{process.pid}.folded"
            command = [spy, "record", "--pid", str(process.pid), "--duration", str(int(self.settings.stacks))]
            command += [
                "--rate",
                "400",
                "--format",
                "raw",
                "--threads",
                "--idle",
                "--nonblocking",
                "--output",
                str(out),
            ]
            watching.append(await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=2))
        until = time.monotonic() + self.settings.stacks
        while time.monotonic() < until:
            await self._asked(way, 1, 1)
        for watcher in watching:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(watcher.wait(), 20)

    def stop(self) -> None:
        """End all servers."""
        from serve.process import state

        for way in self.ways:
            if state.load(self._port(way)) is not None:
                subprocess.run(
                    [sys.executable, "-m", "toolkit.cli", "stop", "--port", str(self._port(way))], check=False
                )

    def _write(self) -> None:
        write_whole(self.settings.out / "results.json", json.dumps(self.found, indent=1) + "\n")
        write_whole(self.settings.out / "README.md", _table(self.found))


def _table(found: dict[str, Any]) -> str:
    """Return a line a way: the median over rounds, and how far rounds lie apart, against the first way."""
    loads = list(dict.fromkeys(load for way in found["ways"].values() for load in way.get("loads", {})))
    heads = " | ".join(f"ms a token, {load} in flight | TTFT, ms | tokens/s" for load in loads)
    lines = [f"# Ways of starting {Path(found['model']).name}", ""]
    lines += [f"| way | boot, s | {heads} | asked |", "|---" * (3 + 3 * len(loads)) + "|"]
    first: dict[str, float] = {}
    for name, way in found["ways"].items():
        cells = []
        for load in loads:
            rounds = way.get("loads", {}).get(load, [])
            if not rounds:
                cells += ["", "", ""]
                continue
            times = sorted(each["ms_a_token"] for each in rounds)
            first.setdefault(load, median(times))
            ratio = f", x{first[load] / median(times):.2f}"
            cells.append(f"{median(times):.3f} ({times[0]:.3f} to {times[-1]:.3f}{ratio})")
            cells += [f"{median(each[key] for each in rounds):,.1f}" for key in ("ttft_ms", "tokens_a_second")]
        told = way.get("failed") or way["seconds"]
        lines.append(f"| {name} | {told} | {' | '.join(cells)} | `{way['asked']}` |")
    return "\n".join(lines) + "\n"
