"""From a directory of fp16 weights to one of AWQ weights: plan, capture, stream the layers through, write."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.left_out import Linear, describe, modules_to_not_convert
from toolkit.console import note, warn
from toolkit.errors import AlreadyQuantized, CheckpointError, ManifestError, ResourceError
from toolkit.quantize.journal import Journal, source_identity
from toolkit.quantize.model_card import model_card, versions
from toolkit.quantize.plan import Plan, check_settings, divide, make_plan
from toolkit.quantize.progress import RunProgress
from toolkit.quantize.recipe import Recipe, RunOptions
from toolkit.quantize.search.mixed import choose, skipped
from toolkit.quantize.worker import Share, in_process
from toolkit.quantize.worker import run as run_share
from toolkit.sources.directory import resolve

if TYPE_CHECKING:
    import torch

    from toolkit.calibration.inputs import CalibrationSample, PreparedSample

__all__ = ["run"]

MANIFEST_VERSION = 2


def run(model: str, out: Path, recipe: Recipe, options: RunOptions) -> Path:
    """Quantize a checkpoint; see :func:`toolkit.quantize.quantize`."""
    checkpoint = Checkpoint.open(resolve(model, recipe.revision))
    if checkpoint.quantization is not None:
        raise AlreadyQuantized(
            f"{checkpoint.path} is AWQ already ({checkpoint.quantization.version}, group size "
            f"{checkpoint.quantization.group_size}): quantize its fp16 source, or `qvl convert` it to the other format"
        )
    check_settings(checkpoint, recipe)
    CheckpointWriter(out, options.force, source=checkpoint.path).check_out()
    if recipe.adapter is not None:
        from toolkit.sources.adapter import check_adapter

        check_adapter(recipe.adapter)
    left = skipped(recipe.skip, checkpoint)
    if recipe.from_report is not None:
        from toolkit.checkpoint.weights import read_json

        left |= choose(read_json(recipe.from_report), recipe.budget, checkpoint, recipe.group_size)
    if left:
        note(f"left in 16 bits: {describe(left, checkpoint.num_layers, checkpoint.family)}")
    source: dict[str, Any] = {
        "model": model,
        "revision": recipe.revision,
        "adapter": str(recipe.adapter) if recipe.adapter else None,
    }
    task = _Run(checkpoint, recipe, source, _devices(options.devices), left, options.layers_report)
    if options.dry_run:
        task.forecast(out)
    else:
        task.run(out, options.force, options.restart)
    return out


def _devices(names: str) -> list[str]:
    """Turn ``auto``, ``cpu``, ``cuda:1`` or ``0,1`` into torch's names of devices that are there."""
    import torch

    if names == "auto":
        names = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in names.split(","):
        name = f"cuda:{name}" if name.isdigit() else name
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ResourceError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or a list as in 0,1") from None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ResourceError("no CUDA device here: use --devices cpu, or install a driver and a CUDA torch")
            if device.index is not None and device.index >= torch.cuda.device_count():
                raise ResourceError(f"no device {name}: this machine has {torch.cuda.device_count()}")
            device = torch.device("cuda", device.index or 0)
        elif device.type != "cpu":
            raise ResourceError(f"device {name!r} is not supported: use auto, cpu, cuda, cuda:N or a list as in 0,1")
        found.append(str(device))
    if len(set(found)) < len(found) and "cpu" not in found:
        raise ResourceError(f"--devices {names} names a device twice")
    return found


