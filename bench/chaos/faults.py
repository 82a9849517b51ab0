"""What clients see when something under a server breaks, and how long until it answers again.

    python -m bench.chaos faults --out docs/results/faults [--model demo] [--only engine_killed,...]

Starts `qvl serve --detach` and keeps a few clients asking about images while one fault after the other is brought
about; writes table.md and faults.json. Ends only processes that it has started. Runs on a GPU too, which alone has the
fault gpu_memory_exhausted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.chaos.gpu_memory import neighbour
from bench.chaos.hostile import chat_body, data_url, good_image
from bench.chaos.settable_clock import Clock
from bench.chaos.settings import FaultsSettings
from bench.load.client import is_whole
from bench.run.boot import free_ports
from serve.http.images import sample_image
from serve.process import state
from serve.process.supervisor import WAITS, stopped_by_signals
from serve.settings.config import ServerConfig
from toolkit.errors import BenchError

__all__ = ["FAULTS", "Result", "Watched", "detached", "measure", "observe", "run", "table"]

#: Seconds that a client waits for the next bytes.
_PATIENCE = 60.0
KEY = "faults-key-1"
NEW_KEY = "faults-key-2"


@dataclass
class Result:
    """What one fault did. Times in seconds since it was brought about; counts are requests."""

    fault: str
    #: How it was brought about.
    how: str
    #: Requests by outcome: "ok", an HTTP status, "cut off", "refused connection", "no answer in time".
    before: dict[str, int] = field(default_factory=dict)
    during: dict[str, int] = field(default_factory=dict)
    #: When /ready first said no; None: it never did.
    not_ready_after: float | None = None
    #: When /ready said yes again.
    ready_again_after: float | None = None
    #: The longest that a client waited for an answer or an error.
    longest_wait: float = 0.0
    #: The longest without a good answer to anybody.
    gap: float = 0.0
    restarts: int = 0
    note: str = ""


@dataclass
class Watched:
    """A server that `qvl serve --detach` has started, with a cache directory of its own."""

    port: int
    cache: Path
    keys: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def known(self) -> state.ServerState:
        """What is written down about it."""
        return state.ServerState(**json.loads((self.cache / "servers" / f"{self.port}.json").read_text()))

    @property
    def log(self) -> Path:
        """Its log file."""
        return self.cache / "servers" / f"{self.port}.log"

    def process(self, title: str) -> psutil.Process:
        """Return the server's process whose title starts so, such as "VLLM::EngineCore"."""
        for child in psutil.Process(self.known.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(child.cmdline()).startswith(title):
                    return child
        raise RuntimeError(f"the server has no process {title}")


@contextlib.contextmanager
def detached(model: str, cache: Path, *arguments: str, **environment: str) -> Iterator[Watched]:
    """Start a server with `qvl serve --detach`; stop it at the end."""
    cache.mkdir(parents=True, exist_ok=True)
    server = Watched(free_ports(1)[0], cache, cache / "keys")
    server.keys.write_text(f"{KEY}\n")
    qvl = [sys.executable, "-m", "toolkit.cli"]
    port = ("--port", str(server.port))
    probe = ("--probe-every", "2s", "--probe-timeout", "5s", "--log-format", "json")
    command = [*qvl, "serve", model, "--detach", *port, *probe, "--api-key-file", str(server.keys), *arguments]
    env = {**os.environ, **environment, "QVL_CACHE": str(cache)}
    try:
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        yield server
    finally:
        plain = {**os.environ, "QVL_CACHE": str(cache)}
        subprocess.run([*qvl, "stop", *port], env=plain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@dataclass
class _Seen:
    began: float
    ended: float
    outcome: str


async def _client(server: Watched, seen: list[_Seen], until: Callable[[], bool], key: Callable[[], str]) -> None:
    """Ask about an image again and again, on a connection that is kept, as the openai package does without retries."""
    number = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=_PATIENCE, trust_env=False) as client:
        name = server.known.model_name
        while not until():
            number += 1
            body = {
                "model": name,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": sample_image()}},
                            {"type": "text", "text": f"Question {number}: what colour is the circle?"},
                        ],
                    }
                ],
                "max_tokens": 32,
                "ignore_eos": True,
                "stream": True,
                "temperature": 0,
            }
            began = time.monotonic()
            try:
                headers = {"authorization": f"Bearer {key()}"}
                async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                    text = b"".join([part async for part in response.aiter_bytes()])
                    done = response.status_code == 200 and is_whole(text, stream=True)
                    outcome = "ok" if done else "cut off" if response.status_code == 200 else str(response.status_code)
            except httpx.ConnectError:
                outcome = "refused connection"
            except httpx.TimeoutException:
                outcome = "no answer in time"
            except httpx.HTTPError:
                outcome = "cut off"
            seen.append(_Seen(began, time.monotonic(), outcome))
            if outcome != "ok":
                await asyncio.sleep(0.5)


