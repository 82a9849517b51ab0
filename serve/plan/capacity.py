"""What of a model fits a card of a given size, from shapes alone: weights, activations, KV cache, context, concurrency.

vLLM takes a share of the card, loads the weights, runs once at the largest sizes that its settings allow, captures CUDA
graphs, and gives what is left to the KV cache (``determine_available_memory`` in its ``gpu_worker.py``). The same sum:

    weights      packed tensors as they are, all others in the compute dtype's 2 bytes, tied matrices once, and what
                 vLLM 0.25.1 reported beyond them on an H100
    encoder      the widest moment of a vision block (in, two norms' worth of copies, MLP before and after its
                 activation, which has two inputs where it is gated) over the patches of the largest image, and that
                 image's pixels
    step         the widest moment of a decoder layer over ``max_num_batched_tokens``: residual, norm, gate and up,
                 their product, and what waits to be added behind the first layers (DeepStack)
    sampler      logits of ``max_num_seqs`` sequences in 16 bits, in float32, and two sorted or summed copies
    activations  the largest of the three, and the encoder's output, which waits beside the last two
    overhead     CUDA's context, cuBLAS and NCCL workspaces, the allocator's rounding, CUDA graphs, and what the step
                 takes once more, as what servers of vLLM 0.32 took grows with it
    KV cache     2 x layers x KV heads x head size x 2 bytes a token

Weights are within 3% of what vLLM reported for 2B and 7B, and the KV cache is exact (docs/tuning.md). The activations
follow from vLLM's source. The overhead is fitted to what five servers of vLLM 0.32 took on an H100, 2B and 7B, in 16
bits and four: the sum is at most 4% off. `python -m bench.studies capacity-check` holds it against boots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.plan.load import Load
from serve.settings.config import kv_bytes_per_token
from toolkit.checkpoint.checkpoint import Checkpoint, QuantizationInfo
from toolkit.checkpoint.engines import vision_is_whole
from toolkit.checkpoint.published import header, without_files
from toolkit.checkpoint.weights import TensorInfo
from toolkit.errors import ResourceError
from toolkit.models.families import size_named

__all__ = [
    "Capacity",
    "Need",
    "batch",
    "capacity",
    "image_tokens",
    "kv_tokens",
    "need",
    "shape",
    "token_pixels",
    "weight_bytes",
]

_GIB = 1 << 30
#: Bytes of an element of what vLLM computes in on a GPU.
_ELEMENT = 2
_GROUP_SIZE = 128
#: vLLM's own settings for its API server (``get_batch_defaults``, 0.32): batched tokens and sequences on a card of at
#: least so many bytes.
_DEFAULTS = ((160 * _GIB, 16384, 1024), (70 * _GIB, 8192, 1024), (0, 2048, 256))
#: Tokens of a block of the KV cache; one block is vLLM's own.
_BLOCK = 16
#: Reported beyond the tensors: 2B 0.145 GiB, its AWQ 0.08; 7B 0.156, its AWQ (Machete widens zero points) 0.20.
_LOADED_BESIDE = int(0.14 * _GIB)
#: CUDA's context and library workspaces (fitted: the sum of servers of vLLM 0.32 less all else), and graphs.
_CONTEXT_BYTES = int(1.55 * _GIB)
_GRAPH_BYTES_A_LAYER = 12 << 20


@dataclass(frozen=True)
class Need:
    """Bytes on one card before any KV cache."""

    weights: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.overhead


@dataclass(frozen=True)
class Capacity:
    """What is left on a card, and what that is good for."""

    model: str
    #: "fp16" (either 16-bit float) or "awq".
    format: str
    #: Bytes of the card.
    card: int
    need: Need
    kv_bytes: int
    kv_bytes_per_token: int
    #: Longest context that the settings and the model allow and one sequence fills; 0: the model does not fit.
    context: int
    #: Sequences of that length that the cache holds at once.
    concurrency: int
    #: Largest image in pixels that is read without being scaled down.
    image_pixels: int

    @property
    def fits(self) -> bool:
        """Whether the model can be served at all."""
        return self.context > 0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return _whole_blocks(self.kv_bytes // self.kv_bytes_per_token)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types; sizes in bytes."""
        return {
            "model": self.model,
            "format": self.format,
            "card_bytes": self.card,
            "fits": self.fits,
            "weights_bytes": self.need.weights,
            "activations_bytes": self.need.activations,
            "overhead_bytes": self.need.overhead,
            "kv_cache_bytes": max(0, self.kv_bytes),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_tokens": self.kv_tokens,
            "context": self.context,
            "concurrency": self.concurrency,
            "image_pixels": self.image_pixels,
        }


