"""A Qwen2-VL checkpoint directory: its config, its tensors by name, how it is quantized, and whether it is whole.

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

from toolkit.checkpoint.weights import TensorInfo, read_json, read_weights
from toolkit.checkpoint.writer import CheckpointWriter
from toolkit.errors import AlreadyQuantized, CheckpointError
from toolkit.models.families import FAMILIES, architectures_of, family_of
from toolkit.models.family import Family, Vision

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "QuantizationInfo",
    "TensorInfo",
    "resolve",
]

_LAYER_0 = re.compile(r"^(.*\.)?layers\.0\.(self_attn|mlp)\.")
_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")


def resolve(model: str, revision: str | None = None) -> Path:
    """Turn ``DIR``, ``HUB_ID`` or ``demo`` into a local directory; a hub model is fetched if it is not here yet.

    ``demo`` is the embedded model (a directory of that name is ``./demo``). What exists on disk is a directory, and
    so is what begins with ``/``, ``./``, ``../`` or ``~``; any other ``org/name`` is looked up on the hub.

    Args:
        model: what the user wrote.
        revision: branch, tag or commit of a hub model.

    Raises CheckpointError for a missing directory, HubError for a model that can't be fetched.
    """
    if model == "demo":
        _refuse_revision(model, revision)
        from toolkit.paths import demo_checkpoint

        return demo_checkpoint()
    if not model.strip():
        raise CheckpointError(f"no model was given. {_WHAT_TO_GIVE}")
    path = Path(model).expanduser()
    if path.exists():
        _refuse_revision(model, revision)
        return path
    if _HUB_ID.match(model) and not model.startswith(("./", "../", "/", "~")):
        from toolkit.sources.hub import fetch

        return fetch(model, revision)
    raise CheckpointError(f"no such directory: {model}. {_WHAT_TO_GIVE}")


_WHAT_TO_GIVE = "Give a directory that holds a Qwen2-VL model, a hub name such as Qwen/Qwen2-VL-2B-Instruct, or demo."


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise CheckpointError(f"--revision {revision} only applies to a model from the hub, and {model} is local.")


@dataclass(frozen=True)
class QuantizationInfo:
    """How a checkpoint's linear layers are quantized, as its ``quantization_config`` says."""

    bits: int
    #: Inputs that share a scale; -1 is the whole row.
    group_size: int
    zero_point: bool
    #: Layout of the packed words: "gemm" or "gemv".
    version: str
    #: Modules left in 16 bits, as each engine reads it (`toolkit.checkpoint.left_out`); empty: what is not packed.
    modules_to_not_convert: tuple[str, ...] = ()
    #: Whether lm_head is quantized too.
    lm_head: bool = False


