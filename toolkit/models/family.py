"""What is true of a model family and not of us: its linears, what engines fuse, tensor names, vision tower, limits.

A family is one `Family` object in a file of its own. What is asked of it is derived from few facts: a decoder linear
knows the widths of its inputs and outputs by name, a unit knows its linears and what its scales are folded into.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Family", "Names", "Projection", "Unit", "Vision"]

#: Shapes by tensor name.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Projection:
    """A linear module of a decoder layer, [outputs, inputs]; widths by their names in `Family.widths`."""

    #: Its name inside the layer: "self_attn.q_proj".
    name: str
    inputs: str
    outputs: str
    bias: bool = False


@dataclass(frozen=True)
class Unit:
    """Linears that engines run as one matrix, so that they are quantized, or left in 16 bits, together."""

    #: Engines' name of the matrix inside the layer: "self_attn.qkv_proj".
    name: str
    projections: tuple[Projection, ...]
    #: What divides the unit's input by its scales: a norm of the layer, or the linear whose rows are the input.
    before: str
    #: Whether engines split its inputs over GPUs (row-parallel), and not its outputs.
    row_parallel: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of its linears inside the layer."""
        return tuple(projection.name for projection in self.projections)


@dataclass(frozen=True)
class Names:
    """What precedes tensor names, in one of the forms a family's checkpoints are found in."""

    #: Before ``embed_tokens``, ``norm`` and ``layers.0``.
    language: str
    #: Before ``blocks.0``, ``patch_embed`` and ``merger``.
    visual: str
    #: Of the output head, without ``.weight``.
    head: str = "lm_head"

    @property
    def layers(self) -> str:
        """What precedes ``0.self_attn``."""
        return f"{self.language}layers."


@dataclass(frozen=True)
class Vision:
    """Sizes of a vision tower, whatever its config calls them."""

    #: Blocks.
    depth: int
    #: Width of a block, and inside its MLP.
    width: int
    inner: int
    heads: int
    #: Sides of a patch in pixels, and of the square of patches that becomes one token.
    patch: int
    merge: int
    #: Frames that a patch spans, and colours.
    frames: int
    channels: int
    #: Width that the merger hands to the language model.
    out: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. Frozen facts: nothing here depends on a directory, an option or a device."""

    #: As it is said to users: "Qwen2-VL".
    title: str
    #: config.json's ``architectures`` and ``model_type``.
    architecture: str
    model_type: str
    #: A decoder layer's linears as engines run them, in the order they run. AWQ quantizes exactly these.
    units: tuple[Unit, ...]
    #: Norms of a decoder layer, by name: the name of their width.
    norms: Mapping[str, str]
    #: Tensor names on the hub, in what transformers saves, and inside vLLM.
    hub: Names
    transformers: Names
    vllm: Names
    #: How vLLM renames entries of ``modules_to_not_convert`` that begin like a checkpoint's names: the first that fits.
    vllm_renames: Mapping[str, str]
    #: Reads a vision config; the second argument is the language model's width, its default output.
    read_vision: Callable[[Mapping[str, Any], int], Vision]
    #: Tensors of a vision tower of these sizes, by their names behind `Names.visual`.
    vision_tensors: Callable[[Vision], Shapes]
    #: Image processors of transformers that prepare images for it.
    image_processors: tuple[str, ...]
    #: Tokens that stand for images and videos, by config.json's key: the token, and its id where the key is missing.
    vision_tokens: Mapping[str, tuple[str, int]]
    #: Most pixels of an image by the published checkpoints' processor.
    max_pixels: int
    #: Positions where config.json does not say ``max_position_embeddings``.
    max_positions: int
    #: transformers' class of a decoder layer, "module:class", built from a text config and the layer's index.
    decoder_layer: str

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The decoder layer's linears, in the order they run."""
        return tuple(projection for unit in self.units for projection in unit.projections)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Their names inside the layer: "self_attn.q_proj", ..."""
        return tuple(projection.name for projection in self.projections)

    @cached_property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """By unit's name, its linears' names."""
        return {unit.name: unit.linears for unit in self.units}

    @cached_property
    def before(self) -> dict[str, str]:
        """By unit's name, the norm or linear that its scales are folded into."""
        return {unit.name: unit.before for unit in self.units}

    def widths(self, text: Mapping[str, Any]) -> dict[str, int]:
        """Return the widths that `Projection` and `norms` name, from a text config.

        "hidden", "inner" (the MLP's), "query" (heads x head size), "value" (key-value heads x head size) and "head".
        A head's size is the config's ``head_dim``, else the hidden size over the heads.
        """
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        head = int(text.get("head_dim") or hidden // heads)
        kv_heads, inner = int(text["num_key_value_heads"]), int(text["intermediate_size"])
        return {"hidden": hidden, "inner": inner, "query": heads * head, "value": kv_heads * head, "head": head}

    def linear_shapes(self, text: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Return (K inputs, N outputs) of each of `linears`, from a text config."""
        widths = self.widths(text)
        return {linear.name: (widths[linear.inputs], widths[linear.outputs]) for linear in self.projections}

    def layer_tensors(self, text: Mapping[str, Any]) -> Shapes:
        """Return the 16-bit tensors of a decoder layer, by their names inside it."""
        widths = self.widths(text)
        found: Shapes = {f"{norm}.weight": (widths[width],) for norm, width in self.norms.items()}
        for linear in self.projections:
            found[f"{linear.name}.weight"] = (widths[linear.outputs], widths[linear.inputs])
            if linear.bias:
                found[f"{linear.name}.bias"] = (widths[linear.outputs],)
        return found

    def vision(self, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Vision:
        """Return the sizes of the vision tower, from a vision config and a text config."""
        return self.read_vision(vision, int(text["hidden_size"]))

    def token_pixels(self, vision: Vision) -> int:
        """Return how many pixels of an image become one token."""
        return (vision.patch * vision.merge) ** 2

    def in_vllm(self, entry: str) -> str:
        """Return what vLLM takes an entry of ``modules_to_not_convert`` for."""
        old = next((old for old in self.vllm_renames if entry.startswith(old)), "")
        return self.vllm_renames.get(old, "") + entry.removeprefix(old)

    def decoder_layer_class(self) -> Any:
        """Import transformers' class of a decoder layer."""
        module, _, name = self.decoder_layer.partition(":")
        return getattr(importlib.import_module(module), name)
