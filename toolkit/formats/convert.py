"""`qvl convert`: the same quantized weights in AWQ's other layout, tensor by tensor and without loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import __version__
from toolkit.checkpoint import Checkpoint, CheckpointWriter, QuantizationInfo
from toolkit.errors import FormatError
from toolkit.weights import DTYPE_BYTES, read_json

if TYPE_CHECKING:
    from toolkit.formats.packing import PackedLinear

__all__ = ["LAYOUTS", "convert"]

LAYOUTS = ("gemm", "gemv")
_PARTS = ("qweight", "qzeros", "scales")


def convert(src: Path, dst: Path, to: str, force: bool = False) -> Path:
    """Write the AWQ checkpoint in ``src`` to ``dst`` in the layout ``to``, "gemm" or "gemv"; return ``dst``.

    Lossless: converting back gives the same bits. Tensors that are not packed, side files and qvl.json are carried
    over; qvl.json gets a line in ``conversions``. At most one weight file's tensors are in memory.

    Raises FormatError for an unknown or unchanged layout, 16-bit weights, or shapes that don't fit the layout;
    CheckpointError when ``src`` is not whole or ``dst`` exists (and ``force`` is not set); ResourceError when the disk
    is full. ``dst`` then does not appear.
    """
    if to not in LAYOUTS:
        raise FormatError(f"unknown layout {to!r}: choose {' or '.join(LAYOUTS)}.")
    source = Checkpoint.open(src)
    info = source.quantization
    if info is None:
        raise FormatError(
            f"{src} holds 16-bit weights, and only AWQ checkpoints have a layout to convert. "
            "Quantize it first: qvl quantize --model ... --out ..."
        )
    if info.version == to:
        raise FormatError(f"{src} is in the {to} layout already: there is nothing to convert.")
    sizes = _plan(source, info, to)
    packed = {f"{module}.{part}" for module in sizes for part in _PARTS}
    expected = sum(sizes.values()) + sum(t.nbytes for t in source.tensors.values() if t.name not in packed)
    with CheckpointWriter(dst, force, source=source.path, expected_bytes=expected) as writer:
        _write_tensors(source, info, to, packed, writer)
        writer.set_config(_with_version(source.config, to))
        writer.copy_side_files(source.path)
        _carry_manifest(source.path, writer, info.version, to)
    return Path(dst)


def _plan(source: Checkpoint, info: QuantizationInfo, to: str) -> dict[str, int]:
    """Return the bytes each packed module will take, having checked that all can be converted."""
    from toolkit.formats.packing import PACK, layer_shape, zeros_width

    sizes = {}
    for module in source.quantized_modules():
        missing = [part for part in _PARTS if f"{module}.{part}" not in source.tensors]
        if missing:
            raise FormatError(f"{source.path}: {module} has qweight but no {missing[0]}. Download the model again.")
        qweight, qzeros, scales = (source.tensors[f"{module}.{part}"] for part in _PARTS)
        if (qweight.dtype, qzeros.dtype) != ("I32", "I32"):
            raise FormatError(f"{source.path}: {module} is packed in {qweight.dtype}/{qzeros.dtype}, not int32 words.")
        try:
            inputs, outputs = layer_shape(info.version, info.group_size, qweight.shape, qzeros.shape, scales.shape)
            groups = 1 if info.group_size == -1 else inputs // info.group_size
            width = groups if to == "gemm" else PACK * zeros_width(inputs, inputs // groups)
            if inputs % PACK or outputs % PACK:
                raise FormatError(f"{outputs} x {inputs} weights don't fill words of {PACK}.")
        except FormatError as error:
            raise FormatError(f"{source.path}: {module}: {error}") from error
        sizes[module] = outputs * inputs // 2 + outputs * width // 2 + outputs * width * DTYPE_BYTES[scales.dtype]
    return sizes


def _write_tensors(
    source: Checkpoint, info: QuantizationInfo, to: str, packed: set[str], writer: CheckpointWriter
) -> None:
    """Add all tensors in the source's order, repacking a module when its qweight comes by."""
    from rich.progress import Progress

    from toolkit.console import err

    with Progress(console=err, transient=True) as progress:
        task = progress.add_task(f"{info.version} to {to}", total=source.nbytes)
        for name, tensor in source.tensors.items():
            if name not in packed:
                writer.add(name, source.get(name))
            elif name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                repacked = _repack(source, module, info.group_size, to)
                for part in _PARTS:
                    writer.add(f"{module}.{part}", getattr(repacked, part))
            progress.advance(task, tensor.nbytes)


def _repack(source: Checkpoint, module: str, group_size: int, to: str) -> PackedLinear:
    from toolkit.formats.packing import PackedLinear, gemm_to_gemv, gemv_to_gemm

    layer = PackedLinear(*(source.get(f"{module}.{part}") for part in _PARTS))
    return gemm_to_gemv(layer) if to == "gemv" else gemv_to_gemm(layer, group_size)


def _with_version(config: dict[str, Any], to: str) -> dict[str, Any]:
    config = copy.deepcopy(config)
    holder = config if "quantization_config" in config else config["text_config"]
    holder["quantization_config"]["version"] = to
    return config


def _carry_manifest(src: Path, writer: CheckpointWriter, version: str, to: str) -> None:
    """Carry qvl.json over with what was done, and the model card if it is this toolkit's own."""
    manifest = read_json(src / "qvl.json") if (src / "qvl.json").exists() else {}
    done = {"from": version, "to": to, "qvl": __version__}
    manifest["conversions"] = [*manifest.get("conversions", []), done]
    writer.write_json("qvl.json", manifest)
    card = src / "README.md"
    if (src / "qvl.json").exists() and card.exists():
        note = f"Repacked from {version.upper()} to {to.upper()} by `qvl convert`; the values are the same."
        writer.write_text("README.md", f"{card.read_text(encoding='utf-8').rstrip()}\n\n{note}\n")
