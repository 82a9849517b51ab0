"""Our kernel for few rows, tuned for the shapes of known models: every plan's answer is checked, then timed.

    python -m bench.studies kernels --out serve/kernels/plans.json      # minutes on an H100; what is there stays

Times are medians over replays of CUDA graphs in which as many products follow one another as there are copies of the
weights, more than the L2 cache holds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.studies.settings import KernelSettings
from serve.kernels import plans, tiles
from serve.kernels.nvrtc import compile_cubin
from serve.kernels.plans import Plan
from serve.kernels.product import SOURCE, Product, Shape, options

#: Widths of decoder layers: hidden, inner, attention heads, key-value heads, width of a head.
LAYERS = {
    "2b": (1536, 8960, 12, 2, 128),
    "7b": (3584, 18944, 28, 4, 128),
    "72b": (8192, 29568, 64, 8, 128),
    "2.5-3b": (2048, 11008, 16, 2, 128),
    "2.5-32b": (5120, 27648, 40, 8, 128),
    "3-2b": (2048, 6144, 16, 8, 128),
    "3-4b": (2560, 9728, 32, 8, 128),
    "3-8b": (4096, 12288, 32, 8, 128),
    "3-32b": (5120, 25600, 64, 8, 128),
}
#: Rows of their output heads, which ``--products head`` is about.
HEADS = {
    "2b": 151936,
    "7b": 152064,
    "72b": 152064,
    "2.5-3b": 151936,
    "2.5-32b": 152064,
    "3-2b": 151936,
    "3-4b": 151936,
    "3-8b": 151936,
    "3-32b": 151936,
}
#: Bytes of weights that a replay reads: several times the L2 cache.
_ROTATED = 250e6
_ERROR = 5e-3
#: Columns that are packed at once.
_COLUMNS = 4096


def shapes_of(model: str, gpus: int = 1, products: str = "layer") -> dict[str, tuple[int, int]]:
    """Return (N, K) of a layer's four products, or of the "head", on one of ``gpus`` GPUs, where they divide."""
    hidden, inner, heads, kv_heads, head = LAYERS[model]
    if products == "head":
        return {"head": (HEADS[model] // gpus, hidden)}
    if heads % gpus or (inner % gpus):
        return {}
    kv = max(1, kv_heads // gpus)
    return {
        "qkv": ((heads // gpus + 2 * kv) * head, hidden),
        "o": (hidden, heads // gpus * head),
        "gate_up": (2 * inner // gpus, hidden),
        "down": (hidden, inner // gpus),
    }


def graph_time(calls: Sequence[Callable[[], object]], replays: int = 9) -> float:
    """Return the median microseconds of a call, from replays of a graph of all of them."""
    for call in calls[:2]:
        call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    found = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(float(begin.elapsed_time(end)) * 1e3 / len(calls))
    return sorted(found)[len(found) // 2]


class Weights:
    """Random weights of a shape: as our kernel reads them, and what they stand for."""

    def __init__(self, columns: int, inputs: int, group: int, copies: int) -> None:
        generator = np.random.default_rng(columns * 31 + inputs)
        torch.manual_seed(columns * 31 + inputs)
        values = torch.randint(0, 16, (inputs, columns), dtype=torch.uint8, device="cuda")
        zeros = generator.integers(0, 16, (inputs // group, columns), dtype=np.uint8)
        scales = (torch.rand(inputs // group, columns) * 0.01 + 0.001).bfloat16()
        lanes = torch.from_numpy(np.ascontiguousarray(tiles.by_lane(scales.view(torch.int16).numpy())))
        steps = scales.float().cuda().repeat_interleave(group, 0)
        origin = torch.from_numpy(zeros).cuda().float().repeat_interleave(group, 0)
        self.dense = values.float().sub_(origin).mul_(steps)
        first = packed(values)
        others = [torch.randint(-(2**31), 2**31 - 1, first.shape, dtype=torch.int32).cuda() for _ in range(1)]
        self.words = [first, *(others[0].roll(i) for i in range(copies - 1))]
        self.scales = [lanes.view(torch.bfloat16).cuda() for _ in range(copies)]
        self.zeros = [torch.from_numpy(tiles.pack_zeros(zeros)).cuda() for _ in range(copies)]


def packed(values: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit values [K, N] as `tiles.pack` does, where they are: an output head takes numpy minutes."""
    return torch.cat([_packed(part) for part in values.split(_COLUMNS, 1)], 1)


def _packed(values: torch.Tensor) -> torch.Tensor:
    inputs, columns = values.shape
    parts = values.to(torch.int64).reshape(inputs // 16, 2, 4, 2, columns // 64, 4, 2, 8)
    lanes = parts.permute(0, 4, 7, 2, 5, 6, 1, 3).reshape(inputs // 16, columns // 64, 32, 4, 8)
    places = torch.tensor(tiles.ORDER, device=values.device).argsort() * 4
    words = (lanes << places).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def copies_of(columns: int, inputs: int, bits: int) -> int:
    """Return how many copies of the weights make a replay read more than the cache holds."""
    return max(3, min(80, int(_ROTATED / (columns * inputs * bits / 8)) + 1))


def run(settings: KernelSettings) -> None:
    """Tune for the models, GPUs and group sizes that are asked for."""
    groups = [int(group) for group in settings.groups.split(",")]
    gpus = [int(number) for number in settings.gpus.split(",")]
    models = settings.models.split(",")
    shapes = [
        shape for model in models for number in gpus for shape in shapes_of(model, number, settings.products).values()
    ]
    tune(settings.out, shapes, groups, settings.seconds)


def tune(out: Path, shapes: Sequence[tuple[int, int]], groups: Sequence[int], seconds: float) -> None:
    """Measure the candidates of every shape and write the best of each; what is in ``out`` already stays.

    Args:
        out: JSON file of the plans. shapes: (N, K). groups: group sizes. seconds: begin no shape after so long.
    """
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"plans": {}}
    table |= {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    until = time.monotonic() + seconds
    for columns, inputs in sorted(set(shapes), key=math.prod):
        for group in groups:
            kinds = {rows: table["plans"].setdefault(f"{group}/{rows}", {}) for rows in plans.ROWS}
            if all(f"{columns},{inputs}" in kind for kind in kinds.values()) or time.monotonic() > until:
                continue
            for rows, (best, us) in _best(Shape(columns, inputs, group, False)).items():
                kinds[rows][f"{columns},{inputs}"] = [*astuple(best), round(us, 2)]
                numbers = f"{us:7.2f} us {astuple(best)}"
                print(f"{columns:6} x {inputs:5} group {group:3} rows {rows:2}: {numbers}", flush=True)
            out.write_text(_dumps(table))


def _best(shape: Shape) -> dict[int, tuple[Plan, float]]:
    """Return the fastest plan for each number of rows, and its microseconds."""
    if shape.reason() is not None:
        return {}
    found = {rows: list(plans.candidates(shape.columns, shape.inputs, rows)) for rows in plans.ROWS}
    source = SOURCE.read_text(encoding="utf-8")
    with ThreadPoolExecutor() as pool:
        jobs = [options(shape, plan, rows, plans.SMS) for rows, tried in found.items() for plan in tried]
        list(pool.map(lambda job: compile_cubin(source, job), jobs))
    weights = Weights(shape.columns, shape.inputs, shape.group_size, copies_of(shape.columns, shape.inputs, 4))
    measured = {rows: _measure(weights, [(shape, plan) for plan in tried], rows) for rows, tried in found.items()}
    return {rows: ranked[0] for rows, ranked in measured.items() if ranked}


def _measure(weights: Weights, jobs: Sequence[tuple[Shape, Plan]], rows: int) -> list[tuple[Plan, float]]:
    """Return the plans whose answers are right, the fastest first."""
    found = []
    x = torch.randn(rows, weights.dense.shape[0]).cuda().bfloat16()
    want = x.float() @ weights.dense
    for shape, plan in jobs:
        product = Product(shape, [(rows, plan)], plans.SMS)
        if not product.max_rows:
            continue
        out = torch.full((rows, shape.columns), float("nan"), device="cuda", dtype=torch.bfloat16)
        product(x, weights.words[0], weights.scales[0], weights.zeros[0], None, out)
        error = ((out.float() - want).norm() / want.norm()).item()
        if not error < _ERROR:
            print(f"wrong by {error:.3g}: {shape} rows {rows} {plan}")
            continue
        operands = zip(weights.words, weights.scales, weights.zeros, strict=True)
        calls = [_call(product, x, each, out) for each in operands]
        found.append((plan, graph_time(calls, 5)))
    return sorted(found, key=lambda each: each[1])


def _call(product: Product, x: torch.Tensor, weight: tuple[torch.Tensor, ...], out: torch.Tensor) -> Callable[[], None]:
    words, scales, zeros = weight
    return lambda: product(x, words, scales, zeros, None, out)


def _dumps(table: dict[str, Any]) -> str:
    """Write a shape a line."""
    kinds = []
    for kind, shapes in sorted(table["plans"].items()):
        lines = ",\n".join(f"   {json.dumps(shape)}: {json.dumps(numbers)}" for shape, numbers in shapes.items())
        kinds.append(f"  {json.dumps(kind)}: {{\n{lines}\n  }}")
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in table.items() if key != "plans")
    return "{\n" + head + ' "plans": {\n' + ",\n".join(kinds) + "\n }\n}\n"
