"""Stock AutoAWQ, timed step by step: a plain script for an environment of its own, so it imports nothing of ours.

    python stock.py JOBS.json

JOBS.json is a list of jobs: ``model`` and ``out`` (directories), ``report`` (a JSON file to write), ``group_size``,
``duo`` and one of ``ids`` (a JSON file, a list of token id lists of equal length) or ``batch`` (safetensors: a
processor's padded batch). Written for AutoAWQ 0.2.9 with transformers 4.51.3, the last pair its authors tested.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from safetensors.torch import load_file

CUDA = torch.cuda.is_available()


class PeakHost:
    """Most anonymous resident memory (bytes) while the block runs, sampled every 20 ms: page cache does not count."""

    def __enter__(self) -> PeakHost:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.bytes = max(self.bytes, int(line.split()[1]) * 1024)


def now() -> float:
    """Return seconds, after the GPU has done all it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedQuantizer(AwqQuantizer):
    """AutoAWQ's quantizer with a clock around each of its own steps; what they do is left alone.

    A layer ends when its last weight is packed, so what AutoAWQ does between the steps (moving layers, applying
    scales, collecting garbage) counts to ``total`` and to no step.
    """

    def quantize(self) -> None:
        """Quantize all layers; ``layers`` holds the seconds of each."""
        self.layers: list[dict[str, float]] = []
        self._steps: dict[str, float] = {}
        self._mark = now()
        super().quantize()

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        began = now()
        yield
        self._steps[name] = self._steps.get(name, 0.0) + now() - began

    def _get_input_feat(self, *args: Any, **kwargs: Any) -> Any:
        with self._step("capture"):
            return super()._get_input_feat(*args, **kwargs)

    def _search_best_scale(self, *args: Any, **kwargs: Any) -> Any:
        with self._step("scale"):
            return super()._search_best_scale(*args, **kwargs)

    def _search_best_clip(self, *args: Any, **kwargs: Any) -> Any:
        with self._step("clip"):
            return super()._search_best_clip(*args, **kwargs)

    def _apply_quant(self, *args: Any, **kwargs: Any) -> None:
        with self._step("pack"):
            super()._apply_quant(*args, **kwargs)
        end = now()
        self.layers.append({**self._steps, "total": end - self._mark})
        self._steps, self._mark = {}, end
        print(f"layer {len(self.layers)}: {self.layers[-1]['total']:.2f} s", file=sys.stderr, flush=True)


class _Caught(Exception):
    """Ends a forward at the first decoder layer."""


class PaddedBatchQuantizer(TimedQuantizer):
    """The recipe AutoAWQ's documentation gives for Qwen2-VL: ``calib_data`` is one padded batch of the processor."""

    def init_quant(self, n_samples: int | None = None, max_seq_len: int | None = None) -> Any:
        """Run the whole batch up to the first decoder layer; return layers, its keyword arguments and its input."""
        device = "cuda:0" if CUDA else "cpu"
        layers = self.awq_model.get_model_layers(self.model)
        caught: dict[str, Any] = {}

        def catch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            caught["hidden"] = args[0] if args else kwargs.pop("hidden_states")
            caught["kwargs"] = kwargs
            raise _Caught

        layers[0] = layers[0].to(device)
        self.awq_model.move_embed(self.model, device)
        hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        with torch.no_grad(), contextlib.suppress(_Caught):
            self.model(**{name: value.to(device) for name, value in self.calib_data.items()})
        hook.remove()
        layers[0] = layers[0].cpu()
        self.awq_model.move_embed(self.model, "cpu")
        return layers, caught["kwargs"], caught["hidden"]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job and return its report."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = now()
    with PeakHost() as host:
        # device_map=None: only the layer at work is on the GPU
        model = AutoAWQForCausalLM.from_pretrained(
            job["model"], torch_dtype=torch.float16, safetensors=True, device_map=None
        )
        # AutoAWQ's documentation passes use_cache=False, which it ignores for this model: a cache would be caught among
        # the layer's arguments and grow with every forward of the search, until masks no longer fit
        model.model.config.use_cache = False
        loaded = now()
        if "ids" in job:
            ids = json.loads(Path(job["ids"]).read_text())
            data: dict[str, Any] = {"calib_data": ids, "max_calib_samples": len(ids), "max_calib_seq_len": len(ids[0])}
        else:
            data = {"calib_data": load_file(job["batch"])}
        config = {"zero_point": True, "q_group_size": job["group_size"], "w_bit": 4, "version": "GEMM"}
        model.quantize(
            None,
            quant_config=config,
            duo_scaling=job["duo"],
            quantizer_cls=TimedQuantizer if "ids" in job else PaddedBatchQuantizer,
            **data,
        )
        quantized = now()
        model.save_quantized(job["out"])
    layers = [{name: round(value, 4) for name, value in layer.items()} for layer in model.quantizer.layers]
    seconds = {"load": loaded - began, "quantize": quantized - loaded, "total": now() - began}
    return {
        "layers": [{"layer": index, "seconds": seconds} for index, seconds in enumerate(layers)],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_device_bytes": torch.cuda.max_memory_allocated() if CUDA else 0,
        "peak_host_bytes": host.bytes,
    }


def main(file: str) -> None:
    """Do all jobs; one that fails leaves a report with ``failed`` and does not stop the others."""
    about = {
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("autoawq", "torch", "transformers")},
        },
    }
    for job in json.loads(Path(file).read_text()):
        try:
            report = run(job)
        except Exception as error:
            traceback.print_exc()
            report = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        Path(job["report"]).write_text(json.dumps({**about, **report}, indent=1))
        gc.collect()  # the model of a job is gone before the next is loaded


if __name__ == "__main__":
    main(sys.argv[1])
