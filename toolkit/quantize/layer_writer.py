"""Finished layers, packed as the file holds them and written to the journal beside the next layer's search."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from toolkit.checkpoint.values import in_16_bits
from toolkit.formats.packing import named, pack_as
from toolkit.quantize.parts import write_layer, write_scales

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.layer import LayerResult

__all__ = ["LayerWriter"]


class LayerWriter:
    """Packs layers on the device and writes them from a thread of its own; one waits to be written at most.

    Leaving the block waits for the thread.
    """

    def __init__(self, checkpoint: Checkpoint, format: str, directory: Path, device: torch.device) -> None:
        """Args: the source, a name of `LAYOUTS`, the journal's directory, and where layers are."""
        self.checkpoint = checkpoint
        self.format = format
        self.directory = directory
        self.device = device
        #: Layers that were handed in.
        self.done = 0
        self._pool = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._writing: Future[None] | None = None

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def add(self, result: LayerResult) -> None:
        """Pack a layer and have it written; the time that takes here is added to its seconds."""
        began = time.perf_counter()
        tensors = self._tensors(result)
        self.wait()
        record = {"layer": result.index, "relative_error": result.error, "choices": result.found.choices}
        if result.errors:
            record["errors"] = result.errors
        if self._stream is not None:
            # packed: the writer copies beside the next layer's search
            torch.cuda.current_stream(self.device).synchronize()
        self._writing = self._pool.submit(self._write, result.index, tensors, result.found.scales, record)
        result.seconds["write"] = time.perf_counter() - began
        result.seconds["total"] += result.seconds["write"]
        self.done += 1

    def wait(self) -> None:
        """Wait until all layers so far are on the disk; raises what kept one from it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _tensors(self, result: LayerResult) -> dict[str, torch.Tensor]:
        """Return a finished layer as the file holds it, by full names."""
        checkpoint, prefix = self.checkpoint, self.checkpoint.layer_prefix(result.index)
        tensors = {}
        for name in checkpoint.family.linears:
            if name not in result.found.linears:
                tensors[f"{prefix}{name}.weight"] = in_16_bits(checkpoint.get(f"{prefix}{name}.weight"))
                continue
            packed = pack_as(self.format, result.found.linears[name])
            tensors |= named(self.format, f"{prefix}{name}", packed)
        for name, tensor in result.found.others.items():
            tensors[prefix + name] = in_16_bits(tensor.to(checkpoint.get(prefix + name).dtype))
        return tensors

    def _write(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        scales: dict[str, torch.Tensor],
        record: dict[str, Any],
    ) -> None:
        """Bring a layer to the CPU, on a stream of its own, and write it."""
        with torch.cuda.stream(self._stream):
            on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
            scaled = {unit: s.cpu() for unit, s in scales.items() if len(s) > 1}
        write_scales(self.directory, index, scaled)  # before the layer, which counts when its file is there
        write_layer(self.directory, index, on_cpu, record)
