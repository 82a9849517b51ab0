"""Do `vllm bench serve` and this benchmark measure the same? Both ask one server, in turns, requests made alike.

    python -m bench.studies agreement --url http://127.0.0.1:8000 --tokenizer DIR --concurrency 1,8 --out agreement.json

Equal are the number of requests, their prompts' and answers' lengths in tokens, the size of their images, requests in
flight, temperature 0, ``ignore_eos``, and that special tokens are shown. No two requests are equal, over both tools and
all rounds, so that no cache answers. Needs vLLM in this environment, whose command is run in a process of its own.

Both define alike: TTFT is the first chunk of a request, counted from when it was sent; TPOT is per request, over the
tokens after the first; throughput is output tokens over the time from the first request to the last answer. Where they
differ in detail is told in docs/compare.md. What a server's unsteadiness hides shows against one that answers by the
clock (`python -m bench.studies timed-server`).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.load import metrics
from bench.load.client import Trace, ask
from bench.load.endpoint import Endpoint, discover, http_client
from bench.load.inputs import SpeedInputs
from bench.load.loops import Block, closed_loop
from bench.load.workload import ImageSize, Lengths, parse_sizes
from bench.machine import environment
from bench.studies.settings import AgreementSettings
from toolkit.errors import BenchError, QvlError
from toolkit.paths import source_root

__all__ = ["Agreement", "Figures", "Load", "measure", "run", "table"]

METRICS = ("ttft_ms", "tpot_ms", "output_tokens_per_s")


@dataclass(frozen=True, slots=True)
class Load:
    """What both tools put on the server.

    Attributes:
        requests: of each round.
        size: of each request's image; None: text alone.
        prompt_words: of the prompt, each a token of Qwen's.
        output_tokens: of each answer.
    """

    concurrency: int
    requests: int
    size: ImageSize
    prompt_words: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What a tool found in a round: medians over requests, and output tokens a second of wall time."""

    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Both tools' rounds under one load, in the order they were measured."""

    load: Load
    ours: list[Figures]
    theirs: list[Figures]

    def median(self, tool: str, metric: str) -> float:
        """Median over rounds of a tool's (``ours`` or ``theirs``) figure."""
        return float(statistics.median(getattr(figures, metric) for figures in getattr(self, tool)))

    def ratio(self, metric: str) -> float:
        """Ours / theirs, of the medians over rounds."""
        return self.median("ours", metric) / self.median("theirs", metric)

    def spread(self, metric: str) -> float:
        """How far apart a tool's own rounds are, the larger of the two: (most - least) / median. A ratio closer to 1
        than this proves nothing, and one farther off proves little."""
        found: list[float] = []
        for tool in (self.ours, self.theirs):
            values = [getattr(figures, metric) for figures in tool]
            found.append((max(values) - min(values)) / statistics.median(values))
        return max(found)


# --- ours -------------------------------------------------------------------------------------------------------------


async def _ours(endpoint: Endpoint, bodies: Sequence[bytes], concurrency: int) -> Figures:
    async with http_client(endpoint.url, endpoint.api_key, connections=concurrency) as http:

        async def send(body: bytes, due: float) -> Trace:
            return await ask(http, body, timeout_s=600.0, scheduled=due)

        block = await closed_loop(send, bodies, concurrency)
    return _figures(block)


def _figures(block: Block) -> Figures:
    failed = [trace.failure for trace in block.traces if trace.failure]
    if failed:
        raise BenchError(f"{len(failed)} of {len(block.traces)} requests failed: {failed[0].kind}: {failed[0].message}")
    found = metrics.summarise(block.traces, block.wall_s)
    if found.ttft is None or found.tpot is None or found.output_tokens_per_s is None:
        raise BenchError("the server does not count tokens (stream_options.include_usage): there is no TPOT to compare")
    return Figures(1000 * found.ttft.p50, 1000 * found.tpot.p50, found.output_tokens_per_s)


# --- theirs -----------------------------------------------------------------------------------------------------------


def _line(body: bytes) -> dict[str, Any]:
    """What `vllm bench serve` reads of a request of ours: a line of its dataset ``custom_image`` or ``custom``."""
    content = json.loads(body)["messages"][0]["content"]
    if any(part["type"] == "image_url" for part in content):
        return {"content": content}
    return {"prompt": content[0]["text"]}


def _theirs(endpoint: Endpoint, tokenizer: str, bodies: Sequence[bytes], load: Load, timeout_s: float) -> Figures:
    lines = [_line(body) for body in bodies]
    with tempfile.TemporaryDirectory(prefix="qvl-agreement-") as name:
        directory = Path(name)
        dataset = directory / "requests.jsonl"
        dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = {
            "backend": "openai-chat",
            "base-url": endpoint.url,
            "endpoint": "/v1/chat/completions",
            "model": endpoint.model,
            "tokenizer": tokenizer,
            "dataset-name": "custom" if "prompt" in lines[0] else "custom_image",
            "dataset-path": dataset,
            "custom-output-len": load.output_tokens,
            "num-prompts": load.requests,
            "max-concurrency": load.concurrency,
            "temperature": 0,
            "extra-body": '{"skip_special_tokens": false}',
            "ready-check-timeout-sec": 0,  # its check would be a request of the dataset, known to the server's caches
            "result-dir": directory,
            "result-filename": "result.json",
        }
        command = [sys.executable, "-m", "serve.app.server", "bench", "serve"]
        command += [part for option, value in options.items() for part in (f"--{option}", str(value))]
        command += ["--ignore-eos", "--skip-chat-template", "--disable-shuffle", "--disable-tqdm", "--save-result"]
        environ = os.environ | ({"OPENAI_API_KEY": endpoint.api_key} if endpoint.api_key else {})
        limit = None if math.isinf(timeout_s) else timeout_s
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=source_root(), env=environ, timeout=limit
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"vllm bench serve was not over within {timeout_s:.0f} s") from None
        result = directory / "result.json"
        if done.returncode or not result.exists():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise BenchError(f"vllm bench serve ended with {done.returncode}: {said[-1] if said else 'nothing said'}")
        found = json.loads(result.read_text())
    if found["completed"] != load.requests:
        raise BenchError(f"vllm bench serve completed {found['completed']} of {load.requests} requests")
    expected = load.requests * load.output_tokens
    if found["total_output_tokens"] != expected:
        raise BenchError(f"vllm bench serve counted {found['total_output_tokens']} output tokens, not {expected}")
    return Figures(found["median_ttft_ms"], found["median_tpot_ms"], found["output_throughput"])


