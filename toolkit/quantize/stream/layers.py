"""The decoder layers of a checkpoint, one at a time, from their files to where they are worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.quantize.stream.states import ATTENTION, register_attention

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Staging", "StreamedLayers"]


class Staging:
    """Two pieces of page-locked host memory, through which tensors go from a file to a GPU.

    Files are read, not mapped: mapped pages come one fault at a time, which keeps a layer waiting for its weights where
    faults are slow, and a copy from page-locked memory goes on beside the next read.
    """

    #: Bytes of a piece.
    _SIZE = 32 * 2**20

    def __init__(self) -> None:
        self._pieces = [torch.empty(self._SIZE, dtype=torch.uint8, pin_memory=torch.cuda.is_available()) for _ in "ab"]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, checkpoint: Checkpoint, name: str, device: torch.device) -> torch.Tensor:
        """Return a checkpoint's tensor on the device, in its own dtype, once the current stream is through."""
        like = checkpoint.get(name)  # mapped, not read: for its dtype and shape
        tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
        target = tensor.view(-1).view(torch.uint8)
        start = 0
        while start < len(target):
            piece, sent = self._pieces[self._turn], self._sent[self._turn]
            if sent is not None:
                sent.synchronize()
            count = checkpoint.read_into(name, piece.numpy().data, start)
            target[start : start + count].copy_(piece[:count], non_blocking=True)
            if device.type == "cuda":
                self._sent[self._turn] = torch.cuda.current_stream(device).record_event()
            self._turn = 1 - self._turn
            start += count
        return tensor


class StreamedLayers:
    """The decoder layers of a checkpoint, each read from its safetensors when asked for and kept by nobody here.

    On a GPU the next layer is read and sent while this one is worked on.
    """

    def __init__(self, checkpoint: Checkpoint, config: Any, device: torch.device) -> None:
        """Args: the source, its transformers text config, and where layers go (as float32)."""
        register_attention()
        self._checkpoint = checkpoint
        self._config = config
        self._config._attn_implementation = ATTENTION
        self._device = device
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._staging = Staging() if device.type == "cuda" else None

    def __len__(self) -> int:
        return int(self._config.num_hidden_layers)

    @property
    def widths(self) -> tuple[int, int]:
        """Width of the hidden states, and inside the MLP."""
        return int(self._config.hidden_size), int(self._config.intermediate_size)

    def load(self, index: int, then: int | None = None) -> nn.Module:
        """Return decoder layer ``index`` in float32 on the device; ``then`` (None: the next) is read ahead."""
        with torch.device("meta"):
            layer = self._checkpoint.family.decoder_layer_class()(self._config, index)
        names = list(layer.state_dict())
        coming, self._coming = self._coming, None
        state = coming[1].result() if coming is not None and coming[0] == index else self._read(index, names)
        then = index + 1 if then is None else then
        if self._pool is not None and 0 <= then < len(self):
            self._coming = (then, self._pool.submit(self._read, then, names))
        for name in names:
            if self._stream is not None:
                state[name].record_stream(torch.cuda.current_stream(self._device))
            state[name] = state[name].float()
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)
        module: nn.Module = layer.eval()
        return module

    def _read(self, index: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read a layer to the device, in the source's dtype, beside the work that goes on there."""
        prefix = self._checkpoint.layer_prefix(index)
        if self._stream is None or self._staging is None:
            # a copy: float32 sources would else share memory with the file
            return {name: self._checkpoint.get(prefix + name).clone() for name in names}
        with torch.cuda.stream(self._stream):
            state = {name: self._staging.send(self._checkpoint, prefix + name, self._device) for name in names}
            self._stream.synchronize()
        return state

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._coming = None
