"""An adapter's directory as peft and trainers write it: read and held against its base before anything is loaded.

Names are those of the base's modules in the trainer's transformers: since 4.52 ``model.language_model.layers.0...`` and
``model.visual...``, before it ``model.layers.0...`` and ``visual...``. Both mean the same modules (`Adapter.modules`).

Trainers put more beside the factors: the tokenizer, template and processor that they trained with, which belong to the
adapter, and at times weights that peft knows nothing of, such as a trained vision tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.anatomy import expected_tensors
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.side_files import TEMPLATES, chat_template, image_settings, tokens
from toolkit.checkpoint.weights import read_json
from toolkit.errors import CheckpointError

__all__ = ["ADAPTER_FILES", "BASE", "Adapter", "check_fit", "open_adapter", "own_files", "targets"]

#: Before a module's name in peft's files.
BASE = "base_model.model."
#: The parts that LoRA saves of a module, and those that must be there: of a linear or convolution, of an embedding.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
#: Weights that trainers leave and that no answer depends on.
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|value_head|(rng|random)_states?\w*)\.\w+")
#: What a trainer saves beside an adapter of what prepares its prompts.
ADAPTER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", *TEMPLATES),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
#: Settings of peft that make more, or something else, of an adapter than a change of its base's weights.
_UNMERGEABLE = (
    *("trainable_token_indices", "ensure_weight_tying", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
)
#: Settings of an image processor that change what the model is shown.
_PREPARING = (
    "patch_size",
    "merge_size",
    "temporal_patch_size",
    "image_mean",
    "image_std",
    "rescale_factor",
    "resample",
)
_BOUNDS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Adapter:
    """What the directory of an adapter holds."""

    path: Path
    #: adapter_config.json.
    config: dict[str, Any]
    #: Shapes of the saved tensors, by peft's names; None where they are a pickle, which is read when it is merged.
    shapes: dict[str, tuple[int, ...]] | None

    @property
    def lora(self) -> bool:
        """Whether it is a LoRA, and not one of its kin (IA3, LoHa, ...)."""
        return str(self.config.get("peft_type", "")).upper() == "LORA"

    @property
    def nested(self) -> bool:
        """Whether modules are named as transformers 4.52 and later do."""
        names = self.shapes or {}
        return any(name.startswith((f"{BASE}model.language_model.", f"{BASE}model.visual.")) for name in names)

    def modules(self) -> dict[str, set[str]]:
        """Return the parts that are saved of each LoRA module, by the module's name in the trainer's transformers."""
        found: dict[str, set[str]] = {}
        for name in self.shapes or {}:
            match = _PART.fullmatch(name.removeprefix(BASE))
            if match:
                found.setdefault(match["module"], set()).add(match["part"])
        return found


def open_adapter(path: Path) -> Adapter:
    """Read an adapter's config and the headers of its weights.

    Raises:
        CheckpointError: it is no peft adapter, a file is missing or damaged, or it holds more than can be applied.
    """
    path = path.expanduser()
    file = path / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is no LoRA adapter: it has no adapter_config.json")
    config = read_json(file)
    weights = path / "adapter_model.safetensors"
    if not weights.is_file() and not (path / "adapter_model.bin").is_file():
        raise CheckpointError(f"{path} has no adapter_model.safetensors: is the download complete?")
    more = sorted(p.name for p in path.iterdir() if _is_more(p))
    if more:
        raise CheckpointError(
            f"{path} holds weights beside the adapter, {', '.join(more)}, which peft does not read: merge them with "
            "the trainer that wrote them, or move them away if the adapter was trained without"
        )
    odd = next((key for key in _UNMERGEABLE if config.get(key)), None)
    if odd is not None:
        raise CheckpointError(
            f"the adapter {path} uses {odd}, which can't be merged right: merge it with its own trainer"
        )
    return Adapter(path, config, _shapes(weights) if weights.is_file() else None)


def _is_more(file: Path) -> bool:
    weights = file.is_file() and file.suffix in _WEIGHTS
    return weights and not file.name.startswith("adapter_model.") and not _TRAINING_STATE.fullmatch(file.name)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): is the download complete?") from error


def own_files(adapter: Path, base: Path) -> dict[str, str]:
    """Return what an adapter's tokenizer, template and processor say otherwise than its base's, by file: in words.

    Trainers save them beside the adapter, in the layout of their own versions; only what changes a prompt counts.
    """
    found: dict[str, str] = {}
    template = chat_template(adapter)
    if template is not None and template != chat_template(base):
        file = next((name for name in TEMPLATES if (adapter / name).is_file()), "tokenizer_config.json")
        found[file] = "another chat template"
    vocabulary, added = tokens(adapter)
    known = {token: number for ids in tokens(base) for token, number in ids.items()}
    odd = next((token for token, number in {**vocabulary, **added}.items() if known.get(token) != number), None)
    if odd is not None:
        file = "tokenizer.json" if (adapter / "tokenizer.json").is_file() else "tokenizer_config.json"
        found[file] = f"another token {odd!r}"
    name, settings = image_settings(adapter)
    _, theirs = image_settings(base)
    other = _other_setting(settings or {}, theirs or {})
    if other is not None:
        found[name.partition(":")[0]] = f"another {other}"
    return found


def _other_setting(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Return the first setting in which two image processors differ, None where they prepare images alike."""

    def said(settings: Mapping[str, Any]) -> dict[str, Any]:
        size = settings.get("size")
        edges = size if isinstance(size, dict) else {}
        found = {edge: settings.get(pixels) or edges.get(edge) for edge, pixels in _BOUNDS.items()}
        found |= {key: settings.get(key) for key in _PREPARING}
        return {key: value for key, value in found.items() if value is not None}

    a, b = said(ours), said(theirs)
    return next((key for key in a if key in b and a[key] != b[key]), None)


