"""The embedded model, rounded to nearest in a second; some linears may stay in 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.left_out import Linear, modules_to_not_convert
from toolkit.formats.packing import named, pack_as
from toolkit.paths import demo_checkpoint
from toolkit.quantize.search.grid import round_to_grid


def write(
    directory: Path,
    left: frozenset[Linear],
    version: str = "gemm",
    group_size: int = 128,
    source: Path | None = None,
) -> Path:
    """Write the embedded model, or ``source``, with all decoder linears packed in groups but those ``left``."""
    origin = Checkpoint.open(source or demo_checkpoint())
    found = {name: origin.get(name) for name in origin.tensors}
    for index in range(origin.num_layers):
        for name in origin.family.linears:
            module = origin.layer_prefix(index) + name
            if (index, name) not in left:
                packed = pack_as(version, round_to_grid(found.pop(f"{module}.weight").float(), group_size))
                found |= named(version, module, packed)
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, directory / "model.safetensors")
    for file in origin.path.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and "index" not in file.name:
            shutil.copy(file, directory)
    quantization = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": modules_to_not_convert(left, origin.num_layers, origin.family),
        "quant_method": "awq",
        "version": version,
        "zero_point": True,
    }
    (directory / "config.json").write_text(json.dumps({**origin.config, "quantization_config": quantization}))
    return directory


def narrowed(directory: Path, inner: int, version: str | None = "gemm", group_size: int = 128) -> Path:
    """Write the embedded model with only the first ``inner`` units of every MLP; packed, or None for 16 bits."""
    source = Checkpoint.open(demo_checkpoint())
    plain = directory if version is None else directory.with_name(f".{directory.name}-16")
    plain.mkdir(parents=True)
    found = {}
    for name in source.tensors:
        tensor = source.get(name)
        if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
            tensor = tensor[:inner]
        elif ".mlp.down_proj." in name:
            tensor = tensor[:, :inner]
        found[name] = tensor.contiguous()
    save_file(found, plain / "model.safetensors", {"format": "pt"})
    for file in source.path.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and "index" not in file.name:
            shutil.copy(file, plain)
    (plain / "config.json").write_text(json.dumps({**source.config, "intermediate_size": inner}))
    if version is None:
        return plain
    return write(directory, frozenset(), version, group_size, source=plain)
