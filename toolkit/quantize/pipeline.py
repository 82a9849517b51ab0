"""From a directory of fp16 weights to one of AWQ weights: plan, capture, stream the layers through, write."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint import Checkpoint, CheckpointWriter, resolve
from toolkit.errors import AlreadyQuantized, CheckpointError, FormatError, ManifestError, ResourceError
from toolkit.quantize.card import model_card, versions

if TYPE_CHECKING:
    import torch

    from toolkit.calibration import CalibrationSample, PreparedSample
    from toolkit.quantize.quantizer import LayerResult

__all__ = ["SCALINGS", "Recipe", "quantize"]

SCALINGS = ("plain", "duo")
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """What was asked for, as it stands in qvl.json: equal recipes on equal sources give equal files."""

    format: str = "gemm"
    bits: int = 4
    group_size: int = 128
    scaling: str = "plain"
    clip: bool = True
    samples: int = 128
    max_tokens: int = 4096
    max_pixels: int | None = 1280 * 28 * 28
    seed: int = 0


def quantize(
    model: str,
    out: Path | str,
    *,
    format: str = "gemm",
    bits: int = 4,
    group_size: int = 128,
    calib: str = "demo",
    samples: int = 128,
    scaling: str = "plain",
    clip: bool = True,
    max_tokens: int = 4096,
    max_pixels: int | None = 1280 * 28 * 28,
    seed: int = 0,
    adapter: Path | str | None = None,
    revision: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> Path:
    """Quantize a Qwen2-VL to AWQ.

    Args:
        model: directory, hub id or ``demo``.
        out: directory to write; appears when it is complete.
        format: ``gemm`` or ``gemv``.
        bits: 4.
        group_size: inputs that share a scale: 32, 64, 128, or -1 for the whole row.
        calib: JSONL manifest of chats (see :mod:`toolkit.calibration`) or ``demo``.
        samples: how many of them are used.
        scaling: ``plain`` (activation magnitudes) or ``duo`` (activations over weights), AutoAWQ's two grids.
        clip: search for clipped ranges too.
        max_tokens: longer samples are left out.
        max_pixels: bound on a calibration image; None is the processor's own.
        seed: of the draw of samples.
        adapter: peft adapter directory, merged first.
        revision: branch, tag or commit of a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        force: replace an existing ``out``.

    Returns:
        ``out``.

    Raises:
        QvlError: its children say what was wrong with the source, the settings, the samples or the machine.
    """
    recipe = Recipe(format, bits, group_size, scaling, clip, samples, max_tokens, max_pixels, seed)
    if scaling not in SCALINGS:
        raise FormatError(f"unknown scaling {scaling!r}: choose {' or '.join(SCALINGS)}")
    if samples < 1:
        raise ManifestError(f"{samples} calibration samples: at least 1 is needed, 128 is usual")
    out = Path(out)
    checkpoint = Checkpoint.open(resolve(model, revision))
    from toolkit.quantize.plan import check_settings

    if checkpoint.quantization is not None:
        raise AlreadyQuantized(
            f"{checkpoint.path} is AWQ already ({checkpoint.quantization.version}, group size "
            f"{checkpoint.quantization.group_size}): quantize its fp16 source, or `qvl convert` it to the other format"
        )
    check_settings(checkpoint, format, bits, group_size)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(CheckpointWriter(out, force, source=checkpoint.path))
        source: dict[str, Any] = {"model": model, "revision": revision, "adapter": None}
        if adapter is not None:
            source["adapter"] = str(adapter)
            checkpoint = stack.enter_context(_merged(checkpoint, Path(adapter), writer.tmp))
        _Run(checkpoint, writer, recipe, calib, source, _device(device)).run()
    return out


@contextlib.contextmanager
def _merged(checkpoint: Checkpoint, adapter: Path, beside: Path) -> Iterator[Checkpoint]:
    """Merge the adapter into a temporary checkpoint on the output's file system, gone at the end."""
    from toolkit.adapter import check_adapter, merge
    from toolkit.console import err

    check_adapter(adapter)
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}-merged-", dir=beside.parent) as directory:
        with err.status(f"merging {adapter} into {checkpoint.path.name}"):
            merge(checkpoint, adapter, Path(directory) / checkpoint.path.name)
        yield Checkpoint.open(Path(directory) / checkpoint.path.name)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ResourceError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError("no CUDA device here: use --device cpu, or install a driver and a CUDA torch")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ResourceError(f"no device {name}: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", device.index or 0)
    elif device.type != "cpu":
        raise ResourceError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    return device


