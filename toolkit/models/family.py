"""What is true of a model family and not of us: its linears, what engines fuse, tensor names, vision tower, limits.

A family is one `Family` object in a file of its own. What is asked of it is derived from few facts: a linear knows the
widths of its inputs and outputs by name, a unit knows its linears and what its scales are folded into. The decoder
layers and the blocks of the vision tower are told in the same words.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from toolkit.compat import patch_torchvision

__all__ = ["Family", "Names", "Projection", "Size", "Tower", "Unit", "Vision", "setting"]

#: Shapes by tensor name.
Shapes = dict[str, tuple[int, ...]]


def setting(config: Mapping[str, Any], default: int, *names: str) -> int:
    """Return what a config says under the first of some names that has a number, else a default."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), default)


@dataclass(frozen=True)
class Projection:
    """A linear module, [outputs, inputs]; widths by their names in `Family.widths`, or in `Vision.widths`."""

    #: Its name inside the layer, block or merger: "self_attn.q_proj".
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
    #: What divides the unit's input by its scales: a norm of the layer, or the linear whose rows (the last of them,
    #: where it has more than the unit has inputs) are the input. "": nothing, an activation stands between.
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
    #: Rows of the table of learned positions; 0: there is none.
    positions: int = 0
    #: Blocks whose output is merged too, and added behind the first decoder layers (DeepStack).
    deepstack: tuple[int, ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        """The widths that a `Tower` names: "width", "inner", "qkv", "merged" (a token's patches in a row) and "out"."""
        merged = self.width * self.merge**2
        return {"width": self.width, "inner": self.inner, "qkv": 3 * self.width, "merged": merged, "out": self.out}

    @property
    def side(self) -> int:
        """Pixels of a token's side: images are brought to multiples of it."""
        return self.patch * self.merge


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What a vision tower is made of: blocks behind a patch embedding, and mergers that make tokens of patches.

    Names are those behind `Names.visual`: ``blocks.0.`` precedes a block's, ``merger.`` a merger's.
    """

    #: A block's linears as engines run them, in the order they run.
    units: tuple[Unit, ...]
    #: A block's norms, by name: the name of their width.
    norms: Mapping[str, str]
    #: A merger's linears, and its norm with the name of its width.
    merger: tuple[Projection, ...]
    merger_norm: tuple[str, str]
    #: Whether norms have biases: layer norms have, RMS norms have not.
    norm_bias: bool
    #: Whether the patch embedding has one.
    patch_bias: bool = False
    #: Before the number of a merger for `Vision.deepstack`, whose norm comes after merging and is "merged" wide.
    deepstack: str = ""

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of a block's linears inside it: "attn.qkv", ..."""
        return tuple(name for unit in self.units for name in unit.linears)

    @cached_property
    def merger_units(self) -> tuple[Unit, ...]:
        """A merger's linears as units: the norm is before the first, an activation before the others."""
        first, *others = self.merger
        norm = self.merger_norm[0]
        return (Unit(first.name, (first,), norm), *(Unit(p.name, (p,), "", row_parallel=True) for p in others))

    @property
    def copies(self) -> int:
        """How many rows of the MLP's width a token has at the widest moment: its activation's inputs and output."""
        return 1 + sum(p.outputs == "inner" for unit in self.units for p in unit.projections)

    def mergers(self, vision: Vision) -> dict[str, str]:
        """Return what precedes each merger's names, with the name of its norm's width."""
        main = {"merger.": self.merger_norm[1]}
        return main | {f"{self.deepstack}{index}.": "merged" for index in range(len(vision.deepstack))}

    def modules(self, vision: Vision) -> Shapes:
        """Return the weight [N, K] of each linear, by its name behind `Names.visual`: blocks first, then mergers."""
        widths, found = vision.widths, Shapes()
        for index in range(vision.depth):
            for linear in (projection for unit in self.units for projection in unit.projections):
                found[f"blocks.{index}.{linear.name}"] = (widths[linear.outputs], widths[linear.inputs])
        for prefix in self.mergers(vision):
            found |= {f"{prefix}{p.name}": (widths[p.outputs], widths[p.inputs]) for p in self.merger}
        return found

    def tensors(self, vision: Vision) -> Shapes:
        """Return all tensors of a tower of these sizes, by their names behind `Names.visual`."""
        widths = vision.widths
        kernel = (vision.width, vision.channels, vision.frames, vision.patch, vision.patch)
        found: Shapes = {"patch_embed.proj.weight": kernel}
        if self.patch_bias:
            found["patch_embed.proj.bias"] = kernel[:1]
        if vision.positions:
            found["pos_embed.weight"] = (vision.positions, vision.width)
        norms = {f"blocks.{i}.{norm}": width for i in range(vision.depth) for norm, width in self.norms.items()}
        norms |= {f"{prefix}{self.merger_norm[0]}": width for prefix, width in self.mergers(vision).items()}
        for name, width in norms.items():
            found[f"{name}.weight"] = (widths[width],)
            if self.norm_bias:
                found[f"{name}.bias"] = (widths[width],)
        for name, shape in self.modules(vision).items():  # all of them have biases
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return found


@dataclass(frozen=True)
class Size:
    """A published size of a family: what its config.json says, beside what those of all sizes say."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any] = field(default_factory=dict)


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
    #: Size of a head where the config does not say it; 0: the hidden size over the heads.
    head: int = 0
    #: Tensor names on the hub, in what transformers saves, and inside vLLM.
    hub: Names
    transformers: Names
    vllm: Names
    #: How vLLM renames entries of ``modules_to_not_convert`` that begin like a checkpoint's names: the first that fits.
    vllm_renames: Mapping[str, str]
    #: Reads a vision config; the second argument is the language model's width, its default output.
    read_vision: Callable[[Mapping[str, Any], int], Vision]
    tower: Tower
    #: Image processors of transformers that prepare images for it.
    image_processors: tuple[str, ...]
    #: Tokens that stand for images and videos, by config.json's key: the token, and its id where the key is missing.
    vision_tokens: Mapping[str, tuple[str, int]]
    #: Fewest and most pixels of an image by the published checkpoints' processor.
    min_pixels: int
    max_pixels: int
    #: Positions where config.json does not say ``max_position_embeddings``.
    max_positions: int
    #: transformers' class of a decoder layer, "module:class", built from a text config and the layer's index.
    decoder_layer: str
    #: The published sizes by name ("7b"), and what their config.json files have in common: the language model's
    #: settings and the vision tower's; whether the former are nested in ``text_config``; what these call `Vision.out`.
    sizes: Mapping[str, Size]
    settings: Mapping[str, Any]
    vision_settings: Mapping[str, Any]
    nested: bool
    vision_out: str
    #: Files beside the published weights that are the family's own: preprocessor_config.json and the like.
    processor_files: Mapping[str, Mapping[str, Any]]
    #: Whether vLLM drafts with EAGLE heads for it, and whether AutoAWQ 0.2.9 runs it.
    eagle: bool
    autoawq: bool

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
        A head's size is the config's ``head_dim``, else the family's, else the hidden size over the heads.
        """
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        head = int(text.get("head_dim") or self.head or hidden // heads)
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

    def vision_tensors(self, vision: Vision) -> Shapes:
        """Return the tensors of a vision tower of these sizes, by their names behind `Names.visual`."""
        return self.tower.tensors(vision)

    def token_pixels(self, vision: Vision) -> int:
        """Return how many pixels of an image become one token."""
        return vision.side**2

    def config(self, size: Size) -> dict[str, Any]:
        """Return config.json as the published checkpoint of a size has it."""
        text = copy.deepcopy({**self.settings, **size.text})
        vision = copy.deepcopy({**self.vision_settings, **size.vision, self.vision_out: text["hidden_size"]})
        tied = text.pop("tie_word_embeddings")
        tokens = {key: text.pop(key, number) for key, (_, number) in self.vision_tokens.items()}
        own = {"architectures": [self.architecture], "model_type": self.model_type, "tie_word_embeddings": tied}
        if self.nested:
            return {**own, **tokens, "text_config": text, "vision_config": vision}
        return {**own, **tokens, **text, "vision_config": vision}

    def in_vllm(self, entry: str) -> str:
        """Return what vLLM takes an entry of ``modules_to_not_convert`` for."""
        old = next((old for old in self.vllm_renames if entry.startswith(old)), "")
        return self.vllm_renames.get(old, "") + entry.removeprefix(old)

    def decoder_layer_class(self) -> Any:
        """Import transformers' class of a decoder layer."""
        patch_torchvision()
        module, _, name = self.decoder_layer.partition(":")
        return getattr(importlib.import_module(module), name)
