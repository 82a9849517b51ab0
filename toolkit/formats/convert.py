"""`qvl convert`: the same weights in AWQ's other layout, or padded for tensor parallelism, tensor by tensor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter, QuantizationInfo
from toolkit.checkpoint.layouts import PACK, layer_shape, zeros_width
from toolkit.checkpoint.weights import DTYPE_BYTES, read_json
from toolkit.errors import FormatError
from toolkit.formats.pad import WIDENED, check_padding, pad_quantized, pad_tensor, padded_shape, set_intermediate_size
from toolkit.version import __version__

if TYPE_CHECKING:
    from toolkit.formats.packing import PackedLinear

__all__ = ["LAYOUTS", "convert"]

LAYOUTS = ("gemm", "gemv")
_PARTS = ("qweight", "qzeros", "scales")


def convert(src: Path, dst: Path, to: str | None = None, force: bool = False, *, pad_tp: int | None = None) -> Path:
    """Write the checkpoint in ``src`` to ``dst``, repacked, padded, or both; return ``dst``.

    Repacking is lossless: converting back gives the same bits. Padding adds zero weights to the MLP, so that the model
    computes what it did (see `toolkit.formats.pad`). All other tensors, side files and qvl.json are carried over;
    qvl.json gets a line in ``conversions``. At most one weight file's tensors are in memory.

    Args:
        to: layout, "gemm" or "gemv"; None keeps it.
        force: replace an existing checkpoint.
        pad_tp: number of GPUs that group_size x GPUs is to divide the MLP's intermediate size for; also in 16 bits.

    Raises FormatError for neither of the two, an unknown or unchanged layout, 16-bit weights that are to be repacked,
    padding that is not needed or does not help, or shapes that don't fit the layout; CheckpointError when ``src`` is
    not whole or ``dst`` exists (and ``force`` is not set); ResourceError when the disk is full. ``dst`` then does not
    appear.
    """
    if to is None and pad_tp is None:
        raise FormatError("nothing to convert: give --to gemm or gemv, --pad-tp GPUS, or both.")
    if to is not None and to not in LAYOUTS:
        raise FormatError(f"unknown layout {to!r}: choose {' or '.join(LAYOUTS)}.")
    source = Checkpoint.open(src)
    info = source.quantization
    if to is not None and info is None:
        raise FormatError(
            f"{src} holds 16-bit weights, and only AWQ checkpoints have a layout to convert. "
            "Quantize it first: qvl quantize --model ... --out ..."
        )
    if to is not None and info is not None and info.version == to:
        raise FormatError(f"{src} is in the {to} layout already: there is nothing to convert.")
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
        layouts: from and to; None in 16 bits.
        widths: intermediate size, from and to.
        nbytes: of all tensors that will be written.
    """

    def __init__(self, source: Checkpoint, info: QuantizationInfo | None, to: str | None, inner: int) -> None:
        self.source, self.info = source, info
        self.layouts = (info.version, to or info.version) if info else None
        self.widths = (int(source.text_config["intermediate_size"]), inner)
        sizes = self._plan(info, self.layouts[1]) if info and self.layouts else {}
        self._packed = {f"{module}.{part}" for module in sizes for part in _PARTS}
        self.nbytes = sum(sizes.values())
        for name, tensor in source.tensors.items():
            if name not in self._packed:
                count = 1
                for size in padded_shape(source, name, inner):
                    count *= size
                self.nbytes += count * tensor.nbytes // tensor.numel if tensor.numel else 0

    def _plan(self, info: QuantizationInfo, to: str) -> dict[str, int]:
        """Return the bytes each packed module will take, having checked that all can be converted."""
        source, sizes = self.source, {}
        for module in source.quantized_modules():
            missing = [part for part in _PARTS if f"{module}.{part}" not in source.tensors]
            if missing:
                raise FormatError(f"{source.path}: {module} has qweight but no {missing[0]}. Download the model again.")
            qweight, qzeros, scales = (source.tensors[f"{module}.{part}"] for part in _PARTS)
            if (qweight.dtype, qzeros.dtype) != ("I32", "I32"):
                raise FormatError(
                    f"{source.path}: {module} is packed in {qweight.dtype}/{qzeros.dtype}, not int32 words."
                )
            try:
                inputs, outputs = layer_shape(info.version, info.group_size, qweight.shape, qzeros.shape, scales.shape)
                inputs, outputs = self._padded(module, inputs, outputs)
                groups = 1 if info.group_size == -1 else inputs // info.group_size
                width = groups if to == "gemm" else PACK * zeros_width(inputs, inputs // groups)
                if inputs % PACK or outputs % PACK:
                    raise FormatError(f"{outputs} x {inputs} weights don't fill words of {PACK}.")
            except FormatError as error:
                raise FormatError(f"{source.path}: {module}: {error}") from error
            sizes[module] = outputs * inputs // 2 + outputs * width // 2 + outputs * width * DTYPE_BYTES[scales.dtype]
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
        """Add all tensors in the source's order, repacking a module when its qweight comes by."""
        from rich.progress import Progress

        from toolkit.console import err

        source = self.source
        with Progress(console=err, transient=True) as progress:
            task = progress.add_task("converting", total=source.nbytes)
            for name, tensor in source.tensors.items():
                if name not in self._packed:
                    writer.add(name, pad_tensor(source.get(name), padded_shape(source, name, self.widths[1])))
                elif name.endswith(".qweight"):
                    module = name.removesuffix(".qweight")
                    repacked = self._repack(module)
                    for part in _PARTS:
                        writer.add(f"{module}.{part}", getattr(repacked, part))
                progress.advance(task, tensor.nbytes)

    def _repack(self, module: str) -> PackedLinear:
        from toolkit.formats.packing import PackedLinear, pack_gemm, pack_gemv, unpack_gemm, unpack_gemv

        assert self.info is not None and self.layouts is not None  # there is no packed module otherwise
        packed = PackedLinear(*(self.source.get(f"{module}.{part}") for part in _PARTS))
        layer = unpack_gemm(packed) if self.layouts[0] == "gemm" else unpack_gemv(packed, self.info.group_size)
        outputs, inputs = layer.values.shape
        wide_inputs, wide_outputs = self._padded(module, inputs, outputs)
        if (wide_inputs, wide_outputs) != (inputs, outputs):
            layer = pad_quantized(layer, wide_outputs, wide_inputs)
        elif self.layouts[0] == self.layouts[1]:
            return packed
        return pack_gemm(layer) if self.layouts[1] == "gemm" else pack_gemv(layer)

    def config(self) -> dict[str, Any]:
        """Return config.json of what is written."""
        config = copy.deepcopy(self.source.config)
        if self.layouts is not None:
            holder = config if "quantization_config" in config else config["text_config"]
            holder["quantization_config"]["version"] = self.layouts[1]
        set_intermediate_size(config, self.widths[1])
        return config

    def done(self) -> tuple[dict[str, Any], str]:
        """Return what was done, for qvl.json and in words for the model card."""
        entry: dict[str, Any] = {"qvl": __version__}
        said = []
        if self.layouts is not None:
            entry |= {"from": self.layouts[0], "to": self.layouts[1]}
            if self.layouts[0] != self.layouts[1]:
                said.append(f"Repacked from {self.layouts[0].upper()} to {self.layouts[1].upper()}")
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