class _Run:
    """One quantization, from an open source to a finished directory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        source: dict[str, Any],
        devices: Sequence[str],
        left: frozenset[Linear],
        layers_report: Path | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.source = source
        self.devices = devices
        self.left = left
        self.layers_report = layers_report
        self.seconds: dict[str, float] = {}
        self._copying: Future[None] = Future()
        self.layers: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []

    def forecast(self, out: Path) -> None:
        """Say what a run would need, and whether this machine has it."""
        with RunProgress() as self.progress:
            prepared, _ = self._prepare()
        plan = self._plan(prepared)
        for line in plan.check(out, self._torch_device()):
            note(line)
        note(plan.told_time())

    def run(self, out: Path, force: bool, restart: bool) -> None:
        """Do it all."""
        began = time.perf_counter()
        stamps = source_identity(self.checkpoint)
        with RunProgress() as self.progress:
            prepared, calibration = self._prepare()
            plan = self._plan(prepared)
            note(
                f"{len(prepared)} samples, {calibration['tokens']} tokens; "
                + "; ".join(plan.check(out, self._torch_device()))
            )
            self.seconds["prepare"] = time.perf_counter() - began
            identity = {
                "source": {**self.source, "files": stamps, "adapter_files": _stamps(self.recipe.adapter)},
                "recipe": self.recipe.recorded(),
                "left": self._left_in_words() or "",
                "calibration": calibration["sha256"],
                "report": self.layers_report is not None,
            }
            journal = Journal(
                out,
                identity,
                layers=self.checkpoint.num_layers,
                force=force,
                source=self.checkpoint.path,
                expected_bytes=plan.disk,
                environment={**versions(), "devices": sorted(set(self.devices))},
                restart=restart,
            )
            try:
                with journal:
                    self._fill(journal, prepared, plan, self.recipe.adapter, stamps)
                    self.seconds["total"] = time.perf_counter() - began
                    self._finish(journal, calibration, plan)
            except BaseException:
                if journal.kept:
                    warn(
                        f"{journal.kept} of {self.checkpoint.num_layers} layers are kept: "
                        "run the same command again to go on, or add --restart to begin anew"
                    )
                raise

    def _prepare(self) -> tuple[list[PreparedSample], dict[str, Any]]:
        """Read the manifest and turn its samples into model inputs."""
        from toolkit.calibration.inputs import digest, prepare, read_manifest
        from toolkit.compat import patch_torchvision

        patch_torchvision()
        from transformers import AutoProcessor

        recipe = self.recipe
        with self._manifest() as path:
            samples = read_manifest(path, recipe.samples, recipe.seed)
            if len(samples) < recipe.samples:
                note(f"the manifest has {len(samples)} samples; all are used")
            processor = AutoProcessor.from_pretrained(self.checkpoint.path)
            too_long: list[str] = []

            def skip(sample: CalibrationSample, tokens: int) -> None:
                too_long.append(f"{sample.where} ({tokens} tokens)")

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
        if too_long:
            warn(f"{len(too_long)} samples are over {recipe.max_tokens} tokens and left out, the first: {too_long[0]}")
        if not prepared:
            raise ManifestError(
                f"no sample of {self.recipe.calib} is within {recipe.max_tokens} tokens: "
                "raise --max-tokens or lower --max-pixels"
            )
        return prepared, {
            "manifest": self.recipe.calib,
            "samples": len(prepared),
            "skipped": len(too_long),
            "tokens": sum(p.tokens for p in prepared),
            "vision_tokens": sum(p.vision_tokens for p in prepared),
            "sha256": digest(prepared),
        }

    @contextlib.contextmanager
    def _manifest(self) -> Iterator[Path]:
        """Yield the manifest's path; the demo's is drawn anew, from its training seeds."""
        if self.recipe.calib != "demo":
            yield Path(self.recipe.calib)
            return
        from toolkit.tasks.manifests import write_calibration

        with tempfile.TemporaryDirectory(prefix="qvl-calibration-") as directory:
            yield write_calibration(Path(directory), samples=self.recipe.samples, seed=self.recipe.seed)

    def _plan(self, prepared: Sequence[PreparedSample]) -> Plan:
        """Work out disk, memory and time before anything is loaded."""
        return make_plan(self.checkpoint, self.recipe, prepared, self._torch_device(), len(self.devices))

    def _torch_device(self) -> torch.device:
        import torch

        return torch.device(self.devices[0])

    def _fill(
        self,
        journal: Journal,
        prepared: Sequence[PreparedSample],
        plan: Plan,
        adapter: Path | None,
        stamps: dict[str, Any],
    ) -> None:
        """Make all that the journal does not have yet."""
        for text in journal.notes:
            note(text)
        layers = self.checkpoint.num_layers
        if journal.done:
            note(f"going on: {len(journal.done)} of {layers} layers are done")
        todo = [index for index in range(layers) if index not in journal.done]
        original, merged = self.checkpoint, journal.work / "merged"
        with contextlib.ExitStack() as stack:
            if adapter is not None:
                stack.callback(shutil.rmtree, merged, ignore_errors=True)
                self.checkpoint = _merged(original, adapter, merged)
            pool = stack.enter_context(ThreadPoolExecutor(2))
            # both beside the search, which waits for neither
            hashing = pool.submit(self.checkpoint.content_hash)
            rest = [name for name in self.checkpoint.tensors if not name.startswith(self.checkpoint.layers_prefix)]
            self._copying = pool.submit(journal.add_rest, ((name, self.checkpoint.get(name)) for name in rest))
            self.progress.layers(len(journal.done), layers)
            if todo:
                self._search(journal, prepared, plan, todo)
            self._copying.result()
            self.source["hash"] = hashing.result()
            self.checkpoint = original
        if source_identity(original) != stamps:
            shutil.rmtree(journal.directory)  # nothing of it is worth keeping
            raise CheckpointError(
                f"the weights in {original.path} were replaced during the run, so the result would be a mix: "
                "start again when nothing writes there. Nothing was left behind"
            )

    def _search(self, journal: Journal, prepared: Sequence[PreparedSample], plan: Plan, todo: Sequence[int]) -> None:
        """Share the layers out and wait until they are written."""
        balance = self._balance(prepared)
        shares = [
            Share(
                self.checkpoint.path,
                self.recipe,
                self.left,
                journal.directory,
                device,
                plan.store_on_device,
                layers,
                balance,
                self.layers_report is not None,
            )
            for device, layers in zip(self.devices, divide(todo, len(self.devices)), strict=True)
            if layers
        ]
        self.progress.begin("vision tower", len(prepared))
        if len(shares) == 1:
            run_share(shares[0], prepared, self._told)
        else:
            self._search_in_parallel(shares, prepared, journal.work / "samples.pt")

    def _search_in_parallel(self, shares: Sequence[Share], prepared: Sequence[PreparedSample], file: Path) -> None:
        """Run each share in a process of its own."""
        import multiprocessing
        import queue

        import torch

        torch.save([(p.inputs, p.tokens, p.vision_tokens) for p in prepared], file)
        context = multiprocessing.get_context("spawn")
        told: multiprocessing.Queue[tuple[int, str, Any]] = context.Queue()
        processes = [
            context.Process(target=in_process, args=(share, file, rank, told), daemon=True)
            for rank, share in enumerate(shares)
        ]
        try:
            for process in processes:
                process.start()
            while len(self.ends) < len(processes):
                try:
                    rank, kind, what = told.get(timeout=1)
                except queue.Empty:
                    for share, process in zip(shares, processes, strict=True):
                        if process.exitcode:
                            raise ResourceError(
                                f"the process on {share.device} died with exit code {process.exitcode}: killed "
                                "for want of host memory, perhaps"
                            ) from None
                    continue
                if kind == "error":
                    raise what
                if kind != "captured" or rank == 0:
                    self._told(kind, what)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
            file.unlink(missing_ok=True)

    def _told(self, kind: str, what: Any) -> None:
        """Take in what a share says; see :func:`toolkit.quantize.worker.run`."""
        if kind == "captured":
            self.progress.advance(what)
        elif kind == "note":
            note(what)
        elif kind == "layer":
            if self._copying.done():
                self._copying.result()  # a full disk, say: why search on?
            self.layers.append({"layer": what["layer"], "seconds": what["seconds"]})
            self.progress.layer(what["layer"], what["error"], what["seconds"]["total"], what["peak"])
        elif kind == "end":
            self.ends.append(what)

    def _balance(self, prepared: Sequence[PreparedSample]) -> tuple[float, ...] | None:
        """Measure what a vision token counts in each layer, where that was asked for."""
        if self.recipe.balance == "none":
            return None
        from toolkit.quantize.search.sensitivity import measure

        self.progress.begin("sensitivity", 2 * self.checkpoint.num_layers)
        found = measure(self.checkpoint, prepared, self._torch_device(), on_step=self.progress.advance)
        self.source["vision_sensitivity"] = [round(ratio, 6) for ratio in found]
        return tuple(found)

    def _left_in_words(self) -> str | None:
        checkpoint = self.checkpoint
        return describe(self.left, checkpoint.num_layers, checkpoint.family) if self.left else None

    def _finish(self, journal: Journal, calibration: dict[str, Any], plan: Plan) -> None:
        """Write config, side files, qvl.json, what was measured, the model card and the layers' report."""
        recipe = self.recipe
        layers = journal.records()
        left = modules_to_not_convert(self.left, self.checkpoint.num_layers, self.checkpoint.family)
        config = {
            **self.checkpoint.config,
            "quantization_config": {
                "bits": recipe.bits,
                "group_size": recipe.group_size,
                "modules_to_not_convert": left,
                "quant_method": "awq",
                "version": recipe.format,
                "zero_point": True,
            },
        }
        balance = self.source.pop("vision_sensitivity", None)
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "source": self.source,
            "recipe": recipe.recorded(),
            "left_in_16_bits": self._left_in_words(),
            "calibration": calibration,
            "versions": versions(),
            "vision_sensitivity": balance,
            "layers": [{key: value for key, value in layer.items() if key != "errors"} for layer in layers],
        }
        self.layers.sort(key=lambda layer: layer["layer"])
        measured = {
            "versions": versions(),
            "device": ", ".join(end["device"] for end in self.ends),
            "seconds": {
                **{k: round(v, 3) for k, v in self.seconds.items()},
                **{step: max((end["seconds"][step] for end in self.ends), default=0.0) for step in ("embed", "layers")},
            },
            "peak_device_bytes": max((end["peak_device_bytes"] for end in self.ends), default=0),
            "peak_host_bytes": max((end["peak_host_bytes"] for end in self.ends), default=0),
            "planned": {"device_bytes": plan.device, "host_bytes": plan.host, "seconds": plan.seconds},
            "layers_of_earlier_runs": len(journal.done),
            "layers": self.layers,
        }
        journal.copy_side_files(self.checkpoint.path)
        journal.set_config(config)
        journal.write_json("qvl.json", manifest)
        journal.write_json("qvl-run.json", measured)
        journal.write_text("README.md", model_card(manifest))
        if self.layers_report is not None:
            from toolkit.quantize.report import write_report

            write_report(self.layers_report, layers, manifest)


def _stamps(adapter: Path | None) -> dict[str, Any]:
    """Return size and time of an adapter's files."""
    if adapter is None or not adapter.is_dir():
        return {}
    stats = {file.name: file.stat() for file in sorted(adapter.iterdir()) if file.is_file()}
    return {name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}


def _merged(checkpoint: Checkpoint, adapter: Path, to: Path) -> Checkpoint:
    """Merge a LoRA adapter in a directory that goes with the journal's."""
    from toolkit.console import err
    from toolkit.sources.adapter import merge

    shutil.rmtree(to, ignore_errors=True)
    with err.status(f"merging {adapter} into {checkpoint.path.name}"):
        return Checkpoint.open(merge(checkpoint, adapter, to / checkpoint.path.name))
