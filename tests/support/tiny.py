"""Tiny Qwen2-VL checkpoints on disk, in every shape the toolkit reads: flat or nested, 16-bit or packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from toolkit.checkpoint.compressed import quantization_config
from toolkit.checkpoint.left_out import Linear, ignored, modules_to_not_convert
from toolkit.formats.packing import PackedLinear, QuantizedLinear, named, pack_as
from toolkit.models.qwen2_vl import QWEN2_VL

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 128, 256, 4, 2, 2, 64
SHAPES = {  # (K, N)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // HEADS * KV_HEADS),
    "self_attn.v_proj": (HIDDEN, HIDDEN // HEADS * KV_HEADS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14}
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
}
SECTIONS = [4, 6, 6]
SIDE_FILES = {
    "tokenizer.json": {"model": {}},
    "tokenizer_config.json": {"chat_template": "{{ messages }}"},
    "preprocessor_config.json": {"patch_size": 14},
    "generation_config.json": {"do_sample": False},
}


def config(nested: bool = False) -> dict[str, Any]:
    """The hub's flat config, or what transformers 5 saves."""
    head: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "vision_config": VISION,
    }
    if nested:
        return {**head, "text_config": {**TEXT, "rope_parameters": {"rope_theta": 1e6, "mrope_section": SECTIONS}}}
    rope = {"type": "mrope", "mrope_section": SECTIONS}
    return {**head, **TEXT, "rope_theta": 1e6, "rope_scaling": rope, "torch_dtype": "float16"}


def tensors(
    nested: bool = False,
    version: str | None = None,
    group_size: int = 64,
    seed: int = 0,
    left: frozenset[Linear] = frozenset(),
) -> dict[str, Any]:
    """All tensors of the tiny model under the hub's or transformers 5's names; ``version`` packs all not ``left``."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=rng) * 0.05).half()

    language, visual = ("model.language_model.", "model.visual.") if nested else ("model.", "visual.")
    found = {f"{language}embed_tokens.weight": random(VOCAB, HIDDEN), f"{language}norm.weight": random(HIDDEN)}
    for i in range(LAYERS):
        layer = f"{language}layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{norm}.weight"] = random(HIDDEN)
        for name in QWEN2_VL.linears:
            inputs, outputs = SHAPES[name]
            if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                found[f"{layer}{name}.bias"] = random(outputs)
            if version is None or (i, name) in left:
                found[f"{layer}{name}.weight"] = random(outputs, inputs)
            else:
                packed = random_packed(version, inputs, outputs, group_size, rng)
                found |= named(version, f"{layer}{name}", packed)
    embed, inner, merged = VISION["embed_dim"], VISION["embed_dim"] * VISION["mlp_ratio"], VISION["embed_dim"] * 4
    for name, shape in {
        "patch_embed.proj.weight": (embed, 3, 2, 14, 14),
        "blocks.0.attn.qkv.weight": (3 * embed, embed),
        "blocks.0.attn.qkv.bias": (3 * embed,),
        "blocks.0.attn.proj.weight": (embed, embed),
        "blocks.0.attn.proj.bias": (embed,),
        "blocks.0.mlp.fc1.weight": (inner, embed),
        "blocks.0.mlp.fc1.bias": (inner,),
        "blocks.0.mlp.fc2.weight": (embed, inner),
        "blocks.0.mlp.fc2.bias": (embed,),
        "blocks.0.norm1.weight": (embed,),
        "blocks.0.norm1.bias": (embed,),
        "blocks.0.norm2.weight": (embed,),
        "blocks.0.norm2.bias": (embed,),
        "merger.ln_q.weight": (embed,),
        "merger.ln_q.bias": (embed,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (HIDDEN, merged),
        "merger.mlp.2.bias": (HIDDEN,),
    }.items():
        found[visual + name] = random(*shape)
    return found


def random_packed(version: str, inputs: int, outputs: int, group_size: int, rng: torch.Generator) -> PackedLinear:
    groups = inputs // (inputs if group_size == -1 else group_size)
    layer = QuantizedLinear(
        torch.randint(0, 16, (outputs, inputs), generator=rng, dtype=torch.uint8),
        torch.randint(0, 16, (outputs, groups), generator=rng, dtype=torch.uint8),
        (torch.rand((outputs, groups), generator=rng) * 0.01 + 1e-3).half(),
    )
    return pack_as(version, layer)


def write(
    directory: Path,
    *,
    nested: bool = False,
    version: str | None = None,
    group_size: int = 64,
    shards: int = 1,
    seed: int = 0,
    left: frozenset[Linear] = frozenset(),
) -> Path:
    """Write a whole checkpoint into ``directory`` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = config(nested)
    if version == "compressed-tensors":
        settings["quantization_config"] = quantization_config(group_size, ignored(left, LAYERS, QWEN2_VL))
    elif version is not None:
        settings["quantization_config"] = {
            "bits": 4,
            "group_size": group_size,
            "modules_to_not_convert": modules_to_not_convert(left, LAYERS, QWEN2_VL),
            "quant_method": "awq",
            "version": version,
            "zero_point": True,
        }
    write_json(directory / "config.json", settings)
    for name, value in SIDE_FILES.items():
        write_json(directory / name, value)
    write_tensors(directory, tensors(nested, version, group_size, seed, left), shards)
    return directory


def write_tensors(directory: Path, found: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(found, directory / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = list(found), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: found[name] for name in names[i::shards]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def edit_json(path: Path, **changes: Any) -> None:
    """Set (or with None remove) top-level keys of a JSON file."""
    value = {**json.loads(path.read_text()), **changes}
    write_json(path, {k: v for k, v in value.items() if v is not None})


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