async def _poll_ready(server: Watched, changes: list[tuple[float, bool]], until: Callable[[], bool]) -> None:
    async with httpx.AsyncClient(timeout=3, trust_env=False) as client:
        while not until():
            try:
                ready = (await client.get(f"{server.url}/ready")).status_code == 200
            except httpx.HTTPError:
                ready = False
            if not changes or changes[-1][1] != ready:
                changes.append((time.monotonic(), ready))
            await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a fault is called, and how it is brought about."""

    name: str
    how: str
    #: It must end readiness, however long that takes to be noticed; without, it may.
    breaks: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """How many clients ask, and for how many seconds before a fault, after it, and at the longest."""

    clients: int = 2
    before: float = 5.0
    after: float = 10.0
    longest: float = 240.0


USUAL = Timing()


def observe(
    server: Watched,
    fault: Fault,
    bring_about: Callable[[], Any],
    timing: Timing,
    key: Callable[[], str] = lambda: KEY,
) -> Result:
    """Bring about a fault while clients ask, until the server is ready again and ``timing.after`` more seconds have
    passed."""
    seen: list[_Seen] = []
    changes: list[tuple[float, bool]] = []
    restarts = server.known.restarts
    over = False

    async def go() -> float:
        nonlocal over
        tasks = [asyncio.create_task(_client(server, seen, lambda: over, key)) for _ in range(timing.clients)]
        tasks.append(asyncio.create_task(_poll_ready(server, changes, lambda: over)))
        await asyncio.sleep(timing.before)
        at = time.monotonic()
        await asyncio.to_thread(bring_about)
        deadline = at + timing.longest
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            if fault.breaks and not any(when > at and not ready for when, ready in changes):
                continue
            if (
                time.monotonic() - at > timing.after
                and changes[-1][1]
                and time.monotonic() - changes[-1][0] > timing.after
            ):
                break
        over = True
        await asyncio.gather(*tasks)
        return at

    at = asyncio.run(go())
    later = [one for one in seen if one.ended > at]
    good = sorted([at, *(one.ended for one in later if one.outcome == "ok")])
    downs = [when - at for when, ready in changes if not ready and when > at]
    return Result(
        fault=fault.name,
        how=fault.how,
        before=dict(Counter(one.outcome for one in seen if one.ended <= at)),
        during=dict(Counter(one.outcome for one in later)),
        not_ready_after=round(downs[0], 2) if downs else None,
        ready_again_after=round(changes[-1][0] - at, 2) if downs and changes[-1][1] else None,
        longest_wait=round(max(one.ended - one.began for one in later), 2),
        gap=round(max((b - a for a, b in itertools.pairwise(good)), default=timing.longest), 2),
        restarts=server.known.restarts - restarts,
    )


def _signalled(server: Watched, fault: Fault, number: int, title: str | None, timing: Timing) -> Result:
    """Send a signal to the server's process of that title, or to the one that clients are connected to."""

    def send() -> None:
        (psutil.Process(server.known.pid) if title is None else server.process(title)).send_signal(number)

    return observe(server, fault, send, timing)


def engine_killed(server: Watched, timing: Timing = USUAL) -> Result:
    """What the kernel does when memory runs out: the largest process is killed."""
    how = "SIGKILL to the engine's process, as the kernel sends when host memory runs out"
    return _signalled(server, Fault("engine killed", how, breaks=True), signal.SIGKILL, "VLLM::EngineCore", timing)


