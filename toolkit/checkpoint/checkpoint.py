"""A checkpoint directory: its config, its tensors by name, how it is quantized, and whether it is whole.

Opening one reads config.json and the headers of the weight files, nothing more, and needs no torch. Both shapes in
circulation are read: the hub's (flat config, ``model.layers.*`` and ``visual.*``) and what transformers 5 saves
(nested config, ``model.language_model.layers.*`` and ``model.visual.*``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.config import read_family, read_quantization, read_text_config
from toolkit.checkpoint.layouts import WORDS
from toolkit.checkpoint.quantization import QuantizationInfo
from toolkit.checkpoint.weights import TensorInfo, read_json, read_weights
from toolkit.checkpoint.writer import CheckpointWriter
from toolkit.errors import CheckpointError
from toolkit.files import DIGEST_BYTES
from toolkit.models.families import TITLES, family_of_weights
from toolkit.models.family import Family, Vision

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "WHAT_TO_GIVE",
    "Checkpoint",
    "CheckpointWriter",
    "QuantizationInfo",
    "TensorInfo",
]

_LAYER_0 = re.compile(r"^(.*\.)?layers\.0\.(self_attn|mlp)\.")

#: Ends a refusal of what is no model.
WHAT_TO_GIVE = f"Give a directory that holds a {TITLES}, a hub id such as Qwen/Qwen2-VL-2B-Instruct, or demo."


@dataclass
class Checkpoint:
    """One checkpoint directory. Make it with `Checkpoint.open`."""

    path: Path
    #: What is true of every model of its kind.
    family: Family
    #: config.json, as it is in the file.
    config: dict[str, Any]
    #: The language model's settings, from a flat or nested config; see `toolkit.checkpoint.config`.
    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    quantization: QuantizationInfo | None
    #: What precedes ``{i}.self_attn...``: "model.layers." or "model.language_model.layers.".
    layers_prefix: str
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)
    _hash: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read and check the checkpoint in directory ``path``.

        Raises CheckpointError (AlreadyQuantized for weights in a format that is not supported) with one message when
        anything is missing, damaged or of another architecture.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise CheckpointError(f"no such directory: {path}. {WHAT_TO_GIVE}")
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file, not a directory. {WHAT_TO_GIVE}")
        if not (path / "config.json").exists():
            raise CheckpointError(_no_config(path))
        config = read_json(path / "config.json")
        family = read_family(path, config)
        text_config = read_text_config(path, config)
        vision_config = config.get("vision_config")
        if not isinstance(vision_config, dict):
            raise CheckpointError(f"{path / 'config.json'} has no vision_config: download it again.")
        quantization = read_quantization(path, config)
        tensors = read_weights(path)
        _refuse_unfinished(path, tensors)
        _refuse_mixed(path, family, tensors)
        prefix = _layers_prefix(path, family, tensors)
        checkpoint = cls(path, family, config, text_config, vision_config, tensors, quantization, prefix)
        checkpoint._check_quantized_tensors()
        checkpoint._check_head()
        return checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, from the config."""
        return int(self.text_config["num_hidden_layers"])

    @property
    def language_prefix(self) -> str:
        """What precedes ``embed_tokens.weight`` and ``norm.weight``: "model." or "model.language_model."."""
        return self.layers_prefix.removesuffix("layers.")

    @property
    def visual_prefix(self) -> str:
        """What precedes the vision tower's tensors: "visual." or "model.visual."."""
        nested = self.family.transformers.visual
        return nested if any(name.startswith(nested) for name in self.tensors) else self.family.hub.visual

    @property
    def tied_lm_head(self) -> bool:
        """Whether the output head is the embedding matrix, as the config says; silence is no, as in transformers 5."""
        return bool(self.text_config.get("tie_word_embeddings"))

    @property
    def head_name(self) -> str:
        """Name of the output head's weight in 16 bits: that of the embeddings where they are tied."""
        return f"{self.language_prefix}embed_tokens.weight" if self.tied_lm_head else "lm_head.weight"

    def layer_prefix(self, index: int) -> str:
        """Return what precedes ``self_attn...`` in the tensor names of decoder layer ``index``."""
        return f"{self.layers_prefix}{index}."

    @property
    def vision(self) -> Vision:
        """Sizes of the vision tower, from the config."""
        return self.family.vision(self.vision_config, self.text_config)

    def linear_names(self, index: int) -> list[str]:
        """Return the full module names of decoder layer ``index``'s linear modules, in the order they run."""
        return [self.layer_prefix(index) + name for name in self.family.linears]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (K inputs, N outputs) of each of the family's linears, from the config."""
        return self.family.linear_shapes(self.text_config)

    def quantized_modules(self) -> list[str]:
        """Return the names of all modules that hold packed weights, in the order of the files."""
        if self.quantization is None:
            return []
        words = f".{self.quantization.layout.qweight}"
        return [name.removesuffix(words) for name in self.tensors if name.endswith(words)]

    def is_packed(self, module: str) -> bool:
        """Whether a module, by its full name, holds packed weights."""
        return self.quantization is not None and f"{module}.{self.quantization.layout.qweight}" in self.tensors

    def left_linears(self) -> frozenset[tuple[int, str]]:
        """Return (layer, linear) for each decoder linear that is in 16 bits; in a 16-bit checkpoint, all."""
        return frozenset(
            (index, name)
            for index in range(self.num_layers)
            for name, module in zip(self.family.linears, self.linear_names(index), strict=True)
            if f"{module}.weight" in self.tensors and not self.is_packed(module)
        )

    def packed_tower(self) -> dict[str, tuple[int, int]]:
        """Return (N, K) of the vision tower's linears that are packed, by their names behind `visual_prefix`."""
        modules, prefix = self.family.tower.modules(self.vision), self.visual_prefix
        packed = {name: shape for name, shape in modules.items() if self.is_packed(prefix + name)}
        return {name: (shape[0], shape[1]) for name, shape in packed.items()}

    def left_tower(self) -> list[str] | None:
        """Return the vision tower's linears that are in 16 bits, by the same names; None where all are."""
        packed = self.packed_tower()
        return [name for name in self.family.tower.modules(self.vision) if name not in packed] if packed else None

    def get(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, memory-mapped where safetensors can. Raises CheckpointError if there is none."""
        from safetensors import SafetensorError, safe_open

        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {name}.")
        try:
            if info.file not in self._handles:
                self._handles[info.file] = safe_open(info.file, framework="pt", device="cpu")
            tensor: Tensor = self._handles[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file} can't be read: {error}.") from error
        return tensor

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> int:
        """Fill ``buffer`` with a tensor's bytes from ``start`` on; returns how many they are, less only at its end.

        Raises CheckpointError if there is no such tensor, or its file can't be read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {name}.")
        return _fill(buffer, info, start)

    def content_hash(self) -> str:
        """Return 40 hex digits that change when the config or any weight changes.

        BLAKE2b over config.json's content and each tensor's name, dtype, shape and bytes; how tensors are spread over
        files does not matter. All bytes are read, in threads, at about 1 GB/s a core. Computed once per object.
        """
        if self._hash is None:
            tensors = sorted(self.tensors.values(), key=lambda t: t.name)
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                digests = list(pool.map(_tensor_digest, tensors))
            total = hashlib.blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
            for t, digest in zip(tensors, digests, strict=True):
                total.update(f"\0{t.name}\0{t.dtype}\0{t.shape}\0".encode() + digest)
            self._hash = total.hexdigest()
        return self._hash

    def _check_head(self) -> None:
        said = self.text_config.get("tie_word_embeddings")
        if said is None and not any(name.startswith("lm_head.") for name in self.tensors):
            raise CheckpointError(
                f"{self.path} has no lm_head.weight, and its config.json does not say tie_word_embeddings, which "
                "transformers 5 takes for false: set it to true if the head is the embeddings, as in the 2B."
            )

    def _check_quantized_tensors(self) -> None:
        packed = sorted({words for words in WORDS if any(name.endswith(words) for name in self.tensors)})
        if self.quantization is None and packed:
            raise CheckpointError(
                f"{self.path} holds packed weights (*{packed[0]}), but its config.json has no quantization_config. "
                "Copy the config.json that belongs to these weights."
            )
        if self.quantization is None:
            return
        layout = self.quantization.layout
        if f".{layout.qweight}" not in packed:
            what = f"they are packed as *{packed[0]}" if packed else f"no weight is packed (no *.{layout.qweight})"
            kind = "an AWQ" if layout.method == "awq" else f"a {layout.method}"
            raise CheckpointError(
                f"{self.path}/config.json has {kind} quantization_config, but {what}. "
                "Config and weights come from different models: copy the ones that belong together."
            )


def _no_config(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return (
            f"{path} is a LoRA adapter, not a whole model: "
            "give the base model as --model and this directory as --adapter."
        )
    found = sorted(p.name for p in path.iterdir())
    if not found:
        return f"{path} is empty. {WHAT_TO_GIVE}"
    return f"{path} has no config.json, so it is not a model (it holds {', '.join(found[:4])}, ...). {WHAT_TO_GIVE}"


def _refuse_unfinished(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Refuse what a trainer has written for itself and not for others."""
    for tensor in tensors.values():
        if tensor.name.startswith("base_model.model.") or ".base_layer." in tensor.name or ".lora_" in tensor.name:
            raise CheckpointError(
                f"{path} holds a model with an adapter that is not merged ({tensor.name}): "
                "call merge_and_unload() before saving it, or give base and adapter apart, with --adapter."
            )
        if tensor.numel == 0:
            raise CheckpointError(
                f"{path}: {tensor.name} is empty, as DeepSpeed ZeRO-3 leaves what it does not collect: run its "
                "zero_to_fp32.py, or save with stage3_gather_16bit_weights_on_model_save."
            )


def _refuse_mixed(path: Path, family: Family, tensors: dict[str, TensorInfo]) -> None:
    other = family_of_weights(tensors)
    if other is not None and other is not family:
        raise CheckpointError(
            f"{path}: config.json is a {family.title}'s, and the weights are a {other.title}'s: "
            "copy the config.json that belongs to them."
        )


def _layers_prefix(path: Path, family: Family, tensors: dict[str, TensorInfo]) -> str:
    known = tuple(dict.fromkeys((family.hub.layers, family.transformers.layers)))
    for name in tensors:
        if "visual" not in name and (match := _LAYER_0.match(name)):
            prefix = f"{match[1] or ''}layers."
            if prefix not in known:
                raise CheckpointError(
                    f"{path} names its layers {prefix}*, which neither vLLM nor transformers loads: rename them "
                    f"{'* or '.join(known)}*, or save the whole model with save_pretrained()."
                )
            return prefix
    raise CheckpointError(
        f"{path} holds no decoder layers (no tensor model.layers.0.self_attn.*; its first is {next(iter(tensors))}). "
        f"These are not a whole {family.title}'s weights: an adapter is merged first, a sharded save collected first."
    )


def _fill(buffer: memoryview, info: TensorInfo, start: int) -> int:
    """Fill a buffer with a tensor's bytes from ``start`` on; returns how many they are, less only at its end.

    Plain reads: a file that is cut short meanwhile is an error and not a SIGBUS, as it would be where it is mapped.
    """
    wanted = max(0, min(len(buffer), info.nbytes - start))
    done = 0
    try:
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset + start)
            while done < wanted:
                count = stream.readinto(buffer[done:wanted])
                if not count:
                    raise CheckpointError(f"{info.file} was cut short while it was read.")
                done += count
    except OSError as error:
        raise CheckpointError(f"{info.file} can't be read: {error.strerror or error}.") from error
    return done


def _tensor_digest(info: TensorInfo) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    buffer = memoryview(bytearray(min(info.nbytes, 8 * 2**20)))
    start = 0
    while start < info.nbytes:
        count = _fill(buffer, info, start)
        digest.update(buffer[:count])
        start += count
    return digest.digest()
