"""Qwen2-VL in pieces: what comes before the decoder layers, the layers one at a time, and samples through a layer.

The decoder layer is transformers' own module; only its attention is told where one sample ends and the next begins, so
that samples of any length run through it joined, without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from toolkit.quantize.search.awq_classes import Qwen2VLAWQForCausalLM

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Batch", "Qwen2VLAWQ", "Staging", "States", "StreamedLayers", "embed", "load_shell"]

_ATTENTION = "qvl_packed"


class Qwen2VLAWQ(Qwen2VLAWQForCausalLM):
    """AutoAWQ's adapter, with the places where transformers 5 keeps the language model."""

    @staticmethod
    def get_model_layers(model: Any) -> Any:
        """Return the decoder layers."""
        return model.model.language_model.layers

    @staticmethod
    def move_embed(model: Any, device: str) -> None:
        """Move all that comes before the first layer: embeddings, vision tower, rotary tables."""
        inner = model.model
        inner.visual = inner.visual.to(device)
        inner.language_model.embed_tokens = inner.language_model.embed_tokens.to(device)
        inner.language_model.rotary_emb = inner.language_model.rotary_emb.to(device)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: samples from number ``first`` on, of these ``lengths``, which are tokens ``start`` to ``stop``."""

    first: int
    start: int
    stop: int
    lengths: list[int]


@dataclass
class States:
    """The calibration samples between two decoder layers, joined in one row of T tokens.

    ``hidden``: [1, T, D] float32. ``rope``: cosines and sines [..., 1, T, head]. ``lengths``: tokens of each sample.
    ``vision``: [T] bool, true where a token is a piece of a picture. ``hidden`` may wait in host memory, the others are
    on the device.
    """

    hidden: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    lengths: list[int]
    vision: torch.Tensor

    @classmethod
    def join(cls, samples: Sequence[States]) -> States:
        """Return one row of all samples."""
        cos, sin = (torch.cat(tables, dim=-2) for tables in zip(*(s.rope for s in samples), strict=True))
        return cls(
            torch.cat([s.hidden for s in samples], dim=1),
            (cos, sin),
            [length for s in samples for length in s.lengths],
            torch.cat([s.vision for s in samples]),
        )

    def batch(self, first: int, tokens: int) -> Batch:
        """Return the micro-batch of whole samples from number ``first`` on; one above ``tokens`` goes alone."""
        start = sum(self.lengths[:first])
        lengths = [self.lengths[first]]
        for length in self.lengths[first + 1 :]:
            if sum(lengths) + length > tokens:
                break
            lengths.append(length)
        return Batch(first, start, start + sum(lengths), lengths)

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Yield all samples in micro-batches."""
        first = 0
        while first < len(self.lengths):
            found = self.batch(first, tokens)
            yield found
            first += len(found.lengths)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return a decoder layer's arguments for a micro-batch; ``hidden_states`` is [1, T, D] float32."""
        cos, sin = (table[..., batch.start : batch.stop, :] for table in self.rope)
        return {
            "hidden_states": self.hidden[:, batch.start : batch.stop].to(device),
            "position_embeddings": (cos, sin),
            "attention_mask": None,
            "lengths": batch.lengths,
        }


def _packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    lengths: list[int],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample. query [1, H, T, head], key and value [1, H_kv, T, head] -> [1, T, H, head].

    On a GPU it runs in bfloat16, as the served model's does: float32 has no flash kernel.
    """
    dtype = query.dtype
    if query.is_cuda:
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and not query.is_cuda:
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    # cuDNN's kernel, which torch would take, is compiled anew for every length: seconds, where flash takes none
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        outputs = [
            nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=shared > 1 and q.is_cuda
            )
            for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


@functools.cache
def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _packed_attention)


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
        _register_attention()
        self._checkpoint = checkpoint
        self._config = config
        self._config._attn_implementation = _ATTENTION
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


class _Rows(nn.Module):
    """An embedding whose table stays in the file: only the rows that are asked for are read."""

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self._table = table
        self._device = device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [..., D] float32 on the device."""
        return self._table[ids.cpu()].to(self._device, torch.float32)


class _Patches(nn.Module):
    """The patch embedding as the matrix product that it is: its convolution's kernel covers a patch exactly.

    PyTorch's float32 convolutions in three dimensions are slow, on GPUs by far.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Args: the convolution's weight [D, channels, frames, height, width]."""
        super().__init__()
        self._weight = weight.flatten(1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[T, channels x frames x height x width] -> [T, D]."""
        return nn.functional.linear(patches.to(self._weight.dtype), self._weight)


class _Reached(Exception):
    """The first decoder layer was reached; carries what it was called with."""

    def __init__(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.hidden = hidden
        self.rope = rope


class _Stop(nn.Module):
    """Stands where the first decoder layer would."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Raise :class:`_Reached`."""
        raise _Reached(hidden_states, kwargs["position_embeddings"])


def load_shell(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, Any]:
    """Load what comes before the decoder layers: the vision tower, float32, on the device; embeddings stay in the file.

    Returns:
        the model (``Qwen2VLForConditionalGeneration`` without layers and head) and the full text config.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(checkpoint.path)
    text_config = AutoConfig.from_pretrained(checkpoint.path).text_config
    config._attn_implementation = "sdpa"
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = list(text_config.layer_types)[:1]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config)
    inner = model.model
    inner.visual.load_state_dict(
        {
            name: checkpoint.get(checkpoint.visual_prefix + name).to(device, torch.float32)
            for name in inner.visual.state_dict()
        },
        assign=True,
    )
    inner.visual.to(device)
    inner.visual.patch_embed = _Patches(inner.visual.patch_embed.proj.weight)
    inner.language_model.rotary_emb.to(device)
    inner.language_model.layers = nn.ModuleList([_Stop()])
    inner.language_model.embed_tokens = _Rows(
        checkpoint.get(f"{checkpoint.language_prefix}embed_tokens.weight"), device
    )
    model.requires_grad_(False)
    return model.eval(), text_config


@torch.no_grad()
def embed(
    model: Any,
    samples: Sequence[PreparedSample],
    device: torch.device,
    store: torch.device,
    on_sample: Callable[[int], None] | None = None,
) -> list[States]:
    """Run every sample, alone, up to the first decoder layer.

    Args:
        model: from :func:`load_shell`.
        samples: model inputs.
        device: where the model is.
        store: where hidden states are to wait.
        on_sample: called with the number of samples done.
    """
    found: list[States] = []
    for sample in samples:
        inputs = {name: value.to(device) for name, value in sample.inputs.items()}
        ids = inputs["input_ids"][0]
        vision = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
        try:
            model.model(**inputs, use_cache=False)
        except _Reached as reached:
            found.append(States(reached.hidden.to(store), reached.rope, [len(ids)], vision))
        else:
            raise RuntimeError("the model never reached its decoder layers")
        if on_sample is not None:
            on_sample(len(found))
    return found