@dataclass
class Checkpoint:
    """One checkpoint directory. Make it with `Checkpoint.open`."""

    path: Path
    #: What is true of every model of its kind.
    family: Family
    #: config.json, as it is in the file.
    config: dict[str, Any]
    #: The language model's settings, from a flat or nested config; see `_text_config`.
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

        Raises CheckpointError (AlreadyQuantized for weights quantized by a method other than AWQ) with one message
        when anything is missing, damaged or of another architecture.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise CheckpointError(f"no such directory: {path}. {_WHAT_TO_GIVE}")
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file, not a directory. {_WHAT_TO_GIVE}")
        if not (path / "config.json").exists():
            raise CheckpointError(_no_config(path))
        config = read_json(path / "config.json")
        family = _family(path, config)
        text_config = _text_config(path, config)
        vision_config = config.get("vision_config")
        if not isinstance(vision_config, dict):
            raise CheckpointError(f"{path / 'config.json'} has no vision_config: download it again.")
        quantization = _quantization(path, config)
        tensors = read_weights(path)
        prefix = _layers_prefix(path, tensors)
        checkpoint = cls(path, family, config, text_config, vision_config, tensors, quantization, prefix)
        checkpoint._check_quantized_tensors()
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
        """Whether the output head is the embedding matrix: what the config says, else whether lm_head is absent."""
        tied = self.text_config.get("tie_word_embeddings")
        return tied if isinstance(tied, bool) else not any(name.startswith("lm_head.") for name in self.tensors)

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
        return [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]

    def left_linears(self) -> frozenset[tuple[int, str]]:
        """Return (layer, linear) for each decoder linear that is in 16 bits; in a 16-bit checkpoint, all."""
        return frozenset(
            (index, name)
            for index in range(self.num_layers)
            for name, module in zip(self.family.linears, self.linear_names(index), strict=True)
            if f"{module}.weight" in self.tensors and f"{module}.qweight" not in self.tensors
        )

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
            total = hashlib.blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=20)
            for t, digest in zip(tensors, digests, strict=True):
                total.update(f"\0{t.name}\0{t.dtype}\0{t.shape}\0".encode() + digest)
            self._hash = total.hexdigest()
        return self._hash

    def _check_quantized_tensors(self) -> None:
        packed = any(name.endswith(".qweight") for name in self.tensors)
        if self.quantization is None and packed:
            raise CheckpointError(
                f"{self.path} holds packed weights (*.qweight), but its config.json has no quantization_config. "
                "Copy the config.json that belongs to these weights."
            )
        if self.quantization is not None and not packed:
            raise CheckpointError(
                f"{self.path}/config.json has an AWQ quantization_config, but no weight is packed (no *.qweight). "
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
        return f"{path} is empty. {_WHAT_TO_GIVE}"
    return f"{path} has no config.json, so it is not a model (it holds {', '.join(found[:4])}, ...). {_WHAT_TO_GIVE}"


def _family(path: Path, config: dict[str, Any]) -> Family:
    found = family_of(config)
    if found is not None:
        return found
    what = ", ".join(str(a) for a in architectures_of(config)) or "no architecture"
    titles = " or ".join(family.title for family in FAMILIES)
    supported = " and ".join(f"{family.architecture} (model_type {family.model_type})" for family in FAMILIES)
    raise CheckpointError(
        f"{path} is not a {titles}: its config.json says {what} (model_type {config.get('model_type')}). "
        f"Only {supported} is supported."
    )


def _text_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Bring the language model's settings into one dict, whatever the config's shape.

    Keys as in the hub's flat config; ``num_key_value_heads``, ``rope_theta`` and ``tie_word_embeddings`` are filled in
    from where transformers 5 keeps them. Raises CheckpointError for missing sizes.
    """
    nested = config.get("text_config")
    flat = {k: v for k, v in config.items() if k not in ("text_config", "vision_config", "quantization_config")}
    text = {**flat, **nested} if isinstance(nested, dict) else flat
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text.get("num_attention_heads")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for key in (*sizes, "num_key_value_heads"):
        value = text.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path / 'config.json'}: {key} is {value!r}, not a positive number. {_AGAIN}")
    return text


_AGAIN = "The file is damaged or incomplete: copy or download it again."


def _quantization(path: Path, config: dict[str, Any]) -> QuantizationInfo | None:
    raw = config.get("quantization_config")
    if raw is None and isinstance(config.get("text_config"), dict):
        raw = config["text_config"].get("quantization_config")
    if raw is None:
        return None
    where = f"{path / 'config.json'}: quantization_config"
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is not an object. {_AGAIN}")
    method = str(raw.get("quant_method", "awq")).lower()
    if method != "awq":
        raise AlreadyQuantized(f"{path} holds {method} weights. Only 16-bit and AWQ checkpoints are supported.")
    version = str(raw.get("version", "gemm")).lower()
    if version not in ("gemm", "gemv"):
        raise CheckpointError(f"{where} has the layout {version!r}. Only 'gemm' and 'gemv' are supported.")
    bits, group_size = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size"))
    if bits != 4:
        raise CheckpointError(f"{where} says {bits} bits. AWQ's layouts hold 4.")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(f"{where} has the group size {group_size!r}, not a positive number or -1.")
    left = raw.get("modules_to_not_convert") or []
    if not isinstance(left, list):
        raise CheckpointError(f"{where}.modules_to_not_convert is not a list. {_AGAIN}")
    return QuantizationInfo(
        bits=bits,
        group_size=group_size,
        zero_point=bool(raw.get("zero_point", True)),
        version=version,
        modules_to_not_convert=tuple(str(m) for m in left),
        lm_head=bool(raw.get("lm_head", False)),
    )


def _layers_prefix(path: Path, tensors: dict[str, TensorInfo]) -> str:
    for name in tensors:
        if "visual" not in name and (match := _LAYER_0.match(name)):
            return f"{match[1] or ''}layers."
    raise CheckpointError(
        f"{path} holds no decoder layers (no tensor model.layers.0.self_attn.*; its first is {next(iter(tensors))}). "
        "These are not a whole Qwen2-VL's weights: an adapter is merged first, a sharded save is collected first."
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
    digest = hashlib.blake2b(digest_size=20)
    buffer = memoryview(bytearray(min(info.nbytes, 8 * 2**20)))
    start = 0
    while start < info.nbytes:
        count = _fill(buffer, info, start)
        digest.update(buffer[:count])
        start += count
    return digest.digest()
