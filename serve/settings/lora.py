"""LoRA adapters that are served beside their base model, each as a model of its own name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from toolkit.errors import ServerError

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Lora", "check_lora", "lora_arguments"]

#: Ranks that vLLM can be started with; it takes adapters up to the one given.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
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
        from toolkit.checkpoint.weights import read_json

        name, equals, directory = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or not directory:
            raise ServerError(f"--lora {text}: give a name and a directory, such as --lora charts=out/charts-lora.")
        path = Path(directory).expanduser().resolve()
        if not (path / "adapter_config.json").is_file():
            raise ServerError(f"--lora {text}: {path} has no adapter_config.json, so it is no adapter that peft wrote.")
        config = read_json(path / "adapter_config.json")
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
    if config.get("use_dora"):
        raise ServerError(f"the adapter {path} uses DoRA, which vLLM does not serve. {merge}")
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
    shapes = checkpoint.linear_shapes()
    factors = 0
    for name, shape in _shapes(lora.path).items():
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


def _shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of an adapter's tensors, by name."""
    from safetensors import SafetensorError, safe_open

    file = path / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ServerError(f"{file} can't be read ({error}): is the download complete?") from error


def lora_arguments(loras: Iterable[Lora]) -> list[str]:
    """Return vLLM's arguments that serve these adapters."""
    loras = list(loras)
    rank = next(rank for rank in _RANKS if rank >= max(lora.rank for lora in loras))
    arguments = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(loras)), "--lora-modules"]
    return [*arguments, *(f"{lora.name}={lora.path}" for lora in loras)]
