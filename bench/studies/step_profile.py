"""Where the time of a decode step goes under vLLM: kernels, the gaps between them, the host's launches.

    python -m bench.studies step-profile out/2b-awq --concurrency 1 --steps 64 --out out/profile-2b-awq

A server is booted with vLLM's torch profiler, kept busy by as many streamed answers as are asked for, and profiled for
some steps in the middle of them, when all only decode. The trace stays in OUT beside step.json and step.md. On a GPU
the events are kernels and copies, on a CPU torch's operators: the dry run of the same code. A profiled step is slower
than one that is not, the host more so than kernels: compare profiles with profiles.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.studies.settings import StepSettings
from toolkit.console import note
from toolkit.errors import BenchError

__all__ = ["Operation", "StepProfile", "analyse", "markdown", "run"]

#: Categories of a trace's events: what the device does, and what the host does to have it done.
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
#: What vLLM calls a step in its traces, with how many requests are in it.
_STEP = re.compile(r"^execute_(?:new_|context_)?")
#: A gap is what is longer than one kernel takes to follow another in a graph; in microseconds.
_GAP_US = 1.0
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Operation:
    """Events of one name. Times are microseconds a step."""

    name: str
    count: float
    us: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Averages over the profiled steps, in microseconds a step.

    Attributes:
        on: "gpu" or "cpu", where the events are from.
        steps: how many were profiled.
        step_us: from the first event of a step to that of the next.
        busy_us: during which at least one event ran.
        gap_us: the rest.
        gaps: stretches of more than a microsecond without an event.
        events: kernels and copies (on a CPU: operators that no other contains).
        launches: calls of CUDA's launch functions, graphs as one.
        launch_us: the host's time in them.
        sync_us: the host's time in waiting for the device.
        operations: the events by name, the longest first.
    """

    on: str
    steps: int
    step_us: float
    busy_us: float
    gap_us: float
    gaps: float
    events: float
    launches: float
    launch_us: float
    sync_us: float
    operations: list[Operation] = field(default_factory=list)

    @property
    def idle_share(self) -> float:
        """Share of the step without an event: what launching and the host cost."""
        return self.gap_us / self.step_us if self.step_us else 0.0


def analyse(trace: dict[str, Any], steps: int | None = None) -> StepProfile:
    """Make a profile of a trace in Chrome's format, times in microseconds.

    Args:
        trace: as torch's profiler writes it.
        steps: how many steps it holds; None: as many as it has annotations of vLLM's for.

    Raises:
        BenchError: it has no events, or no steps.
    """
    events = [event for event in trace.get("traceEvents", []) if event.get("ph") == "X" and "dur" in event]
    device = [event for event in events if event.get("cat") in _DEVICE]
    kept = device or _outermost([event for event in events if event.get("cat") == "cpu_op"])
    if not kept:
        raise BenchError("the trace has neither kernels nor operators: was the server asked anything?")
    if steps is None:
        marks = [
            event
            for event in events
            if _STEP.match(str(event.get("name"))) and event.get("cat") != "gpu_user_annotation"
        ]
        steps = len(marks)
    if steps < 1:
        raise BenchError("the trace has no step of vLLM's: give --steps")
    start = min(event["ts"] for event in kept)
    end = max(event["ts"] + event["dur"] for event in kept)
    spans = _merged(kept)
    busy = sum(to - since for since, to in spans)
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(spans)]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kept:
        by_name[str(event["name"])].append(float(event["dur"]))
    runtime = [event for event in events if event.get("cat") in _LAUNCHES]
    launches = [event for event in runtime if "Launch" in str(event["name"])]
    waits = [event for event in runtime if "Synchronize" in str(event["name"])]
    operations = [Operation(name, len(times) / steps, sum(times) / steps) for name, times in by_name.items()]
    return StepProfile(
        on="gpu" if device else "cpu",
        steps=steps,
        step_us=(end - start) / steps,
        busy_us=busy / steps,
        gap_us=(end - start - busy) / steps,
        gaps=sum(gap > _GAP_US for gap in gaps) / steps,
        events=len(kept) / steps,
        launches=len(launches) / steps,
        launch_us=sum(float(event["dur"]) for event in launches) / steps,
        sync_us=sum(float(event["dur"]) for event in waits) / steps,
        operations=sorted(operations, key=lambda each: each.us, reverse=True),
    )


def _outermost(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that no other of their thread contains."""
    found = []
    ends: dict[Any, float] = {}
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        thread = (event.get("pid"), event.get("tid"))
        if event["ts"] >= ends.get(thread, float("-inf")):
            found.append(event)
            ends[thread] = event["ts"] + event["dur"]
    return found


def _merged(events: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the stretches of time in which at least one event runs."""
    spans: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda each: float(each["ts"])):
        since, to = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if spans and since <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], to))
        else:
            spans.append((since, to))
    return spans


