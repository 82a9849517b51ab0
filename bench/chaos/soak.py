"""Good, bad and hostile requests for a long time, from clients of which some vanish: `python -m bench.chaos soak`.

Looks for what only time shows: memory that grows, requests that get lost, slots that are never given back. A client's
own count of answers, by status and by reason, must equal what the server counted at /metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench.chaos.hostile import CHAT, Hostile, catalogue, chat_body, data_url, good_image
from bench.chaos.settings import SoakSettings
from bench.load.client import is_whole
from bench.machine.environment import command_line, cpu_name, gpu_names, system_name, versions

__all__ = ["Report", "run", "soak"]

#: Kinds of requests and how many of a hundred.
MIX = {"good": 60, "hostile": 25, "leaves while answered": 6, "leaves before the answer": 5, "leaves while sending": 4}
#: Hostile bodies above this come this seldom: they cost the client more than the server.
_LARGE, _LARGE_SHARE = 1 << 20, 0.02
#: Share of the time that counts as warm-up, and of the time whose memory is compared at either end of the rest.
_WARM_UP, _WINDOW = 0.2, 0.1
_SIZES = tuple(range(28, 8 * 28 + 1, 28))
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple", "gray")
_SAMPLE = re.compile(r"^(\w[\w:]*?)(?:\{(.*)\})? ([-+.\deE]+|NaN)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class Report:
    """What a soak found. Memory is in bytes: what is the processes' own (USS). Pages shared with other programs would
    change with those."""

    minutes: float
    workers: int
    seed: int
    #: Requests sent, by kind.
    sent: dict[str, int] = field(default_factory=dict)
    #: What clients that stayed saw, and what the server counted over the same time.
    seen_status: dict[str, int] = field(default_factory=dict)
    counted_status: dict[str, int] = field(default_factory=dict)
    seen_reason: dict[str, int] = field(default_factory=dict)
    counted_reason: dict[str, int] = field(default_factory=dict)
    #: Good requests that were not answered well, and hostile ones that were not refused as they should be.
    wrong: list[str] = field(default_factory=list)
    #: Seconds that refusals took.
    refusal_p50: float = 0.0
    refusal_max: float = 0.0
    #: Requests in flight at the end, by the server's gauges.
    in_flight: dict[str, float] = field(default_factory=dict)
    memory_warm: float = 0.0
    memory_end: float = 0.0
    #: (seconds since the start, bytes)
    memory: list[tuple[float, int]] = field(default_factory=list)
    #: The server's own account of its memory, by title ("host, api", "GPU 0, server"): after warm-up, at the end.
    counted_memory: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Memory at the end over memory after warm-up, less 1."""
        return self.memory_end / self.memory_warm - 1 if self.memory_warm else 0.0

    def problems(self, allowed_growth: float = 0.05) -> list[str]:
        """Return what is not as it should be, in words."""
        found = list(self.wrong)
        for reason in sorted(self.seen_reason.keys() | self.counted_reason.keys()):
            seen, counted = self.seen_reason.get(reason, 0), self.counted_reason.get(reason, 0)
            if seen != counted:
                found.append(f"{seen} refusals for {reason} were seen, {counted} were counted")
        # Whoever left has no status of its own: the server counts 200 if it had begun to answer, else 499.
        left = sum(number for kind, number in self.sent.items() if kind.startswith("leaves"))
        for status in sorted(self.seen_status.keys() | self.counted_status.keys()):
            seen, counted = self.seen_status.get(status, 0), self.counted_status.get(status, 0)
            if status not in ("200", "499") and seen != counted:
                found.append(f"{seen} answers with status {status} were seen, {counted} were counted")
        mixed = [sum(counts.get(s, 0) for s in ("200", "499")) for counts in (self.seen_status, self.counted_status)]
        if mixed[0] + left != mixed[1]:
            found.append(f"{mixed[0]} good answers and {left} that nobody waited for, {mixed[1]} were counted")
        found += [f"{name} is {value:g} at the end" for name, value in self.in_flight.items() if value]
        if self.growth > allowed_growth:
            found.append(f"memory grew by {self.growth:.1%}")
        for title, (warm, end) in self.counted_memory.items():
            if title.startswith("GPU") and warm and end / warm - 1 > allowed_growth:
                found.append(f"{title}: grew by {end / warm - 1:.1%}")
        return found


