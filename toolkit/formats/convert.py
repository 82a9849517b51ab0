"""`qvl convert`: the same weights in another 4-bit format, or padded for tensor parallelism, tensor by tensor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter, QuantizationInfo
from toolkit.checkpoint.compressed import quantization_config
from toolkit.checkpoint.layouts import LAYOUTS, layer_shape, layouts_in_words, packed_bytes
from toolkit.checkpoint.left_out import ignored, modules_to_not_convert
from toolkit.checkpoint.weights import DTYPE_BYTES, read_json
from toolkit.errors import FormatError
from toolkit.formats.pad import WIDENED, check_padding, pad_quantized, pad_tensor, padded_shape, set_intermediate_size
from toolkit.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert"]


def convert(src: Path, dst: Path, to: str | None = None, force: bool = False, *, pad_tp: int | None = None) -> Path:
    """Write the checkpoint in ``src`` to ``dst``, repacked, padded, or both; return ``dst``.

    Repacking is lossless: converting back gives the same bits. Padding adds zero weights to the MLP, so that the model
    computes what it did (see `toolkit.formats.pad`). All other tensors, side files and qvl.json are carried over;
    qvl.json gets a line in ``conversions``. At most one weight file's tensors are in memory.

    Args:
        to: format, a name of `LAYOUTS`: "gemm", "gemv" or "compressed-tensors"; None keeps it.
        force: replace an existing checkpoint.
        pad_tp: number of GPUs that group_size x GPUs is to divide the MLP's intermediate size for; also in 16 bits.

    Raises FormatError for neither of the two, an unknown or unchanged format, 16-bit weights that are to be repacked,
    padding that is not needed or does not help, or shapes that don't fit the format; CheckpointError when ``src`` is
    not whole or ``dst`` exists (and ``force`` is not set); ResourceError when the disk is full. ``dst`` then does not
    appear.
    """
    if to is None and pad_tp is None:
        raise FormatError(f"nothing to convert: give --to {layouts_in_words()}, --pad-tp GPUS, or both.")
    if to is not None and to not in LAYOUTS:
        raise FormatError(f"unknown format {to!r}: choose {layouts_in_words()}.")
    source = Checkpoint.open(src)
    info = source.quantization
    if to is not None and info is None:
        raise FormatError(
            f"{src} holds 16-bit weights, and only 4-bit ones have a format to convert. "
            "Quantize it first: qvl quantize --model ... --out ..."
        )
    if to is not None and info is not None and info.format == to:
        raise FormatError(f"{src} is in the {to} format already: there is nothing to convert.")
    inner = int(source.text_config["intermediate_size"])
    work = _Work(source, info, to, inner if pad_tp is None else check_padding(source, pad_tp))
    with CheckpointWriter(dst, force, source=source.path, expected_bytes=work.nbytes) as writer:
        work.write(writer)
        writer.set_config(work.config())
        writer.copy_side_files(source.path)
        _carry_manifest(source.path, writer, work)
    return Path(dst)


class _Work:
    """What is to be written, checked and counted before the first tensor is read.

    Attributes:
        formats: from and to; None in 16 bits.
        widths: intermediate size, from and to.
        nbytes: of all tensors that will be written.
    """

    def __init__(self, source: Checkpoint, info: QuantizationInfo | None, to: str | None, inner: int) -> None:
        self.source, self.info = source, info
        self.formats = (info.format, to or info.format) if info else None
        self.widths = (int(source.text_config["intermediate_size"]), inner)
        sizes = self._plan(info, self.formats[1]) if info and self.formats else {}
        self._packed = {f"{module}.{part}" for module in sizes for part in (info.layout.parts if info else ())}
        self.nbytes = sum(sizes.values())
        for name, tensor in source.tensors.items():
            if name not in self._packed:
                count = 1
                for size in padded_shape(source, name, inner):
                    count *= size
                self.nbytes += count * tensor.nbytes // tensor.numel if tensor.numel else 0

    def _plan(self, info: QuantizationInfo, to: str) -> dict[str, int]:
        """Return the bytes each packed module will take, having checked that all can be converted."""
        source, sizes, layout = self.source, {}, info.layout
        for module in source.quantized_modules():
            missing = [part for part in layout.parts if f"{module}.{part}" not in source.tensors]
            if missing:
                has = f"{module} has {layout.qweight} but no {missing[0]}"
                raise FormatError(f"{source.path}: {has}. Download the model again.")
            qweight, qzeros, scales = (source.tensors[f"{module}.{part}"] for part in layout.packed)
            if (qweight.dtype, qzeros.dtype) != ("I32", "I32"):
                raise FormatError(
                    f"{source.path}: {module} is packed in {qweight.dtype}/{qzeros.dtype}, not int32 words."
                )
            try:
                inputs, outputs = layer_shape(info.format, info.group_size, qweight.shape, qzeros.shape, scales.shape)
                inputs, outputs = self._padded(module, inputs, outputs)
                scale_bytes = DTYPE_BYTES[scales.dtype]
                sizes[module] = packed_bytes(LAYOUTS[to], inputs, outputs, info.group_size, scale_bytes)
            except FormatError as error:
                raise FormatError(f"{source.path}: {module}: {error}") from error
        return sizes

    def _padded(self, module: str, inputs: int, outputs: int) -> tuple[int, int]:
        """Return a module's (K, N) as it will be. Raises FormatError where it is not as wide as the config says."""
        before, after = self.widths
        side = WIDENED.get(module.rpartition(".")[2]) if module.startswith(self.source.layers_prefix) else None
        if side is None or before == after:
            return inputs, outputs
        if (outputs, inputs)[side] != before:
            raise FormatError(f"its {outputs} x {inputs} weights don't have the intermediate size {before}.")
        return (inputs, after) if side == 0 else (after, outputs)

    def write(self, writer: CheckpointWriter) -> None:
        """Add all tensors in the source's order, repacking a module when its words come by."""
        from rich.progress import Progress

        from toolkit.console import err

        source = self.source
        words = f".{self.info.layout.qweight}" if self.info else ""
        with Progress(console=err, transient=True) as progress:
            task = progress.add_task("converting", total=source.nbytes)
            for name, tensor in source.tensors.items():
                if name not in self._packed:
                    writer.add(name, pad_tensor(source.get(name), padded_shape(source, name, self.widths[1])))
                elif name.endswith(words):
                    for part, repacked in self._repack(name.removesuffix(words)).items():
                        writer.add(part, repacked)
                progress.advance(task, tensor.nbytes)

    def _repack(self, module: str) -> dict[str, Tensor]:
        """Return a packed module's tensors as they will be, by full names."""
        from toolkit.formats.linears import read_packed
        from toolkit.formats.packing import named, pack_as, unpack_as

        assert self.info is not None and self.formats is not None  # there is no packed module otherwise
        packed = read_packed(self.source, module)
        layer = unpack_as(self.formats[0], packed, self.info.group_size)
        outputs, inputs = layer.values.shape
        wide_inputs, wide_outputs = self._padded(module, inputs, outputs)
        if (wide_inputs, wide_outputs) != (inputs, outputs):
            packed = pack_as(self.formats[1], pad_quantized(layer, wide_outputs, wide_inputs))
        elif self.formats[0] != self.formats[1]:
            packed = pack_as(self.formats[1], layer)
        return named(self.formats[1], module, packed)

    def config(self) -> dict[str, Any]:
        """Return config.json of what is written."""
        config = copy.deepcopy(self.source.config)
        if self.info is not None and self.formats is not None and self.formats[0] != self.formats[1]:
            holder = config if "quantization_config" in config else config["text_config"]
            if LAYOUTS[self.formats[1]].method != self.info.layout.method:
                holder["quantization_config"] = self._quantization(self.info)
            if LAYOUTS[self.formats[1]].method == "awq":
                holder["quantization_config"]["version"] = self.formats[1]
        set_intermediate_size(config, self.widths[1])
        return config

    def _quantization(self, info: QuantizationInfo) -> dict[str, Any]:
        """Return the ``quantization_config`` of the other method; what it leaves out is what is not packed."""
        left, layers, family = self.source.left_linears(), self.source.num_layers, self.source.family
        tower = self.source.left_tower()
        if info.layout.method == "awq":
            return quantization_config(
                info.group_size, ignored(left, layers, family, info.lm_head, tower), info.lm_head
            )
        return {
            "bits": info.bits,
            "group_size": info.group_size,
            "modules_to_not_convert": modules_to_not_convert(left, layers, family, tower),
            "quant_method": "awq",
            "zero_point": True,
            **({"lm_head": True} if info.lm_head else {}),
        }

    def done(self) -> tuple[dict[str, Any], str]:
        """Return what was done, for qvl.json and in words for the model card."""
        entry: dict[str, Any] = {"qvl": __version__}
        said = []
        if self.formats is not None:
            entry |= {"from": self.formats[0], "to": self.formats[1]}
            if self.formats[0] != self.formats[1]:
                before, after = (LAYOUTS[name].title.removeprefix("AWQ ") for name in self.formats)
                said.append(f"Repacked from {before} to {after}")
        if self.widths[0] != self.widths[1]:
            entry["intermediate_size"] = list(self.widths)
            said.append(f"{'its MLP' if said else 'MLP'} padded with zeros from {self.widths[0]} to {self.widths[1]}")
        return entry, f"{', '.join(said)} by `qvl convert`; the values are the same."


def _carry_manifest(src: Path, writer: CheckpointWriter, work: _Work) -> None:
    """Carry qvl.json over with what was done, and the model card if it is this toolkit's own."""
    manifest = read_json(src / "qvl.json") if (src / "qvl.json").exists() else {}
    entry, note = work.done()
    manifest["conversions"] = [*manifest.get("conversions", []), entry]
    writer.write_json("qvl.json", manifest)
    card = src / "README.md"
    if (src / "qvl.json").exists() and card.exists():
        writer.write_text("README.md", f"{card.read_text(encoding='utf-8').rstrip()}\n\n{note}\n")
