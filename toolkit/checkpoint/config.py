"""What config.json says, flat as on the hub or nested as transformers 5 saves it: family, sizes, quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.checkpoint.compressed import SUPPORTED, read_compressed_tensors
from toolkit.checkpoint.quantization import QuantizationInfo
from toolkit.errors import AlreadyQuantized, CheckpointError
from toolkit.models.families import family_of, why_not
from toolkit.models.family import Family

__all__ = ["QuantizationInfo", "read_family", "read_quantization", "read_text_config", "untied"]

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "num_key_value_heads",
)
#: What changes answers and stands at the top of a flat config, in ``text_config`` of a nested one, or in both.
_SAID_TWICE = (*_SIZES, "rms_norm_eps", "rope_theta", "tie_word_embeddings")
_AGAIN = "The file is damaged or incomplete: copy or download it again."


def read_family(path: Path, config: dict[str, Any]) -> Family:
    """Return the family a config.json is of. Raises CheckpointError for none that is supported."""
    found = family_of(config)
    if found is not None:
        return found
    raise CheckpointError(f"{path} {why_not(config)}")


def read_text_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Bring the language model's settings into one dict, whatever the config's shape.

    Keys as in the hub's flat config; ``num_key_value_heads``, ``rope_theta`` and ``tie_word_embeddings`` are filled in
    from where transformers 5 keeps them. Raises CheckpointError for missing sizes, and where both shapes are there and
    say different things, for engines don't agree on which of them counts.
    """
    nested = config.get("text_config")
    if isinstance(nested, dict):
        _refuse_contradictions(path, config, nested)
    flat = {k: v for k, v in config.items() if k not in ("text_config", "vision_config", "quantization_config")}
    text = {**flat, **nested} if isinstance(nested, dict) else flat
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text.get("num_attention_heads")
    for key in _SIZES:
        value = text.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path / 'config.json'}: {key} is {value!r}, not a positive number. {_AGAIN}")
    return text


def _refuse_contradictions(path: Path, config: dict[str, Any], nested: dict[str, Any]) -> None:
    for key in _SAID_TWICE:
        outer, inner = config.get(key), nested.get(key)
        if outer is not None and inner is not None and outer != inner:
            raise CheckpointError(
                f"{path / 'config.json'} says {key} {outer!r}, and {inner!r} in text_config: "
                "make both say what the weights were trained with."
            )


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that says, wherever engines look, that the output head is a matrix of its own."""
    text = config.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **nested, "tie_word_embeddings": False}


def read_quantization(path: Path, config: dict[str, Any]) -> QuantizationInfo | None:
    """Read ``quantization_config``, None where there is none.

    Raises AlreadyQuantized for a method or a kind of weights that is not supported, CheckpointError for settings that
    no format of the method has.
    """
    raw = config.get("quantization_config")
    if raw is None and isinstance(config.get("text_config"), dict):
        raw = config["text_config"].get("quantization_config")
    if raw is None:
        return None
    where = f"{path / 'config.json'}: quantization_config"
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is not an object. {_AGAIN}")
    method = str(raw.get("quant_method", "awq")).lower()
    if method == "compressed-tensors":
        return read_compressed_tensors(path, raw)
    if method != "awq":
        raise AlreadyQuantized(f"{path} holds {method} weights. {SUPPORTED}")
    return _read_awq(where, raw)


def _read_awq(where: str, raw: dict[str, Any]) -> QuantizationInfo:
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
        format=version,
        modules_to_not_convert=tuple(str(m) for m in left),
        lm_head=bool(raw.get("lm_head", False)),
    )