class _Run:
    """One quantization, from an open source to a full writer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: CheckpointWriter,
        recipe: Recipe,
        calib: str,
        source: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.writer = writer
        self.recipe = recipe
        self.calib = calib
        self.source = source
        self.device = device
        self.layers: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Do it all; the writer is left ready to be renamed."""
        from toolkit.calibration import digest
        from toolkit.quantize.progress import RunProgress

        began = time.perf_counter()
        stamps = self._stamps()
        with RunProgress(self.device) as self.progress, ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(self.checkpoint.content_hash)
            prepared, calibration = self._prepare()
            plan = self._plan(prepared)
            calibration["sha256"] = digest(prepared)
            self.seconds["prepare"] = time.perf_counter() - began
            self._copy_unquantized()
            self._search(prepared, plan)
            source = {**self.source, "hash": hashing.result()}
        if self._stamps() != stamps:
            raise CheckpointError(
                f"the weights in {self.checkpoint.path} were replaced during the run, so the result would be a mix: "
                "start again when nothing writes there. Nothing was left behind"
            )
        self.seconds["total"] = time.perf_counter() - began
        self._finish(source, calibration)

    def _stamps(self) -> dict[Path, tuple[int, int, int]]:
        """Identity, size and time of the source's weight files: they are mapped into memory, not read at once."""
        found = {info.file: info.file.stat() for info in self.checkpoint.tensors.values()}
        return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in found.items()}

    def _prepare(self) -> tuple[list[PreparedSample], dict[str, Any]]:
        """Read the manifest and turn its samples into model inputs."""
        from toolkit.calibration import prepare, read_manifest
        from toolkit.compat import patch_torchvision
        from toolkit.console import note, warn

        patch_torchvision()
        from transformers import AutoProcessor

        recipe = self.recipe
        with self._manifest() as path:
            samples = read_manifest(path, recipe.samples, recipe.seed)
            if len(samples) < recipe.samples:
                note(f"the manifest has {len(samples)} samples; all are used")
            processor = AutoProcessor.from_pretrained(self.checkpoint.path)
            skipped: list[str] = []

            def skip(sample: CalibrationSample, tokens: int) -> None:
                skipped.append(f"{sample.where} ({tokens} tokens)")

            prepared = list(
                self.progress.track(
                    "reading samples",
                    prepare(
                        samples,
                        processor,
                        max_tokens=recipe.max_tokens,
                        max_pixels=recipe.max_pixels,
                        skipped=skip,
                    ),
                    len(samples),
                )
            )
        if skipped:
            warn(f"{len(skipped)} samples are over {recipe.max_tokens} tokens and left out, the first: {skipped[0]}")
        if not prepared:
            raise ManifestError(
                f"no sample of {self.calib} is within {recipe.max_tokens} tokens: "
                "raise --max-tokens or lower --max-pixels"
            )
        return prepared, {
            "manifest": self.calib,
            "samples": len(prepared),
            "skipped": len(skipped),
            "tokens": sum(p.tokens for p in prepared),
            "vision_tokens": sum(p.vision_tokens for p in prepared),
        }

    @contextlib.contextmanager
    def _manifest(self) -> Iterator[Path]:
        """Yield the manifest's path; the demo's is drawn anew, from its training seeds."""
        if self.calib != "demo":
            yield Path(self.calib)
            return
        from toolkit.demo import write_calibration

        with tempfile.TemporaryDirectory(prefix="qvl-calibration-") as directory:
            yield write_calibration(Path(directory), samples=self.recipe.samples, seed=self.recipe.seed)

    def _plan(self, prepared: list[PreparedSample]) -> Any:
        """Check disk and memory before anything is loaded."""
        from toolkit.console import note
        from toolkit.quantize.plan import make_plan

        sample_bytes = sum(v.nbytes for p in prepared for v in p.inputs.values())
        tokens = sum(p.tokens for p in prepared)
        plan = make_plan(
            self.checkpoint,
            self.recipe.group_size,
            tokens,
            sample_bytes,
            self.device,
            max(p.tokens for p in prepared),
        )
        note(f"{len(prepared)} samples, {tokens} tokens; " + "; ".join(plan.check(self.writer.out, self.device)))
        if self.device.type == "cuda" and not plan.store_on_device:
            note("layer inputs wait in host memory: the GPU is too small for them")
        return plan

    def _copy_unquantized(self) -> None:
        """Write all that is not a decoder layer: embeddings, vision tower, last norm, output head."""
        for name in self.checkpoint.tensors:
            if not name.startswith(self.checkpoint.layers_prefix):
                self.writer.add(name, self.checkpoint.get(name))

    def _search(self, prepared: list[PreparedSample], plan: Any) -> None:
        """Run AutoAWQ over the streamed layers."""
        import torch

        from toolkit.console import note
        from toolkit.quantize.model import Qwen2VLAWQ, StreamedLayers, load_shell
        from toolkit.quantize.quantizer import Qwen2VLAwqQuantizer

        recipe, device = self.recipe, self.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.reset_peak_memory_stats(device)
            torch.backends.cuda.matmul.allow_tf32 = True
        began = time.perf_counter()
        try:
            shell, text_config = load_shell(self.checkpoint, device)
            awq = Qwen2VLAWQ(shell, "qwen2_vl", False, shell.config, None, None)
            del shell
            self.seconds["load"] = time.perf_counter() - began
            self.progress.begin("vision tower", len(prepared))
            awq.quantize(
                quant_config={
                    "zero_point": True,
                    "q_group_size": recipe.group_size,
                    "w_bit": recipe.bits,
                    "version": recipe.format.upper(),
                },
                duo_scaling=recipe.scaling == "duo",
                apply_clip=recipe.clip,
                quantizer_cls=Qwen2VLAwqQuantizer,
                samples=prepared,
                layers=StreamedLayers(self.checkpoint, text_config, device),
                device=device,
                store=device if plan.store_on_device else torch.device("cpu"),
                norm_dtype=self.checkpoint.get(f"{self.checkpoint.layer_prefix(0)}input_layernorm.weight").dtype,
                on_layer=self._on_layer,
                on_note=note,
                on_capture=self.progress.advance,
            )
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory on {device} after {len(self.layers)} layers: "
                f"calibrate with fewer --samples (now {len(prepared)}) or a smaller --max-pixels, "
                "or free memory on the device. Nothing was left behind"
            ) from error
        self.seconds["search"] = time.perf_counter() - began - self.seconds["load"]

    def _on_layer(self, result: LayerResult) -> None:
        """Pack a finished layer and hand it to the writer."""
        from toolkit.formats.packing import pack_gemm, pack_gemv

        pack = pack_gemm if self.recipe.format == "gemm" else pack_gemv
        prefix = self.checkpoint.layer_prefix(result.index)
        for name, linear in result.linears.items():
            packed = pack(linear)
            for part in ("qweight", "qzeros", "scales"):
                self.writer.add(f"{prefix}{name}.{part}", getattr(packed, part))
        for name, tensor in result.others.items():
            self.writer.add(prefix + name, tensor.to(self.checkpoint.get(prefix + name).dtype))
        self.layers.append(
            {
                "layer": result.index,
                "relative_error": result.error,
                "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
            }
        )
        self.progress.layer(result.index, self.checkpoint.num_layers, result.error)

    def _finish(self, source: dict[str, Any], calibration: dict[str, Any]) -> None:
        """Write config, side files, qvl.json and the model card."""
        recipe = self.recipe
        config = {
            **self.checkpoint.config,
            "quantization_config": {
                "bits": recipe.bits,
                "group_size": recipe.group_size,
                "modules_to_not_convert": ["visual"],
                "quant_method": "awq",
                "version": recipe.format,
                "zero_point": True,
            },
        }
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "source": source,
            "recipe": asdict(recipe),
            "calibration": calibration,
            "versions": versions(),
            "device": self.progress.device_name,
            "peak_device_bytes": self.progress.peak_device_bytes(),
            "peak_host_bytes": self.progress.peak_host_bytes(),
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "layers": self.layers,
        }
        self.writer.copy_side_files(self.checkpoint.path)
        self.writer.set_config(config)
        self.writer.write_json("qvl.json", manifest)
        self.writer.write_text("README.md", model_card(manifest))