def worker_killed(server: Watched, timing: Timing = USUAL) -> Result:
    """One of the processes that a model is spread over; the server was started with two."""
    how = "SIGKILL to one of the two workers of a model that is split in two (`--tp 2`)"
    return _signalled(server, Fault("worker killed", how, breaks=True), signal.SIGKILL, "VLLM::Worker", timing)


def server_killed(server: Watched, timing: Timing = USUAL) -> Result:
    """The process that clients are connected to."""
    how = "SIGKILL to the API server's process"
    return _signalled(server, Fault("API server killed", how, breaks=True), signal.SIGKILL, None, timing)


def engine_hangs(server: Watched, timing: Timing = USUAL) -> Result:
    """It lives, and answers nothing."""
    how = "SIGSTOP to the engine's process: it lives and does nothing, as with a driver that hangs"
    return _signalled(server, Fault("engine hangs", how, breaks=True), signal.SIGSTOP, "VLLM::EngineCore", timing)


def allocation_fails(server: Watched, timing: Timing = USUAL) -> Result:
    """The engine needs more memory than it may have, as where another program has taken what was left of a GPU's."""
    answers: list[httpx.Response | None] = []

    def cap() -> None:
        engine = server.process("VLLM::EngineCore")
        engine.rlimit(psutil.RLIMIT_AS, (engine.memory_info().vms // 2,) * 2)  # less than it has: it gets nothing more
        answers.extend(_show_large(server))

    how = "the engine gets no more memory (`RLIMIT_AS`), and 8 large images come at once: an allocation fails"
    result = observe(server, Fault("allocation fails", how, breaks=True), cap, timing)
    result.note = f"the images: {_statuses(answers)}; {_cause(server)}"
    return result


def gpu_memory_exhausted(server: Watched, timing: Timing = USUAL) -> Result:
    """Another program takes all of the GPU's memory that is left, and all that becomes free while it runs."""
    answers: list[httpx.Response | None] = []
    taken: list[int] = []

    def take() -> None:
        with neighbour() as other:
            deadline = time.monotonic() + _HELD
            taken.append(other.taken)
            while time.monotonic() < deadline and all(each is not None and each.is_success for each in answers):
                answers.extend(_show_large(server, shown=len(answers)))
            time.sleep(max(0.0, deadline - time.monotonic()))
            taken.append(other.taken)

    how = (
        f"for {_HELD} s another program takes all of the GPU's memory that is left or becomes free, and large images "
        "come, 8 at once"
    )
    result = observe(server, Fault("GPU memory exhausted", how), take, timing)
    waited = WAITS in server.log.read_text(errors="replace")
    before, after = (f"{size / 2**30:.1f} GiB" for size in taken)
    result.note = (
        f"it took {before} at once, {after} in the end; the images: {_statuses(answers)}; {_cause(server)}; "
        f"the restart {'waited for memory' if waited else 'found memory at once'}"
    )
    return result


def _show_large(server: Watched, shown: int = 0) -> list[httpx.Response | None]:
    """Ask about 8 images at once, as large as the embedded model's context takes; no cache has them yet.

    ``shown`` is how many were asked about before.
    """
    images = [data_url(good_image(1120, colour=f"#{shown + number:06x}")) for number in range(8)]
    name = server.known.model_name
    return _at_once(server, [chat_body(name, image, max_tokens=4) for image in images], _PATIENCE)


def _cause(server: Watched) -> str:
    """Return how its log says that there was no memory."""
    said = _NO_MEMORY.findall(server.log.read_text(errors="replace"))
    return f'the log says "{said[-1]}"' if said else "the log tells no cause"


def _get(server: Watched, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)


def _at_once(server: Watched, bodies: list[bytes], patience: float) -> list[httpx.Response | None]:
    """Send chats all at once; return the answers, None for a connection that ended or fell silent."""

    async def go() -> list[httpx.Response | None]:
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        async with httpx.AsyncClient(base_url=server.url, timeout=patience, trust_env=False, headers=headers) as client:

            async def ask(body: bytes) -> httpx.Response | None:
                try:
                    return await client.post("/v1/chat/completions", content=body)
                except httpx.HTTPError:
                    return None

            return list(await asyncio.gather(*map(ask, bodies)))

    return asyncio.run(go())


def _statuses(answers: list[httpx.Response | None]) -> str:
    return _counts(dict(Counter("cut off" if each is None else str(each.status_code) for each in answers)))


#: How Python, PyTorch's allocator and the C++ library say that there is no memory.
_NO_MEMORY = re.compile(
    r"CUDA out of memory|MemoryError|[Cc]an't allocate memory|Cannot allocate memory|bad_alloc|can't start new thread"
)
#: Seconds that another program holds a GPU's memory.
_HELD = 20


def keys_replaced(server: Watched, timing: Timing = USUAL) -> Result:
    """Clients change over to the new key a second after the file has it; then the old one must be refused."""
    changed: list[float] = []

    def replace() -> None:
        temporary = server.keys.with_suffix(".new")
        temporary.write_text(f"{KEY}\n{NEW_KEY}\n")
        temporary.replace(server.keys)
        time.sleep(3)
        changed.append(time.monotonic())
        time.sleep(1)
        server.keys.write_text(f"{NEW_KEY}\n")  # not atomically: half a file may be read

    how = "the new key is added to the file, clients move to it, the old key is taken out; all under load"
    result = observe(server, Fault("key file replaced", how), replace, timing, lambda: NEW_KEY if changed else KEY)
    time.sleep(2)
    result.note = f"afterwards the old key gets {_get(server, '/v1/models').status_code}"
    server.keys.write_text(f"{KEY}\n")
    time.sleep(2)
    return result


def disk_full(server: Watched, timing: Timing = USUAL) -> Result:
    """Fill the file system that holds the log: a small one of memory, see `tmpfs`."""
    filler = server.log.with_name("filler")

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"x" * 4096)

    result = observe(
        server, Fault("disk full for logs", "the file system that holds the log is filled up"), fill, timing
    )
    free = os.statvfs(server.log.parent).f_bavail
    size = server.log.stat().st_size
    filler.unlink()
    _get(server, "/v1/models")  # its line is written after the answer has been sent
    deadline = time.monotonic() + 10
    while not (grew := server.log.stat().st_size > size) and time.monotonic() < deadline:
        time.sleep(0.05)
    result.note = f"{free} blocks were free; the log {'goes on' if grew else 'does not go on'} once there is room"
    return result


def clock_moved(server: Watched, clock: Clock, timing: Timing = USUAL) -> Result:
    """Its wall clock jumps ahead, then behind, then back; the server was started with a clock that can be set."""
    told: list[str] = []
    every_way = {"a day ahead": _DAY, "two days behind": -2 * _DAY, "right again": 0}

    def move() -> None:
        for ahead in every_way.values():
            clock.set(ahead)
            time.sleep(4)
            told.append(_dated(server))

    how = f"the time of day that all its processes are told jumps: {', '.join(every_way)}; 4 s each"
    result = observe(server, Fault("clock moved", how), move, timing)
    result.note = f"answers were dated {', '.join(told)}"
    return result


#: Seconds.
_DAY = 24 * 3600


def _dated(server: Watched) -> str:
    """Return the day that an answer says it is, as days from today."""
    said = parsedate_to_datetime(_get(server, "/v1/models").headers["date"])
    days = round((said.timestamp() - time.time()) / _DAY)
    return f"{days:+d} days" if days else "today"


def memory_exhausted(server: Watched, timing: Timing = USUAL) -> Result:
    """More sequences than the KV cache holds; the server was started with a cache for little more than one."""
    grown: list[httpx.Response | None] = []

    def grow() -> None:
        body = chat_body(server.known.model_name, text="Count.", max_tokens=700, ignore_eos=True, temperature=0)
        grown.extend(_at_once(server, [body] * 6, patience=200))

    result = observe(
        server,
        Fault(
            "KV cache exhausted",
            "a KV cache that holds 1.5 of the longest sequences, and 6 clients whose answers grow to 700 tokens",
        ),
        grow,
        timing,
    )
    metrics = _get(server, "/metrics").text
    counts = [text.split()[-1] for text in metrics.splitlines() if text.startswith("vllm:num_preemptions_total")]
    preempted = counts[0] if counts else "not counted"
    lengths = {each.json()["usage"]["completion_tokens"] for each in grown if each is not None and each.is_success}
    result.note = f"long answers: {_statuses(grown)}, tokens {sorted(lengths)}; preemptions: {preempted}"
    return result


#: Faults that one and the same server goes through.
FAULTS = (engine_killed, server_killed, engine_hangs, allocation_fails, keys_replaced)


@contextlib.contextmanager
def tmpfs(path: Path, size: str = "4m") -> Iterator[bool]:
    """Mount a small file system of memory there; yields whether that is allowed."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(path)], check=False)


def measure(model: str, wanted: set[str]) -> Iterator[Result]:
    """Bring about the wanted faults, all if none is named, and yield what they did."""

    def want(fault: Any) -> bool:
        return not wanted or fault.__name__ in wanted

    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        if any(map(want, FAULTS)):
            with detached(model, cache / "first", "--restarts", "9") as server:
                for fault in filter(want, FAULTS):
                    yield fault(server)
        if want(worker_killed):
            with detached(model, cache / "workers", "--tp", "2", "--restarts", "9") as server:
                yield worker_killed(server)
        if want(clock_moved):
            clock = Clock(cache / "clock")
            with detached(model, cache / "clocked", **clock.environment) as server:
                yield clock_moved(server, clock)
        if want(memory_exhausted):
            flags = ("--max-model-len", "1024", "--", "--kv-cache-memory-bytes", str((1536 + 128) * 2560))
            with detached(model, cache / "memory", *flags) as server:
                yield memory_exhausted(server)
        if want(gpu_memory_exhausted) and ServerConfig().on_gpu:
            with detached(model, cache / "gpu", "--restarts", "9") as server:
                yield gpu_memory_exhausted(server)
        if want(disk_full):
            with tmpfs(cache / "disk") as allowed:
                if allowed:
                    with detached(model, cache / "disk") as server:
                        yield disk_full(server)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{count} {outcome}" for outcome, count in sorted(counts.items(), key=lambda item: item[0] != "ok")
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def run(settings: FaultsSettings) -> None:
    """Bring about the faults that are wanted and write the report after each.

    Raises:
        BenchError: no such fault, or it needs a GPU.
    """
    from bench.machine.environment import cpu_name, gpu_names, system_name, versions

    others = (worker_killed, clock_moved, memory_exhausted, gpu_memory_exhausted, disk_full)
    names = [fault.__name__ for fault in (*FAULTS, *others)]
    wanted = set(filter(None, settings.only.split(",")))
    if not wanted <= set(names):
        raise BenchError(f"--only: {', '.join(sorted(wanted - set(names)))} is none of {', '.join(names)}")
    if gpu_memory_exhausted.__name__ in wanted and not ServerConfig().on_gpu:
        raise BenchError(f"--only: {gpu_memory_exhausted.__name__} needs a GPU")
    environment = {"versions": versions(), "system": system_name(), "cpu": cpu_name(), "gpus": gpu_names()}
    settings.out.mkdir(parents=True, exist_ok=True)
    file = settings.out / "faults.json"
    results = [Result(**one) for one in json.loads(file.read_text())["results"]] if file.exists() else []
    with stopped_by_signals():
        for new in measure(settings.model, wanted):
            print(json.dumps(asdict(new)), flush=True)
            results = [one for one in results if one.fault != new.fault] + [new]
            record = {"model": settings.model, "environment": environment, "results": [asdict(one) for one in results]}
            file.write_text(json.dumps(record, indent=1) + "\n")
            (settings.out / "table.md").write_text(table(results))


def table(results: list[Result]) -> str:
    """Return the results as Markdown, with how each fault was brought about."""
    rows = [
        f"| {one.fault} | {_counts(one.during)} | {_seconds(one.not_ready_after)} | {_seconds(one.ready_again_after)} "
        f"| {one.gap:.1f} | {one.longest_wait:.1f} | {one.restarts} |"
        for one in results
    ]
    head = (
        "| fault | requests from then on | /ready said no after (s) | ready again after (s) | longest without a good "
        "answer (s) | longest wait of a client (s) | restarts |"
    )
    told = [f"- **{one.fault}**: {one.how}.{f' Then: {one.note}.' if one.note else ''}" for one in results]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows, "", *told, ""])
