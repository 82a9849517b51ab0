"""LoRA adapters that are served beside their base model, each as a model of its own name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from toolkit.errors import ServerError

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Lora", "check_lora", "lora_arguments"]

T = TypeVar("T")

#: Ranks that vLLM can be started with; it takes adapters up to the one given.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: What changes an adapter's answers and vLLM does not have (vllm/lora/peft_helper.py), or drops without a word.
_UNSERVED = {"use_dora": "DoRA", "lora_bias": "biases of its own", "bias": "trained biases", "fan_in_fan_out": "Conv1D"}
#: Ways of beginning a training that leave the base's weights as they were.
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true")
#: peft's names: base_model.model.<module in its base>.lora_A.weight
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_LAYER_LINEAR = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<linear>(?:self_attn|mlp)\.\w+)")


@dataclass(frozen=True)
class Lora:
    """An adapter directory and the name that requests ask for it by."""

    name: str
    path: Path
    #: Rank of its largest factors.
    rank: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name=DIR`. Raises ServerError for anything but a peft LoRA adapter that vLLM can serve."""
        from toolkit.sources.adapter_files import open_adapter

        name, equals, directory = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or not directory:
            raise ServerError(f"--lora {text}: give a name and a directory, such as --lora charts=out/charts-lora.")
        path = Path(directory).expanduser().resolve()
        if not (path / "adapter_config.json").is_file():
            raise ServerError(f"--lora {text}: {path} has no adapter_config.json, so it is no adapter that peft wrote.")
        config = _read(lambda: open_adapter(path)).config
        _refuse_unservable(path, config)
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise ServerError(
                f"{path}: its adapter_config.json has the rank r {config.get('r')!r}, no positive number."
            )
        if max(ranks) > _RANKS[-1]:
            raise ServerError(
                f"the adapter {path} has rank {max(ranks)}, and vLLM takes up to {_RANKS[-1]}. "
                "Merge it into its base instead: `qvl quantize --adapter`."
            )
        return cls(name, path, max(ranks))


def _refuse_unservable(path: Path, config: dict[str, Any]) -> None:
    merge = "Merge it into its base instead: `qvl quantize --adapter`."
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise ServerError(f"the adapter {path} is of the kind {config.get('peft_type')}, and vLLM serves LoRA. {merge}")
    for key, what in _UNSERVED.items():
        if config.get(key) not in (None, False, "none"):
            raise ServerError(f"the adapter {path} uses {what} ({key}), which vLLM does not serve. {merge}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise ServerError(
            f"the adapter {path} was begun by {start}, which changed the weights of its base as well: "
            "vLLM does not serve it. Convert it with peft's path_initial_model_for_weight_conversion"
        )
    if config.get("modules_to_save"):
        raise ServerError(
            f"the adapter {path} replaces whole modules ({', '.join(map(str, config['modules_to_save']))}), "
            f"which vLLM does not serve. {merge}"
        )


def check_lora(lora: Lora, checkpoint: Checkpoint) -> None:
    """Refuse an adapter that was made for another model: vLLM finds out after loading, or not at all.

    Raises ServerError naming the first module that is not the base's or has another shape, and for weights that can't
    be read.
    """
    from toolkit.sources.adapter_files import check_fit, open_adapter, own_files

    adapter = _read(lambda: open_adapter(lora.path))
    if adapter.shapes is None:
        raise ServerError(f"{lora.path} has no adapter_model.safetensors: save it as safetensors, not as a pickle")
    shapes = checkpoint.linear_shapes()
    factors = 0
    for name, shape in adapter.shapes.items():
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            raise ServerError(f"the adapter {lora.path} holds {name}, which is no factor of a LoRA.")
        place = _LAYER_LINEAR.fullmatch(factor["module"])
        if place is None or "visual." in factor["module"]:
            raise ServerError(
                f"the adapter {lora.path} changes {factor['module']}, and vLLM serves adapters of the language model's "
                "linear layers only. Merge it into its base instead: `qvl quantize --adapter`."
            )
        inputs, outputs = shapes.get(place["linear"], (0, 0))
        # A is [rank, inputs], B is [outputs, rank].
        found, expected = (shape[1], inputs) if factor["side"] == "A" else (shape[0], outputs)
        if int(place["layer"]) >= checkpoint.num_layers or found != expected:
            raise ServerError(
                f"the adapter {lora.path} was made for another model: its {factor['module']} has shape "
                f"{shape}, and {checkpoint.path} has {checkpoint.num_layers} layers whose "
                f"{place['linear']} maps {inputs} to {outputs}."
            )
        factors += 1
    if not factors:
        raise ServerError(f"the adapter {lora.path} holds no weights.")
    _read(lambda: check_fit(adapter, checkpoint))
    for file, what in own_files(lora.path, checkpoint.path).items():
        raise ServerError(
            f"the adapter {lora.path} brings its own {file} ({what}), and vLLM serves adapters with their base's. "
            "Merge it into its base instead: `qvl quantize --adapter`; or take the file away if the base's is meant."
        )


def _read(call: Callable[[], T]) -> T:
    """Return what reading an adapter gives; what it refuses is a server's error here."""
    from toolkit.errors import CheckpointError

    try:
        return call()
    except CheckpointError as error:
        raise ServerError(str(error)) from error


def lora_arguments(loras: Iterable[Lora]) -> list[str]:
    """Return vLLM's arguments that serve these adapters."""
    loras = list(loras)
    rank = next(rank for rank in _RANKS if rank >= max(lora.rank for lora in loras))
    arguments = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(loras)), "--lora-modules"]
    return [*arguments, *(f"{lora.name}={lora.path}" for lora in loras)]
