"""A trace whose times are known gives the step that was put together, on a GPU and on a CPU."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.studies.step_profile import StepProfile, _ended, analyse, markdown, read_trace
from toolkit.errors import BenchError


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 0, "tid": tid}


def gpu_trace() -> dict[str, Any]:
    """Two steps of 100 us: a matmul of 40, 20 idle, a norm of 10 under a copy of 20 on another stream, 20 idle."""
    found = []
    for start in (0, 100):
        found += [
            event("execute_context_0(0)_generation_1(1)", start, 5, "user_annotation"),
            event("cudaGraphLaunch", start, 6, "cuda_runtime"),
            event("cudaLaunchKernel", start + 7, 2, "cuda_runtime"),
            event("cudaStreamSynchronize", start + 10, 30, "cuda_runtime"),
            event("aten::linear", start, 9, "cpu_op"),
            event("matmul", start + 0, 40),
            event("norm", start + 60, 10),
            event("copy", start + 60, 20, "gpu_memcpy", tid=8),
        ]
    return {"traceEvents": [*found, {"ph": "M", "name": "process_name"}]}


def test_a_gpu() -> None:
    found = analyse(gpu_trace())
    assert (found.on, found.steps) == ("gpu", 2)
    assert found.step_us == pytest.approx(180 / 2)  # the last one ends with its last event
    assert found.busy_us == pytest.approx(60) and found.gap_us == pytest.approx(30)
    assert found.gaps == pytest.approx(1.5) and found.events == 3
    assert (found.launches, found.launch_us, found.sync_us) == (2, 8, 30)
    assert [(each.name, each.count, each.us) for each in found.operations] == [
        ("matmul", 1, 40),
        ("copy", 1, 20),
        ("norm", 1, 10),
    ]


def test_a_cpu_counts_what_no_other_contains() -> None:
    events = [
        event("execute_new_0(0)_cached_1(1)", 0, 100, "user_annotation"),
        event("aten::linear", 0, 50, "cpu_op"),
        event("aten::addmm", 5, 40, "cpu_op"),
        event("aten::silu", 70, 30, "cpu_op"),
        event("aten::other", 10, 20, "cpu_op", tid=9),
    ]
    found = analyse({"traceEvents": events})
    assert found.on == "cpu" and {each.name for each in found.operations} == {
        "aten::linear",
        "aten::silu",
        "aten::other",
    }
    assert (found.busy_us, found.gap_us, found.launches) == (80, 20, 0)


def test_steps_can_be_given() -> None:
    assert analyse({"traceEvents": [event("k", 0, 10), event("k", 20, 10)]}, steps=2).step_us == 15


@pytest.mark.parametrize(
    ("trace", "steps", "message"),
    [({}, None, "neither kernels"), ({"traceEvents": [event("k", 0, 1)]}, None, "no step of vLLM's")],
)
def test_nothing_to_tell(trace: dict[str, Any], steps: int | None, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        analyse(trace, steps)


def test_the_page() -> None:
    shown = markdown(analyse(gpu_trace()), "2b-awq, 1 in flight")
    assert "| nothing runs | 30 us (33%) in 2 gaps of over 1 us |" in shown
    assert "| 40.0 | 44.4% | 1.0 | `matmul` |" in shown
    idle = StepProfile("cpu", 1, 0, 0, 0, 0, 0, 0, 0, 0)
    assert idle.idle_share == 0


def test_traces_are_found(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="wrote no trace"):
        read_trace(tmp_path)
    (tmp_path / "a.pt.trace.json").write_text("{}")
    deep = tmp_path / "rank0"
    deep.mkdir()
    with gzip.open(deep / "b.pt.trace.json.gz", "wt") as stream:
        json.dump(gpu_trace(), stream)
    assert read_trace(tmp_path)["traceEvents"]


def test_answers_that_do_not_end_are_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> bool:
        async def answer(end: asyncio.Event | None) -> None:
            if end is not None:
                await end.wait()

        never = asyncio.Event()
        tasks = [asyncio.create_task(answer(each)) for each in (None, never)]
        await _ended(tasks, 0.01)
        late = not tasks[1].done()
        tasks[1].cancel()
        return late

    assert asyncio.run(run())
    assert "1 of 2 answers had not ended after 0.01 s" in capsys.readouterr().err
