"""The embedded model as a directory in the hub's format: flat config, hub tensor names, one file of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.paths import demo_checkpoint

__all__ = ["MAX_BYTES", "config", "export", "write_side_files"]

#: The weights must stay small enough to ship in git.
MAX_BYTES = 12_000_000
#: Files that training does not change.
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def config() -> dict[str, Any]:
    """Return config.json as the hub's Qwen2-VL checkpoints have it: language settings flat at the top."""
    from toolkit.demo.model import Settings

    shape = Settings()
    return {
        "architectures": [QWEN2_VL.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1010,
        "eos_token_id": 1012,
        "vision_start_token_id": 1019,
        "vision_end_token_id": 1020,
        "vision_token_id": 1021,
        "image_token_id": 1022,
        "video_token_id": 1023,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 4096,
        "max_window_layers": shape.num_hidden_layers,
        "model_type": QWEN2_VL.model_type,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_embed_dim,
            "mlp_ratio": shape.vision_mlp_ratio,
            "num_heads": shape.vision_num_heads,
            "in_chans": 3,
            "hidden_size": shape.hidden_size,
            "patch_size": shape.patch_size,
            "spatial_merge_size": shape.spatial_merge_size,
            "spatial_patch_size": shape.patch_size,
            "temporal_patch_size": shape.temporal_patch_size,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "vocab_size": shape.vocab_size,
    }


def write_side_files(out: Path) -> None:
    """Write everything of the checkpoint but the weights into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config(), indent=2) + "\n", encoding="utf-8")
    source = demo_checkpoint()
    for name in _SIDE_FILES:
        if (out / name).resolve() != (source / name).resolve():
            shutil.copyfile(source / name, out / name)


def export(weights: Path, out: Path) -> Path:
    """Make a checkpoint directory ``out`` of a file of trained weights; returns ``out``.

    Raises ``CheckpointError`` when the file is not this model's, holds another dtype than fp16 or is too big to ship.
    """
    from safetensors import SafetensorError, safe_open

    from toolkit.demo.model import TinyQwen2VL
    from toolkit.errors import CheckpointError

    if not weights.is_file():
        raise CheckpointError(f"{weights} does not exist: train first (qvl demo-model --out DIR)")
    if weights.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{weights} has {weights.stat().st_size} bytes, more than the {MAX_BYTES} that may ship")
    expected = {name: list(value.shape) for name, value in TinyQwen2VL().state_dict().items()}
    try:
        with safe_open(weights, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: list(view.get_shape()) for name, view in found.items()}
            dtypes = {view.get_dtype() for view in found.values()}
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is not a safetensors file ({error})") from None
    if shapes != expected or dtypes != {"F16"}:
        odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise CheckpointError(f"{weights} is not this model in fp16: dtypes {sorted(dtypes)}, differing {odd[:5]}")
    write_side_files(out)
    if weights.resolve() != (out / "model.safetensors").resolve():
        shutil.copyfile(weights, out / "model.safetensors")
    return out