async def soak(url: str, settings: SoakSettings) -> Report:
    """Send requests to the server at ``url`` for so many minutes and return what came of them.

    The memory of the process group of ``settings.pid`` is watched; None: no memory is.
    """
    return await _Soak(url, settings).run(settings.pid)


class _Soak:
    def __init__(self, url: str, settings: SoakSettings) -> None:
        model, key = settings.model, settings.api_key
        self.url, self.model, self.pause = url.rstrip("/"), model, settings.pause
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.random = random.Random(settings.seed)
        self.report = Report(settings.minutes, settings.workers, settings.seed)
        self.sent: Counter[str] = Counter()
        self.status: Counter[str] = Counter()
        self.reason: Counter[str] = Counter()
        self.refusals: list[float] = []
        self.hostile = [entry for entry in catalogue(model) if key or entry.reason != "key"]
        self.bodies: dict[str, bytes] = {}
        self.counted: dict[str, list[tuple[float, int]]] = {}
        self.client = httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False)
        self.end = 0.0

    async def run(self, pid: int | None) -> Report:
        report = self.report
        async with self.client:
            await self._warm_up()
            before = await self._metrics()
            began = time.monotonic()
            self.end = began + report.minutes * 60
            watch = asyncio.create_task(self._watch(pid, began))
            count = asyncio.create_task(self._count_memory(began))
            await asyncio.gather(*(self._worker() for _ in range(report.workers)))
            for task in (watch, count):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            after = await self._quiet()
        report.sent, report.seen_status, report.seen_reason = dict(self.sent), dict(self.status), dict(self.reason)
        # /metrics is asked here, /ready by a supervisor every 5 s; neither is among what is sent.
        report.counted_status = _difference(
            before, after, "qvl_requests_total", "status", route=lambda r: r not in ("/metrics", "/ready")
        )
        report.counted_reason = _difference(before, after, "qvl_refusals_total", "reason")
        report.in_flight = {
            name: sum(value for (sample, _), value in after.items() if sample == name) - own
            for name, own in (("vllm:num_requests_running", 0), ("vllm:num_requests_waiting", 0), ("qvl_in_flight", 1))
        }  # the scrape itself is in flight
        if self.refusals:
            report.refusal_p50, report.refusal_max = statistics.median(self.refusals), max(self.refusals)
        self._memory()
        return report

    async def _warm_up(self) -> None:
        """Send everything once: what fills caches and the allocator's reserves is no growth afterwards."""
        urls = [self._image(*kind) for kind in itertools.product(_SIZES, _FORMATS, _COLOURS)]
        for start in range(0, len(urls), 4):
            body = chat_body(self.model, *urls[start : start + 4], max_tokens=1)
            await self.client.post(CHAT, content=body, headers=self.headers)
        for entry in self.hostile:
            await self.client.request(entry.method, entry.path, content=entry.make(), headers=self._headers_of(entry))

    async def _worker(self) -> None:
        kinds, weights = list(MIX), list(MIX.values())
        while time.monotonic() < self.end:
            await self._one(self.random.choices(kinds, weights)[0])
            await asyncio.sleep(self.random.expovariate(1 / self.pause) if self.pause else 0)

    async def _one(self, kind: str) -> None:
        if kind == "good":
            await self._good()
        elif kind == "hostile":
            await self._hostile()
        else:
            self.sent[kind] += 1
            await self._leave(kind)

    def _good_body(self) -> tuple[bytes, bool]:
        choose = self.random
        stream, tokens = choose.random() < 0.5, choose.choice((1, 4, 16, 48))
        settings: dict[str, Any] = {"max_tokens": tokens, "temperature": choose.choice((0, 1)), "stream": stream}
        urls = []
        for _ in range(choose.choice((0, 1, 1, 1, 2, 4))):
            urls.append(self._image(choose.choice(_SIZES), choose.choice(_FORMATS), choose.choice(_COLOURS)))
        text = f"What colour is it? ({choose.random()})"
        return chat_body(self.model, *urls, text=text, **settings), stream

    @staticmethod
    def _image(size: int, format: str, colour: str) -> str:
        return data_url(good_image(size, format, colour), f"image/{format.lower()}")

    async def _good(self) -> None:
        body, stream = self._good_body()
        self.sent["good"] += 1
        try:
            response = await self.client.post(CHAT, content=body, headers=self.headers)
        except httpx.HTTPError as error:
            self._wrong(f"a good request got no answer: {type(error).__name__} {error}")
            return
        self.status[str(response.status_code)] += 1
        if response.status_code != 200 or not is_whole(response.content, stream):
            self._wrong(f"a good request got {response.status_code}: {response.text[-300:]}")

    async def _hostile(self) -> None:
        entry = self.random.choice(self.hostile)
        if entry.name not in self.bodies:
            self.bodies[entry.name] = entry.make()
        body = self.bodies[entry.name]
        if len(body) > _LARGE and self.random.random() > _LARGE_SHARE:
            return
        self.sent["hostile"] += 1
        began = time.monotonic()
        try:
            response = await self.client.request(
                entry.method, entry.path, content=body, headers=self._headers_of(entry)
            )
        except httpx.HTTPError as error:
            self._wrong(f"{entry.name} got no answer: {type(error).__name__} {error}")
            return
        self.refusals.append(time.monotonic() - began)
        self.status[str(response.status_code)] += 1
        code = None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            code = response.json()["error"]["code"]
        if isinstance(code, str):
            self.reason[code] += 1
        if (response.status_code, code) != (entry.status, entry.reason):
            self._wrong(f"{entry.name} got {response.status_code}, {code}")

    def _headers_of(self, entry: Hostile) -> dict[str, str]:
        own = self.headers if entry.with_key else {"Content-Type": "application/json"}
        return own | entry.headers

    async def _leave(self, kind: str) -> None:
        """Send a good request over a connection of its own and hang up: on the way, at once, or amid the answer."""
        body, _ = self._good_body()
        where = urlsplit(self.url)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        reader, writer = await asyncio.open_connection(where.hostname, where.port or 80)
        try:
            if kind == "leaves while sending":
                body = body[: len(body) // 2]
            writer.write(head.encode() + b"\r\n" + body)
            await writer.drain()
            if kind == "leaves while answered":
                await reader.read(100)
            else:
                await asyncio.sleep(self.random.uniform(0.005, 0.1))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _wrong(self, what: str) -> None:
        if len(self.report.wrong) < 100:
            self.report.wrong.append(what)

    async def _metrics(self) -> dict[tuple[str, str], float]:
        page = (await self.client.get("/metrics", headers=self.headers)).text
        return {(name, labels): float(value) for name, labels, value in _SAMPLE.findall(page)}

    async def _quiet(self) -> dict[tuple[str, str], float]:
        """Return the metrics once nothing is in flight any more, or after half a minute."""
        for _ in range(60):
            metrics = await self._metrics()
            names = {"vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "qvl_in_flight": 1}
            if all(sum(v for (n, _), v in metrics.items() if n == name) <= own for name, own in names.items()):
                break
            await asyncio.sleep(0.5)
        return metrics

    async def _watch(self, pid: int | None, began: float) -> None:
        if pid is None:
            return
        while True:
            self.report.memory.append((round(time.monotonic() - began, 1), await asyncio.to_thread(_group_memory, pid)))
            await asyncio.sleep(self._every())

    async def _count_memory(self, began: float) -> None:
        """Ask the server for its own account again and again; a server without one is asked in vain."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                at = round(time.monotonic() - began, 1)
                for (name, text), size in (await self._metrics()).items():
                    if (title := _memory_title(name, dict(_LABEL.findall(text)))) is not None:
                        self.counted.setdefault(title, []).append((at, round(size)))
            await asyncio.sleep(self._every())

    def _every(self) -> float:
        """Return the seconds between two looks at memory."""
        return min(10.0, max(0.2, self.report.minutes * 60 / 100))

    def _memory(self) -> None:
        own = self._ends(self.report.memory)
        if own is not None:
            self.report.memory_warm, self.report.memory_end = own
        self.report.counted_memory = {
            title: found for title, seen in self.counted.items() if (found := self._ends(seen))
        }

    def _ends(self, seen: list[tuple[float, int]]) -> tuple[float, float] | None:
        """Return the medians after warm-up and at the end; None where there is nothing to take them of."""
        length = self.report.minutes * 60
        warm, window = length * _WARM_UP, length * _WINDOW
        first = [size for at, size in seen if warm <= at <= warm + window]
        last = [size for at, size in seen if at >= length - window]
        return (statistics.median(first), statistics.median(last)) if first and last else None


def _memory_title(name: str, labels: dict[str, str]) -> str | None:
    """Return what the report calls a sample of the server's own account; None for any other."""
    if name == "qvl_host_memory_bytes":
        return f"host, {labels['process']}"
    return f"GPU {labels['gpu']}, {labels['of']}" if name == "qvl_gpu_memory_bytes" else None


def _group_memory(pid: int) -> int:
    """Return the bytes of all processes of the process group that this process leads."""
    total = 0
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == pid:
                total += process.memory_full_info().uss
    return total


def _difference(
    before: dict[tuple[str, str], float], after: dict[tuple[str, str], float], name: str, by: str, **where: Any
) -> dict[str, int]:
    """Return how much a counter grew, by one of its labels; `where` tests others."""
    grown: Counter[str] = Counter()
    for (sample, text), value in after.items():
        labels = dict(_LABEL.findall(text))
        if sample == name and all(test(labels[label]) for label, test in where.items()):
            grown[labels[by]] += round(value - before.get((sample, text), 0))
    return {label: number for label, number in grown.items() if number}


def _text(report: Report) -> str:
    """Return the report as Markdown."""
    rows = [("requests", sum(report.sent.values()))]
    rows += sorted(report.sent.items())
    lines = ["| | |", "|---|---|", *(f"| {name} | {value:,} |" for name, value in rows)]
    lines += [f"| refusals: median, longest | {report.refusal_p50 * 1e3:.1f} ms, {report.refusal_max * 1e3:.0f} ms |"]
    gib = 1 << 30
    lines += [
        f"| memory after warm-up, at the end | {report.memory_warm / gib:.3f} GiB, {report.memory_end / gib:.3f} GiB"
        f" ({report.growth:+.1%}) |"
    ]
    lines += [
        f"| as the server counts: {title} | {warm / gib:.3f} GiB, {end / gib:.3f} GiB |"
        for title, (warm, end) in sorted(report.counted_memory.items())
    ]
    for title, seen, counted in (
        ("status", report.seen_status, report.counted_status),
        ("reason", report.seen_reason, report.counted_reason),
    ):
        lines += ["", f"| {title} | seen | counted |", "|---|---|---|"]
        lines += [
            f"| {name} | {seen.get(name, 0):,} | {counted.get(name, 0):,} |"
            for name in sorted(seen.keys() | counted.keys())
        ]
    problems = report.problems()
    lines += ["", *([f"- {each}" for each in problems] or ["Nothing was wrong."]), ""]
    return "\n".join(lines)


def run(settings: SoakSettings) -> int:
    """Soak a server, print what came of it, write it where that is asked for; returns 1 when something was wrong."""
    began = datetime.now(UTC)
    with contextlib.ExitStack() as stack:
        url = settings.url
        if url is None:
            from bench.chaos.faults import KEY, detached

            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvl-soak-")))
            server = stack.enter_context(detached("demo", cache))
            url, settings = server.url, settings.replaced(api_key=KEY, pid=server.known.pid)
        report = asyncio.run(soak(url, settings))
    print(_text(report))
    if settings.out is not None:
        _write(report, began, settings.out)
    return 1 if report.problems() else 0


def _write(report: Report, began: datetime, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    device = "; ".join(gpu_names()) or cpu_name()
    about = {
        "command": command_line(["python", "-m", "bench.chaos", *sys.argv[1:]]).removeprefix("qvl "),
        "began": began.isoformat(timespec="seconds"),
        "device": device,
        "system": system_name(),
        "versions": versions(),
    }
    data = about | {"problems": report.problems(), "growth": report.growth, **vars(report)}
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    head = f"# Soak of {report.minutes:g} minutes\n\n    {about['command']}\n\n{device}, {about['system']}. "
    head += ", ".join(f"{name} {version}" for name, version in versions().items())
    (out / "README.md").write_text(f"{head}\n\n{_text(report)}")
