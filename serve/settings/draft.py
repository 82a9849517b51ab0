"""Drafts: what guesses tokens ahead, so that a step of the model checks several instead of making one.

Two kinds do with vLLM 0.32 and these models. N-grams look the next tokens up in the prompt; on a GPU vLLM has two of
them, and the one that runs there (``ngram_gpu``) keeps asynchronous scheduling, which the other ends. An EAGLE-3 head
is a layer trained on the model's own hidden states, in a directory; vLLM has that for the families that say so
(`Family.eagle`). A smaller model of the same kind is none: vLLM refuses drafts whose positions have three dimensions
(``llm_base_proposer.py``), and vocabularies of another size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import CheckpointError, ServerError

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["NGRAM", "draft_arguments", "draft_bytes"]

#: Stands for n-grams instead of a directory.
NGRAM = "ngram"
#: How many of the model's hidden states, side by side, an EAGLE-3 head sees where its config does not say.
_AUXILIARY = 3


def draft_arguments(draft: str, tokens: int, checkpoint: Checkpoint, *, on_gpu: bool) -> list[str]:
    """Return vLLM's arguments for a draft of so many tokens a step.

    Args:
        draft: `NGRAM`, or an EAGLE-3 head's directory.
        tokens: guessed at once.
        checkpoint: the model that is served.
        on_gpu: where it computes.

    Raises:
        ServerError: the draft does not fit the model, or vLLM has none such for it.
    """
    speculation: dict[str, Any] = {"num_speculative_tokens": tokens}
    if draft == NGRAM:
        speculation |= {"method": "ngram_gpu" if on_gpu else "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    else:
        path = Path(draft).expanduser().resolve()
        _check(path, checkpoint)
        speculation |= {"method": "eagle3", "model": str(path)}
    return ["--speculative-config", json.dumps(speculation)]


def draft_bytes(draft: str | None) -> int:
    """Return the bytes of a draft's weights; 0 for n-grams, which have none, and where there is no draft."""
    if draft is None or draft == NGRAM:
        return 0
    files = [file for file in Path(draft).expanduser().iterdir() if file.suffix in (".safetensors", ".bin", ".pt")]
    return sum(file.stat().st_size for file in files)


def _check(path: Path, checkpoint: Checkpoint) -> None:
    from toolkit.checkpoint.weights import read_json, read_weights
    from toolkit.models.families import FAMILIES, family_of

    family, text = checkpoint.family, checkpoint.text_config
    if not (path / "config.json").is_file():
        raise ServerError(f"--draft {path}: no config.json there. Give an EAGLE-3 head's directory, or {NGRAM}.")
    try:
        config = read_json(path / "config.json")
    except CheckpointError as error:
        raise ServerError(f"--draft {path}: {error}") from error
    vocabulary = int(text["vocab_size"])
    small = family_of(config)
    if small is not None:
        raise ServerError(_no_draft(path, small.title, {**config, **config.get("text_config", {})}, vocabulary))
    if not family.eagle:
        titles = " and ".join(each.title for each in FAMILIES if each.eagle)
        raise ServerError(
            f"--draft {path}: vLLM has EAGLE for {titles}, and not for a {family.title}. Give --draft {NGRAM}, which "
            "guesses from the prompt."
        )
    names = [str(name) for name in config.get("architectures") or []]
    if not any("Eagle3" in name for name in names):
        what = ", ".join(names) or "of no architecture"
        raise ServerError(f"--draft {path}: its config.json is {what}, and no EAGLE-3 head.")
    seen = "target_hidden_size" if config.get("target_hidden_size") else "hidden_size"
    for key, wanted in ((seen, int(text["hidden_size"])), ("vocab_size", vocabulary)):
        if config.get(key) != wanted:
            raise ServerError(
                f"--draft {path}: a head of {key} {config.get(key)}, and {checkpoint.path} has {wanted}: it was "
                "trained for another model."
            )
    if any(path.glob("*.safetensors")):
        try:
            found = read_weights(path)
        except CheckpointError as error:
            raise ServerError(f"--draft {path}: {error}") from error
        _check_weights(path, config, {name: tensor.shape for name, tensor in found.items()})
    elif not any(path.glob("*.bin")):
        raise ServerError(f"--draft {path}: no weights there (*.safetensors or *.bin). Copy them beside config.json.")


def _check_weights(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse weights that don't read the hidden states that the config says (vLLM's ``llama_eagle3.py``)."""
    eagle = config.get("eagle_config") or {}
    if eagle.get("use_aux_hidden_state") is False:
        return
    named = "eagle_aux_hidden_state_layer_ids"  # vLLM looks in both places, here first
    layers = config.get(named) or eagle.get(named) or ()
    count = int(config.get("num_aux_hidden_states") or len(layers) or _AUXILIARY)
    hidden = int(config["hidden_size"])
    wide = (hidden, count * int(config.get("target_hidden_size") or hidden))
    shape = next((shape for name, shape in shapes.items() if name.endswith("fc.weight")), None)
    if shape != wide:
        has = f"fc.weight {list(shape)}" if shape else "no fc.weight"
        raise ServerError(f"--draft {path}: it has {has}, and an EAGLE-3 head for this model {list(wide)}.")


def _no_draft(path: Path, title: str, config: dict[str, Any], vocabulary: int) -> str:
    """Say why a whole model is no draft."""
    tokens = config.get("vocab_size")
    why = "vLLM takes no draft whose positions have three dimensions, as a model with images has"
    if isinstance(tokens, int) and tokens != vocabulary:
        why = f"it has {tokens:,} tokens in its vocabulary and the model {vocabulary:,}, and {why}"
    return f"--draft {path}: a whole {title} can't be a draft: {why}. Give an EAGLE-3 head's directory, or {NGRAM}."
