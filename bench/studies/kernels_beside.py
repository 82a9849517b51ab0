"""Kernels for 4-bit weights beside each other and bf16, product by product, in one run on one card.

    python -m bench.studies kernels-beside --models 7b,2b --out docs/results/kernels

vLLM's own layers with AutoAWQ's weights, as a server makes them; random weights, groups of 128, bfloat16. Times are
medians over replays of CUDA graphs in which as many products follow one another as there are copies of the weights,
more than the L2 cache holds. Each kernel's answer is held against a float32 product of the dequantized weights.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from bench.studies.kernels import copies_of, graph_time, shapes_of
from bench.studies.settings import BesideSettings
from serve.settings.engine import EngineSettings
from toolkit.files import write_whole
from toolkit.formats.packing import GEMM_ORDER

__all__ = ["BF16", "KERNELS", "bf16_calls", "errors_of", "kernel_calls", "layers_of", "run", "world"]

BF16 = "bf16"
KERNELS = ("qvl", "humming", "marlin", "machete")
GROUP = 128
#: Rows for which each kernel's answer is checked: of each of our kernels, and beyond them.
_CHECKED = (1, 7, 16, 64)
#: Bytes that a second brings from the memory of a card, as its data sheet says.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}


@contextmanager
def world() -> Iterator[None]:
    """Be one process of vLLM's, so that its layers can be made. Once a process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.set_default_device("cuda")
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0)
        initialize_model_parallel(1, 1)
        yield


class Layers:
    """Linear layers of vLLM's with random 4-bit weights [N, K], as many as fill more than the L2 cache."""

    def __init__(self, kernel: str, columns: int, inputs: int) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.config.kernel import KernelConfig
        from vllm.model_executor.layers.linear import ReplicatedLinear
        from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

        settings = EngineSettings(kernel=kernel)
        os.environ |= settings.environment() | {"VLLM_DISABLED_KERNELS": "" if kernel == "qvl" else "QvlLinearKernel"}
        if kernel == "qvl":
            from serve.kernels.plugin import register

            register()
        backend: Any = settings.arguments()[1]
        self.layers: list[Any] = []
        with set_current_vllm_config(VllmConfig(kernel_config=KernelConfig(linear_backend=backend))):
            for number in range(copies_of(columns, inputs, 4)):
                torch.manual_seed(number)
                layer: Any = ReplicatedLinear(
                    inputs,
                    columns,
                    bias=True,
                    quant_config=AutoAWQConfig(4, GROUP, True, False),
                    params_dtype=torch.bfloat16,
                    prefix=f"{kernel}{number}",
                )
                for words in (layer.qweight, layer.qzeros):
                    words.data.random_(-(2**31), 2**31 - 1)
                layer.scales.data.uniform_(0.001, 0.01)
                layer.bias.data.normal_()
                if not self.layers:
                    self.dense = _dense(layer.qweight.data, layer.qzeros.data, layer.scales.data)
                    self.bias = layer.bias.data.float().clone()
                layer.quant_method.process_weights_after_loading(layer)
                self.layers.append(layer)
        self.kernel = type(self.layers[0].quant_method.kernel).__name__

    def error(self, rows: int) -> float:
        """Return how far the first layer's answer for random inputs is from the float32 product, relative."""
        x = torch.randn(rows, self.dense.shape[0], dtype=torch.bfloat16)
        want = x.float() @ self.dense + self.bias
        got = self.layers[0](x)
        got = got[0] if isinstance(got, tuple) else got
        return float((got.float() - want).norm() / want.norm())


def layers_of(kernel: str, columns: int, inputs: int) -> Layers:
    """Return layers [N, K] of a kernel."""
    return Layers(kernel, columns, inputs)