def markdown(found: StepProfile, title: str) -> str:
    """Return the profile as a page."""
    what = "kernels and copies" if found.on == "gpu" else "operators"
    rows = [
        ("a step", f"{found.step_us:,.0f} us"),
        (f"{what} run", f"{found.busy_us:,.0f} us"),
        ("nothing runs", f"{found.gap_us:,.0f} us ({found.idle_share:.0%}) in {found.gaps:,.0f} gaps of over 1 us"),
        (what, f"{found.events:,.0f}"),
    ]
    if found.on == "gpu":
        rows.append(("launches by the host", f"{found.launches:,.0f}, {found.launch_us:,.0f} us"))
        rows.append(("the host waits for the GPU", f"{found.sync_us:,.0f} us"))
    lines = [f"# {title}", "", f"Mean of {found.steps} steps.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "| us a step | share | times | name |", "|---:|---:|---:|---|"]
    for each in found.operations[:_SHOWN]:
        name = each.name if len(each.name) <= 90 else f"{each.name[:87]}..."
        lines.append(f"| {each.us:,.1f} | {each.us / found.step_us:.1%} | {each.count:,.1f} | `{name}` |")
    rest = found.operations[_SHOWN:]
    if rest:
        lines.append(f"| {sum(each.us for each in rest):,.1f} | | | {len(rest)} more |")
    return "\n".join(lines) + "\n"


def read_trace(directory: Path) -> dict[str, Any]:
    """Return the largest trace below ``directory``: the worker's. Raises BenchError when there is none."""
    files = [p for p in directory.rglob("*.json*") if ".pt.trace" in p.name]
    if not files:
        raise BenchError(f"vLLM wrote no trace below {directory}: see the server's log")
    file = max(files, key=lambda path: path.stat().st_size)
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
        found: dict[str, Any] = json.load(stream)
    return found


async def _record(url: str, settings: StepSettings) -> None:
    """Keep so many answers under way as are asked for and have steps profiled once all of them decode.

    What has not ended ``settings.seconds`` after the profile began is cut off.
    """
    from bench.load.endpoint import discover, http_client
    from bench.load.inputs import SpeedInputs
    from bench.load.workload import parse_sizes
    from serve.http.sse import EventDecoder

    end = await discover(url)
    concurrency, steps, seconds = settings.concurrency, settings.steps, settings.seconds
    length = 4 * steps + 64
    inputs = SpeedInputs(f"profile/{time.time()}", parse_sizes(settings.image_sizes), length)
    async with http_client(url, connections=concurrency + 1, timeout_s=max(60.0, seconds)) as http:
        begun = asyncio.Semaphore(0)

        async def answer(body: bytes) -> None:
            async with http.stream("POST", "/v1/chat/completions", content=body, headers=_JSON) as response:
                if response.status_code != 200:
                    raise BenchError(f"the server answers {response.status_code}: {(await response.aread())[:300]!r}")
                first, decoder = True, EventDecoder()
                async for received in response.aiter_bytes():
                    for event in decoder.feed(received):
                        if first and b'"content":"' in event and b'"content":""' not in event:
                            first = False
                            begun.release()

        for body in inputs.bodies("warm-up", concurrency, end.model):
            await answer(body)
        begun = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(answer(body)) for body in inputs.bodies("load", concurrency, end.model)]
        try:
            for _ in range(concurrency):
                waiting = asyncio.create_task(begun.acquire())
                done, _ = await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                if waiting not in done:
                    waiting.cancel()
                    for task in done:
                        task.result()
                    raise BenchError("an answer ended before all had begun: fewer --concurrency, or more --steps")
            await _post(http, "/start_profile", {"max_iterations": steps})
            await _ended(tasks, seconds)
        finally:
            for task in tasks:
                task.cancel()
        await _post(http, "/stop_profile", {})


async def _ended(tasks: Sequence[asyncio.Task[None]], seconds: float) -> None:
    """Wait for answers, but no longer than so many seconds. Raises what ended one of them."""
    ended, late = await asyncio.wait(tasks, timeout=seconds)
    for task in ended:
        task.result()
    if late:  # the steps were profiled long ago, or never will be
        note(f"{len(late)} of {len(tasks)} answers had not ended after {seconds:g} s: they are cut off")


_JSON = {"Content-Type": "application/json"}


async def _post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await http.post(path, json=body)
    if response.status_code != 200:
        raise BenchError(f"POST {path} answers {response.status_code}: {response.text[:300]}")


def profile(model: str, settings: StepSettings) -> StepProfile:
    """Boot ``model``, profile some steps with answers under way, and write what was found.

    Args:
        model: directory, hub id or demo.
        settings: what is asked.

    Raises:
        QvlError: it does not boot or answer, or vLLM writes no trace.
    """
    from bench.run.boot import free_ports
    from serve.process import lifecycle
    from serve.settings.config import ServerConfig

    out = settings.out
    traces = (out / "trace").resolve()
    traces.mkdir(parents=True, exist_ok=True)
    profiler = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_with_stack": False}
    config = json.dumps({**profiler, "ignore_frontend": True})
    needed = 4 * settings.steps + 64 + 4096
    options = ServerConfig(
        port=free_ports(1)[0],
        max_model_len=min(needed, 4096) if not ServerConfig().on_gpu else needed,
        extra=("--profiler-config", config, *settings.serve_arg),
    )
    with lifecycle.start(model, options, attached=True) as server:
        asyncio.run(_record(server.url, settings))
        until = time.monotonic() + settings.seconds
        while time.monotonic() < until:  # the trace is written behind the answer
            with suppress(BenchError, OSError, ValueError, EOFError):
                trace = read_trace(traces)
                break
            time.sleep(0.3)
        else:
            trace = read_trace(traces)
    found = analyse(trace)
    told = {**asdict(found), "model": model, "concurrency": settings.concurrency}
    (out / "step.json").write_text(json.dumps(told, indent=1))
    (out / "step.md").write_text(markdown(found, f"{Path(model).name}, {settings.concurrency} in flight"))
    return found


def run(model: str, settings: StepSettings) -> None:
    """Profile a model's decode step and print the page. Raises as `profile`."""
    profile(model, settings)
    print((settings.out / "step.md").read_text())
