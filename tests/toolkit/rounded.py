"""The embedded model, rounded to nearest in a second; some linears may stay in 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from toolkit.checkpoint import LINEARS, Checkpoint
from toolkit.demo import checkpoint_dir
from toolkit.formats.packing import pack_gemm, pack_gemv
from toolkit.quantize.mixed import Linear, modules_to_not_convert
from toolkit.quantize.search import round_to_grid


def write(directory: Path, left: frozenset[Linear], version: str = "gemm", group_size: int = 128) -> Path:
    """Write the embedded model with all decoder linears packed, in groups of ``group_size``, but those ``left``."""
    source = Checkpoint.open(checkpoint_dir())
    pack = pack_gemm if version == "gemm" else pack_gemv
    found = {name: source.get(name) for name in source.tensors}
    for index in range(source.num_layers):
        for name in LINEARS:
            module = source.layer_prefix(index) + name
            if (index, name) not in left:
                packed = pack(round_to_grid(found.pop(f"{module}.weight").float(), group_size))
                found |= {f"{module}.{part}": getattr(packed, part) for part in ("qweight", "qzeros", "scales")}
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, directory / "model.safetensors")
    for file in source.path.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and "index" not in file.name:
            shutil.copy(file, directory)
    quantization = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": modules_to_not_convert(left, source.num_layers),
        "quant_method": "awq",
        "version": version,
        "zero_point": True,
    }
    (directory / "config.json").write_text(json.dumps({**source.config, "quantization_config": quantization}))
    return directory