def shape(name: str, quantized: bool) -> Checkpoint:
    """Return a published size as a checkpoint of headers without files, bfloat16 or AWQ: "7b", "qwen2.5-vl-3b", ...

    Raises FormatError for another name.
    """
    family, size = size_named(name)
    bare = without_files(name, family, family.config(size))
    if not quantized:
        return bare
    tensors: dict[str, TensorInfo] = {}
    for tensor in bare.tensors.values():
        module = tensor.name.removesuffix(".weight")
        if module.endswith(family.linears) and module.startswith(bare.layers_prefix):
            outputs, inputs = tensor.shape
            groups = inputs // _GROUP_SIZE
            packed = {"qweight": ("I32", (inputs, outputs // 8)), "qzeros": ("I32", (groups, outputs // 8))}
            packed["scales"] = ("F16", (groups, outputs))
            for part, (dtype, shape) in packed.items():
                tensors[f"{module}.{part}"] = header(f"{module}.{part}", dtype, shape)
        else:
            tensors[tensor.name] = tensor
    return replace(bare, tensors=tensors, quantization=QuantizationInfo(4, _GROUP_SIZE, True, "gemm", ("visual",)))


def weight_bytes(checkpoint: Checkpoint, tp: int = 1) -> int:
    """Return the bytes of weights on each of ``tp`` GPUs: packed ones as they are, others in 2 bytes an element."""
    total, whole = 0, vision_is_whole(checkpoint, tp)
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("lm_head.") and checkpoint.tied_lm_head:
            continue  # vLLM takes the embeddings
        size = tensor.nbytes if tensor.dtype == "I32" else tensor.numel * _ELEMENT
        split = len(tensor.shape) > 1 and not (whole and name.startswith(checkpoint.visual_prefix))
        total += size // tp if split else size
    return total


def need(checkpoint: Checkpoint, card: int, load: Load) -> Need:
    """Return what a card of ``card`` bytes holds before the KV cache; the terms are in the module's docstring."""
    text, vision = checkpoint.text_config, checkpoint.vision
    hidden, inner, vocab = int(text["hidden_size"]), int(text["intermediate_size"]), int(text["vocab_size"])
    tokens, sequences = batch(card, load)
    image = image_tokens(checkpoint, load.image_pixels)
    # the encoder runs over as many of the largest images as the budget holds, at least one
    patches = max(image, tokens // image * image) * vision.merge**2
    pixels = patches * vision.channels * vision.frames * vision.patch**2 * _ELEMENT
    copies = checkpoint.family.tower.copies
    encoder = pixels + patches * (3 * vision.width + copies * vision.inner // load.tp) * _ELEMENT
    levels = len(vision.deepstack)
    cached = max(image, tokens) * hidden * (1 + levels) * _ELEMENT
    step = tokens * ((3 + levels) * hidden + 3 * inner // load.tp) * _ELEMENT
    sampler = sequences * vocab * (_ELEMENT + 3 * 4)
    activations = max(encoder, cached + step, cached + sampler)
    overhead = _CONTEXT_BYTES + int(text["num_hidden_layers"]) * _GRAPH_BYTES_A_LAYER + step
    return Need(weight_bytes(checkpoint, load.tp) + _LOADED_BESIDE, activations, overhead)


def capacity(checkpoint: Checkpoint, card: int, load: Load, model: str) -> Capacity:
    """Return what serving ``checkpoint`` on a card of ``card`` bytes has room for under ``load``.

    Args:
        model: its name in the result.

    Raises ResourceError for a card that is no card.
    """
    if card < _GIB:
        raise ResourceError(f"a card of {card / _GIB:.2g} GiB: give its memory in GiB, such as --gpu-memory 16.")
    before = need(checkpoint, card, load)
    kv_bytes = int(card * load.share) - before.total
    per_token = kv_bytes_per_token(checkpoint, "bfloat16") // min(
        load.tp, int(checkpoint.text_config["num_key_value_heads"])
    )
    found = Capacity(model, "awq" if checkpoint.quantization else "fp16", card, before, kv_bytes, per_token, 0, 0, 0)
    positions = int(checkpoint.text_config.get("max_position_embeddings", checkpoint.family.max_positions))
    context = min(load.context, positions, found.kv_tokens) // _BLOCK * _BLOCK
    if context < _LEAST_CONTEXT:
        return found
    pixels = min(context, image_tokens(checkpoint, load.image_pixels)) * token_pixels(checkpoint)
    return replace(found, context=context, concurrency=found.kv_tokens // context, image_pixels=pixels)


#: Less than a small image, a question and an answer is no server.
_LEAST_CONTEXT = 512


def kv_tokens(checkpoint: Checkpoint, kv_bytes: int, dtype: str) -> int:
    """Return the tokens that a KV cache of ``kv_bytes`` holds for requests."""
    return _whole_blocks(kv_bytes // kv_bytes_per_token(checkpoint, dtype))


def _whole_blocks(tokens: int) -> int:
    return max(0, tokens // _BLOCK - 1) * _BLOCK


def batch(card: int, load: Load) -> tuple[int, int]:
    """Return the tokens and sequences of a step: those asked for, or vLLM's own for such a card."""
    tokens, sequences = next((tokens, sequences) for least, tokens, sequences in _DEFAULTS if card >= least)
    return load.max_num_batched_tokens or tokens, load.max_num_seqs or sequences


def image_tokens(checkpoint: Checkpoint, image_pixels: int | None = None) -> int:
    """Return the tokens of the largest image that the processor lets through, with a bound on its pixels if any."""
    bound = _processor_pixels(checkpoint)
    return max(1, min(bound, image_pixels or bound) // token_pixels(checkpoint))


def token_pixels(checkpoint: Checkpoint) -> int:
    """Return how many pixels of an image become one token."""
    return checkpoint.family.token_pixels(checkpoint.vision)


def _processor_pixels(checkpoint: Checkpoint) -> int:
    from toolkit.checkpoint.weights import read_json

    file = checkpoint.path / "preprocessor_config.json"
    settings: Mapping[str, Any] = read_json(file) if file.is_file() else {}
    size = settings.get("size")
    found = settings.get("max_pixels") or (size.get("longest_edge") if isinstance(size, dict) else None)
    return int(found or checkpoint.family.max_pixels)