def check_fit(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Hold a LoRA's tensors against its own target list and the modules of its base.

    Raises:
        CheckpointError: half of a pair is missing, a module that it targets is not there, or one that it does not
            target is; or it has tokens that its base has no room for.
    """
    where = f"the adapter {adapter.path}"
    rows = int(checkpoint.text_config["vocab_size"])
    ids = {token: number for known in tokens(adapter.path) for token, number in known.items()}
    beyond = next((token for token, number in ids.items() if number >= rows), None)
    if beyond is not None:
        raise CheckpointError(
            f"{where} brings a tokenizer with {beyond!r} ({ids[beyond]}), beyond the {rows} embeddings of its base: "
            "merge it with its own trainer, which has resized them"
        )
    empty = next((name for name, shape in (adapter.shapes or {}).items() if 0 in shape), None)
    if empty is not None:
        raise CheckpointError(
            f"{where} holds {empty} empty, as DeepSpeed ZeRO-3 leaves what it does not collect: gather it, save again"
        )
    if not adapter.lora or adapter.shapes is None:
        return
    found = adapter.modules()
    for module, parts in found.items():
        if not any(set(pair) <= parts for pair in _PAIRS):
            have = ", ".join(sorted(parts))
            raise CheckpointError(f"{where} is incomplete: of {module} it holds {have} alone. Save or copy it again")
        if adapter.config.get("use_dora") and "lora_magnitude_vector" not in parts:
            raise CheckpointError(f"{where} is a DoRA without the magnitudes of {module}: save or copy it again")
    known = _module_names(checkpoint, adapter.nested)
    strange = next((module for module in found if module not in known), None)
    if strange is not None:
        raise CheckpointError(f"{where} was made for another model: {checkpoint.path} has no {strange}")
    wanted = {module for module in known if targets(adapter.config, module)}
    missing = sorted(wanted - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise CheckpointError(
            f"{where} is incomplete, or was made for another model: it targets {missing[0]}{more}, and has no weights "
            "for it. Save or copy it again"
        )
    odd = next((module for module in found if module not in wanted), None)
    if odd is not None:
        raise CheckpointError(
            f"{where} does not fit its own adapter_config.json: it has weights for {odd}, which that does not target. "
            "The two are of two saves"
        )


def _module_names(checkpoint: Checkpoint, nested: bool) -> list[str]:
    """Return the base's linears, embeddings and convolutions, as a trainer's transformers names them."""
    names = checkpoint.family.transformers if nested else checkpoint.family.hub
    found = [tensor.name for tensor in expected_tensors(checkpoint) if len(tensor.shape) > 1]
    inner = {checkpoint.language_prefix: names.language, checkpoint.visual_prefix: names.visual}
    modules = [_renamed(name, inner).removesuffix(".weight") for name in found]
    return list(dict.fromkeys([*modules, names.head]))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    # the longest first: "model." begins "model.visual." as well
    for old in sorted(prefixes, key=len, reverse=True):
        if name.startswith(old):
            return prefixes[old] + name.removeprefix(old)
    return name


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether a LoRA with this config has factors for a module: the rule of peft's ``check_target_module_exists``."""
    if _listed(config.get("exclude_modules"), module):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    wanted = config.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":  # peft's word for all but the head
        return not module.endswith(("embed_tokens", "lm_head", "patch_embed.proj"))
    if not _listed(wanted, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or module in (wanted or ()) or layers is None or layers == []:
        return True
    index = next(_layer_indices(config.get("layers_pattern"), module), None)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _listed(names: Any, module: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _layer_indices(pattern: Any, module: str) -> Iterator[int]:
    patterns = [pattern] if isinstance(pattern, str) and pattern else pattern or [None]
    for name in patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\." if name is None else rf"(?:^|.*?\.){name}\.(\d+)\.", module)
        if match:
            yield int(match[1])
