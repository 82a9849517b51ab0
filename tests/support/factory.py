"""Reports for tests, built from traces by the code that builds real ones."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.load.client import Failure, Trace
from bench.load.loops import Block
from bench.questions.tasks import ImageData, Question, check_image
from bench.report.build import build
from bench.report.schema import Memory, Report, SystemInfo
from bench.roles import ROLES, Role
from bench.run.config import BenchConfig
from bench.run.measured import Measurements, Stretch
from bench.run.session import Outcome


def config(**settings: Any) -> BenchConfig:
    """Settings of a bench of two servers that are not there."""
    given = {"baseline": "http://127.0.0.1:1", "candidate": "http://127.0.0.1:2", "out": Path("out/never-written")}
    return BenchConfig(**(given | settings))


CONFIG = config(concurrencies=(1, 4), requests=8, rounds=2, output_tokens="5", image_sizes="56x56", nonce="n")


def trace(text: str = "x", ttft: float = 0.1, gap: float = 0.02, n: int = 5, counted: bool = True) -> Trace:
    chunks = tuple(ttft + gap * i for i in range(n))
    return Trace(0.0, 0.0, chunks[-1], chunks, text, 7, n if counted else None, "stop")


def questions(per_task: int, tasks: Sequence[str] = ("red", "blue"), metric: str = "exact") -> list[Question]:
    return [Question(f"{task}-{i}", task, "Which?", ("yes",), metric) for task in tasks for i in range(per_task)]


def image(number: int, width: int = 48, height: int = 32) -> ImageData:
    """An image that differs from those of other numbers."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 90)).save(buffer, "PNG")
    return check_image(buffer.getvalue(), "test", "image")


def about_images(images: int, each: int, task: str = "scans") -> list[Question]:
    """Questions, ``each`` of them about one of so many images, in turn."""
    known = [image(number) for number in range(images)]
    return [
        Question(f"{task}-{i}", task, "Which?", ("yes",), images=(known[i % images],)) for i in range(images * each)
    ]


def system(role: Role, **changes: Any) -> SystemInfo:
    fields: dict[str, Any] = {
        "role": role,
        "label": {"baseline": "fp16", "candidate": "awq"}[role],
        "source": role,
        "booted": True,
        "model": role,
        "url": "http://127.0.0.1:1",
        "disk_bytes": {"baseline": 1000, "candidate": 400}[role],
        "memory": Memory(host_bytes=5000, host_kind="pss"),
    }
    return SystemInfo(**(fields | changes))


def report(
    wrong: dict[Role, set[str]] | None = None,
    *,
    per_task: int = 20,
    speed: dict[Role, float] | None = None,
    counted: bool = True,
    failure: Failure | None = None,
    margin: float = 1.0,
    asked: list[Question] | None = None,
    settings: BenchConfig = CONFIG,
    **systems: Any,
) -> Report:
    """Both systems answer all questions, except those in ``wrong``; ``speed`` scales all times of a role."""
    asked = questions(per_task) if asked is None else asked
    wrong, speed = wrong or {}, speed or {}
    measured = Measurements()
    for role in ROLES:
        scale = speed.get(role, 1.0)
        measured.answers[role] = {q.id: trace("no" if q.id in wrong.get(role, ()) else "yes") for q in asked}
        for load in settings.loads:
            count = max(4, 3 * (load.concurrency or 1))  # three waves: fewer are a burst
            traces = tuple(
                trace(ttft=scale * (0.1 + i / 1000), gap=0.02 * scale, counted=counted) for i in range(count)
            )
            for round_ in range(2):
                measured.units[role, load.name, round_] = [(load, Stretch(Block(traces, scale), load.rate_per_s))]
    if failure:
        measured.failures["candidate", "questions", failure] += 2
    both = {role: systems.get(role) or system(role) for role in ROLES}
    outcome = Outcome(measured, both, asked, "t.jsonl", duration_s=1.0)
    return build(outcome, settings.replaced(margin=margin), command="qvl bench")


def second_version(found: Report) -> dict[str, Any]:
    """What a report of closed loops looked like in schema version 2."""
    data: dict[str, Any] = json.loads(found.model_dump_json()) | {"schema_version": 2}
    del data["unfinished"], data["fidelity"], data["environment"]["commit"], data["verdict"]["speed"]
    work = data["workload"]
    for name in work.keys() & {
        *("rates", "arrivals", "sweep", "sweep_concurrency", "duration_s", "ramp_s", "preset", "prompt_tokens"),
        *("images_per_request", "slos"),
    }:
        del work[name]
    work["output_tokens"] = int(work["output_tokens"])
    kept = ("role", "requests", "wall_s", "requests_per_s", "output_tokens_per_s", "output_tokens", "prompt_tokens")
    latencies = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "client_lag_ms")
    for index, point in enumerate(data["speed"]):
        old = {name: point[name] for name in kept} | {"concurrency": point["load"]["concurrency"]}
        for name in latencies:
            latency = point[name]
            old[name] = latency and {key: latency[key] for key in ("p50", "p90", "p99", "mean", "n")}
        data["speed"][index] = old
    data["speed_ratios"] = [
        {name: ratio[name] for name in ("metric", "ratio", "low", "high")}
        | {"concurrency": int(ratio["load"].split()[0])}
        for ratio in data["speed_ratios"]
        if ratio["metric"] in ("ttft", "tpot", "e2e")
    ]
    for system_ in data["systems"].values():
        del system_["memory"]["kv_cache_tokens"]
    for item in (data["accuracy"] or {}).get("items", ()):
        item["pictures"] = item.pop("images")
    return data


def first_version(found: Report) -> dict[str, Any]:
    """What a report looked like in schema version 1."""
    data = second_version(found) | {"schema_version": 1}
    del data["accuracy"]["thumbnails"]
    for row in [data["accuracy"]["overall"], *data["accuracy"]["tasks"]]:
        for name in ("clusters", "recovery", "verdict", "p_adjusted", "items_needed"):
            del row[name]
        del row["difference"]["design_effect"]
    for item in data["accuracy"]["items"]:
        for name in ("choices", "cluster", "pictures"):
            del item[name]
        for role in ("baseline", "candidate"):
            del item[role]["note"]
    return data