# --- both -------------------------------------------------------------------------------------------------------------


def measure(
    endpoint: Endpoint,
    tokenizer: str,
    loads: Sequence[Load],
    rounds: int,
    *,
    limit_s: float = math.inf,
    keep: Callable[[list[Agreement]], None] = lambda found: None,
) -> list[Agreement]:
    """Measure every load with both tools in turns, each first in every other round: all loads once, then again.

    Args:
        limit_s: no pair of measurements is begun that might end later than so many seconds after the start, if it takes
            as long as the longest so far.
        keep: told of all that was found after each pair.

    Returns:
        The loads that both tools measured, with as many rounds as there was time for.

    Raises:
        BenchError: a request failed, the server does not count tokens, or there was no time for a single round.
    """
    run, begun, longest = secrets.token_hex(8), time.monotonic(), 0.0
    found = [Agreement(load, [], []) for load in loads]
    inputs = [SpeedInputs(run, (load.size,), load.output_tokens, Lengths.fixed(load.prompt_words)) for load in loads]
    for index in range(rounds):
        for one, made in zip(found, inputs, strict=True):
            now = time.monotonic()
            if now - begun + longest > limit_s:
                return _measured(found, limit_s)
            load, label = one.load, f"{one.load.concurrency}/{one.load.size}"
            if index == 0:
                warm = made.bodies(f"{label}/warm-up", 2 * load.concurrency, endpoint.model)
                asyncio.run(_ours(endpoint, warm, load.concurrency))
            for tool in ("ours", "theirs") if index % 2 == 0 else ("theirs", "ours"):
                bodies = made.bodies(f"{label}/{index}/{tool}", load.requests, endpoint.model)
                if tool == "ours":
                    one.ours.append(asyncio.run(_ours(endpoint, bodies, load.concurrency)))
                else:
                    left = max(10.0, limit_s - (time.monotonic() - begun))
                    one.theirs.append(_theirs(endpoint, tokenizer, bodies, load, left))
            longest = max(longest, time.monotonic() - now)
            keep(_measured(found, limit_s))
    return found


def _measured(found: Sequence[Agreement], limit_s: float) -> list[Agreement]:
    known = [one for one in found if one.ours and one.theirs]
    if not known:
        raise BenchError(f"no round was over within {limit_s:g} s: give more with --limit, or fewer --requests")
    return known


def table(found: Sequence[Agreement]) -> str:
    """Return a table in markdown."""
    lines = [
        "| in flight | image | figure | ours | vllm bench serve | ours / theirs | rounds apart |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for one in found:
        size = "text" if one.load.size is None else f"{one.load.size[0]}x{one.load.size[1]}"
        for metric, name in zip(METRICS, ("TTFT, ms", "TPOT, ms", "output tokens/s"), strict=True):
            ours, theirs = one.median("ours", metric), one.median("theirs", metric)
            lines.append(
                f"| {one.load.concurrency} | {size} | {name} | {ours:.4g} | {theirs:.4g} | {one.ratio(metric):.3f} "
                f"| {100 * one.spread(metric):.0f}% |"
            )
    return "\n".join(lines)


def run(settings: AgreementSettings) -> None:
    """Measure both tools and print the table; with ``settings.out`` write all that was found, after each round. Exits
    with 1 where it can't be measured."""
    try:
        endpoint = asyncio.run(discover(settings.url, settings.api_key))
        loads = [
            Load(flight, max(settings.requests, 3 * flight), size, settings.prompt_words, settings.output_tokens)
            for size in parse_sizes(settings.image_sizes)
            for flight in map(int, settings.concurrency.split(","))
        ]
        facts = {
            "command": shlex.join(["python", "-m", "bench.studies", *sys.argv[1:]]),
            "device": environment.gpu_names() or environment.cpu_name(),
            "versions": environment.versions(),
            "server_version": endpoint.version,
        }

        def keep(found: list[Agreement]) -> None:
            if settings.out:
                _write(settings.out, facts, found)

        found = measure(
            endpoint, settings.tokenizer, loads, settings.rounds, limit_s=settings.limit_s or math.inf, keep=keep
        )
    except QvlError as error:
        sys.exit(str(error))
    print(table(found))
    short = [one for one in found if len(one.ours) < settings.rounds]
    if short or len(found) < len(loads):
        print(f"\nthe time of {settings.limit_s:g} s was over before all {settings.rounds} rounds of all loads were")


def _write(file: Path, facts: dict[str, Any], found: Sequence[Agreement]) -> None:
    """Write all that was found so far, whole."""
    known = [one | {"ratios": {m: each.ratio(m) for m in METRICS}} for each in found for one in [asdict(each)]]
    text = json.dumps({"created": datetime.now(UTC).isoformat(timespec="seconds"), **facts, "loads": known}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text + "\n")
    part.replace(file)
