"""A published size as a checkpoint of headers, without files: what plans and random weights are made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.checkpoint.anatomy import expected_tensors
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.config import read_text_config
from toolkit.checkpoint.weights import TensorInfo
from toolkit.models.family import Family

__all__ = ["header", "without_files"]


def without_files(name: str, family: Family, config: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint that a config calls for, in bfloat16, under the hub's names.

    Args:
        name: stands for its directory in messages.
        family: of the config.
        config: as in a config.json.
    """
    text = read_text_config(Path(name), config)
    bare = Checkpoint(Path(name), family, config, text, config["vision_config"], {}, None, family.hub.layers)
    found = {expected.name: header(expected.name, "BF16", expected.shape) for expected in expected_tensors(bare)}
    return replace(bare, tensors=found)


def header(name: str, dtype: str, size: tuple[int, ...]) -> TensorInfo:
    """Return a tensor's header, of a dtype of 2 bytes or I32, that is in no file."""
    info = TensorInfo(name, dtype, size, 0, Path(), 0)
    return replace(info, nbytes=info.numel * (4 if dtype == "I32" else 2))