def _dense(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the float32 weights [K, N] of AutoAWQ's GEMM layout."""
    places = torch.tensor(GEMM_ORDER, device=words.device).argsort() * 4

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return ((packed.unsqueeze(-1) >> places) & 15).reshape(packed.shape[0], -1).float()

    return (unpack(words) - unpack(zeros).repeat_interleave(GROUP, 0)) * scales.float().repeat_interleave(GROUP, 0)


def kernel_calls(layers: Any, rows: int) -> list[Callable[[], object]]:
    """Return a product with so many rows for each layer."""
    x = torch.randn(rows, layers.dense.shape[0], dtype=torch.bfloat16)
    return [functools.partial(layer, x) for layer in layers.layers]


def bf16_calls(columns: int, inputs: int, rows: int) -> list[Callable[[], object]]:
    """Return products with random bf16 weights, as torch makes them."""
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    weights = [torch.randn(columns, inputs, dtype=torch.bfloat16) * 0.02 for _ in range(copies_of(columns, inputs, 16))]
    return [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]


def errors_of(layers: Any) -> dict[str, float]:
    """Return the error at each number of rows that is checked."""
    return {str(rows): float(layers.error(rows)) for rows in _CHECKED}


def run(settings: BesideSettings) -> None:
    """Measure, and write results.json and README.md as it goes."""
    end = time.monotonic() + settings.seconds
    rows = [int(number) for number in settings.rows.split(",")]
    kernels = settings.kernels.split(",")
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(), "vllm": version("vllm"), "torch": torch.__version__}
    found |= {"rows": rows, "us": {}, "errors": {}, "classes": {}}
    settings.out.mkdir(parents=True, exist_ok=True)
    with world():
        for model in settings.models.split(","):
            for name, (columns, inputs) in shapes_of(model, products=settings.products).items():
                key = f"{model} {name} {columns}x{inputs}"
                for kernel in (BF16, *kernels):
                    if time.monotonic() > end:
                        print(f"the time is up before {key}, {kernel}", flush=True)
                        return
                    _measure(found, key, kernel, (columns, inputs), rows)
                    write_whole(settings.out / "results.json", json.dumps(found, indent=1) + "\n")
                    write_whole(settings.out / "README.md", _table(found, settings))


def _measure(found: dict[str, Any], key: str, kernel: str, shape: tuple[int, int], rows: Sequence[int]) -> None:
    us = found["us"].setdefault(key, {})
    try:
        layers = None if kernel == BF16 else layers_of(kernel, *shape)
        if layers is not None:
            found["errors"].setdefault(key, {})[kernel] = errors_of(layers)
            found["classes"][kernel] = layers.kernel
        us[kernel] = [
            graph_time(bf16_calls(*shape, number) if layers is None else kernel_calls(layers, number))
            for number in rows
        ]
        error = _errors(found["errors"].get(key, {}).get(kernel, {}))
        print(key, kernel, *(f"{each:.1f}" for each in us[kernel]), error, flush=True)
    except Exception as why:
        us.pop(kernel, None)
        print(key, kernel, f"failed: {type(why).__name__}: {str(why)[:300]}", flush=True)


def _table(found: dict[str, Any], settings: BesideSettings) -> str:
    """Return a layer's four products summed up, by model, kernel and rows, and each product."""
    speed = next((speed for name, speed in BANDWIDTH.items() if name in found["card"]), None)
    lines = [
        "# Kernels for 4-bit weights beside each other",
        "",
        f"{found['card']}, vLLM {found['vllm']}, torch {found['torch']}; groups of {GROUP}, bfloat16, with a bias; µs "
        "a product, the median over replays of a CUDA graph over more copies of the weights than the L2 cache holds. "
        f"In brackets the error at {', '.join(map(str, _CHECKED))} rows against a float32 product of the dequantized "
        "weights, in thousandths.",
        "",
        f"    python -m bench.studies kernels-beside --models {settings.models} --rows {settings.rows}",
        "",
    ]
    for model in settings.models.split(","):
        keys = [key for key in found["us"] if key.split()[0] == model]
        whole = len(keys) == 4
        head = " | ".join(map(str, found["rows"]))
        lines += [f"## {model}", "", f"| product | kernel | {head} |", "|---|---|" + "---|" * len(found["rows"])]
        for key in keys:
            for kernel, times in found["us"][key].items():
                error = _errors(found["errors"].get(key, {}).get(kernel, {}))
                named = kernel + (f" ({error})" if error else "")
                lines.append(f"| {key.removeprefix(model + ' ')} | {named} | {_cells(times)} |")
        for kernel in (BF16, *KERNELS):
            if whole and all(kernel in found["us"][key] for key in keys):
                sums = [sum(found["us"][key][kernel][i] for key in keys) for i in range(len(found["rows"]))]
                lines.append(f"| **all four** | {kernel} | {_cells(sums)} |")
                if speed:
                    size = sum(_bytes(key, kernel) for key in keys) / speed * 1e6
                    shares = " | ".join(f"{size / each:.0%}" for each in sums)
                    lines.append(f"| reading their weights / that | {kernel} | {shares} |")
        lines.append("")
    return "\n".join(lines)


def _errors(by_rows: dict[str, float]) -> str:
    """Return the errors at each number of rows, in thousandths: "1.6, 1.7"."""
    return ", ".join(f"{1e3 * error:.2f}" for error in by_rows.values())


def _bytes(key: str, kernel: str) -> float:
    """Return the bytes of a product's weights: 2 each, or 4 bits and a group's scale and zero point."""
    columns, inputs = map(int, key.split()[-1].split("x"))
    return columns * inputs * (2.0 if kernel == BF16 else 0.5 + 2.5 / GROUP)


def _cells(times: Sequence[float]) -> str:
    return " | ".join(f"{each:.1f}" for each in times)
