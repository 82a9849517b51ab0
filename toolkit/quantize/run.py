"""From a directory of fp16 weights to one of AWQ weights: open, prepare, plan, search layer after layer, write."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.values import in_16_bits, refuse_values
from toolkit.console import note, warn
from toolkit.errors import CheckpointError, FormatError
from toolkit.quantize.devices import find_devices
from toolkit.quantize.head import HEAD, head_number
from toolkit.quantize.identity import source_identity
from toolkit.quantize.job import Job, Made
from toolkit.quantize.journal import Journal
from toolkit.quantize.model_card import versions
from toolkit.quantize.plan import divide, make_plan
from toolkit.quantize.progress import RunProgress
from toolkit.quantize.recipe import Recipe, RunOptions
from toolkit.quantize.record import write_rest
from toolkit.quantize.samples import prepare_samples
from toolkit.quantize.search.kernels.ahead import compiled_ahead
from toolkit.quantize.shares import Outcome, search_shares
from toolkit.quantize.source import Source, merged, open_source
from toolkit.quantize.tower import in_a_stage
from toolkit.quantize.verdict import measure, told
from toolkit.quantize.worker import Share

__all__ = ["run"]


def run(model: str, out: Path, recipe: Recipe, options: RunOptions) -> Path:
    """Quantize a checkpoint, or only say what that needs; see :func:`toolkit.quantize.quantize`."""
    source = open_source(model, out, recipe, options.force)
    devices = find_devices(options.devices)
    _refuse_together(recipe, options, devices)
    began = time.perf_counter()
    with RunProgress() as progress, contextlib.ExitStack() as beside:
        job = _job(source, recipe, devices, options, progress)
        needs = job.plan.check(out, _device(devices))
        if options.dry_run:
            for line in needs:
                note(line)
            note(job.plan.told_time())
            return out
        record = job.calibration.record
        note(f"{record['samples']} samples, {record['tokens']} tokens; " + "; ".join(needs))
        journal = Journal(
            out,
            _identity(job),
            layers=source.parts,
            force=options.force,
            source=source.checkpoint.path,
            expected_bytes=job.plan.disk,
            environment=_environment(devices),
            restart=options.restart,
        )
        beside.enter_context(compiled_ahead(devices, recipe))
        if not journal.begun:  # whoever begun it has read the same files
            _refuse_values(source.checkpoint, progress)
        seconds = {"prepare": time.perf_counter() - began}
        try:
            with journal, _threads(journal.environment["threads"]):
                made = _make_layers(journal, job, progress)
                write_rest(journal, job, made, {**seconds, "total": time.perf_counter() - began})
                records = journal.records()[: source.checkpoint.num_layers]
        except BaseException:
            if journal.kept:
                warn(
                    f"{journal.kept} of {source.parts} layers are kept: "
                    "run the same command again to go on, or add --restart to begin anew"
                )
            raise
    if options.verdict:
        for line in told(job, made.cost, Checkpoint.open(out).nbytes, records):
            note(line)
    return out


def _refuse_together(recipe: Recipe, options: RunOptions, devices: Sequence[str]) -> None:
    """Refuse what a run can't do beside a thorough search.

    Raises:
        FormatError: says what.
    """
    if recipe.effort != "best":
        return
    if len(devices) > 1:
        raise FormatError(
            "--effort best searches a layer on what the layers before it have become, so devices can't share the "
            f"layers out: choose one of {options.devices}, or use --effort fast"
        )
    if options.layers_report is not None:
        raise FormatError(
            "--layers-report compares ways of searching layers that are each given the source's inputs, and --effort "
            "best is not one of these: make the report with --effort fast; --from-report then works with either"
        )


def _job(source: Source, recipe: Recipe, devices: list[str], options: RunOptions, progress: RunProgress) -> Job:
    """Read the samples and work out disk, memory and time before anything is loaded."""
    calibration = prepare_samples(source.checkpoint, recipe, progress)
    plan = make_plan(source.checkpoint, recipe, calibration.samples, _device(devices), len(devices))
    return Job(source, recipe, devices, calibration, plan, options.layers_report, options.verdict)


def _device(devices: Sequence[str]) -> Any:
    """Return the first device, which stands for all."""
    import torch

    return torch.device(devices[0])


def _environment(devices: Sequence[str]) -> dict[str, Any]:
    """Return what may change the last bit of a result, beside all that it follows from."""
    import torch

    found = {**versions(), "devices": sorted(set(devices)), "threads": torch.get_num_threads()}
    return found | ({"cpu": torch.backends.cpu.get_cpu_capability()} if "cpu" in devices else {})


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Have torch use so many threads in the block: sums that are split otherwise end in another last bit."""
    import torch

    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


def _refuse_values(checkpoint: Checkpoint, progress: RunProgress) -> None:
    """Read the source once, so that a NaN is found now and not in a layer, or in an answer.

    Raises:
        CheckpointError: names the tensors.
    """
    progress.begin("reading values", len(checkpoint.tensors))
    refuse_values(checkpoint, progress.advance)


def _identity(job: Job) -> dict[str, Any]:
    """Return all that the weights follow from, which a run that goes on must have in common with the one before."""
    source = job.source
    return {
        "source": {**source.told, "files": source.stamps, "adapter_files": source.adapter_stamps},
        "recipe": job.recipe.recorded(),
        "left": source.left_in_words or "",
        "calibration": job.calibration.record["sha256"],
        "report": job.report is not None,
    }


def _make_layers(journal: Journal, job: Job, progress: RunProgress) -> Made:
    """Make all that the journal does not have yet.

    Raises:
        CheckpointError: the source was replaced meanwhile.
    """
    for text in journal.notes:
        note(text)
    original, adapter = job.source.checkpoint, job.recipe.adapter
    layers = job.source.parts
    if journal.done:
        note(f"going on: {len(journal.done)} of {layers} layers are done")
    todo = [index for index in range(layers) if index not in journal.done]
    balance: list[float] | None = None
    outcome = Outcome([], [])
    with contextlib.ExitStack() as stack:
        checkpoint = original
        if adapter is not None:
            stack.callback(shutil.rmtree, journal.work / "merged", ignore_errors=True)
            checkpoint = merged(original, adapter, journal.work / "merged")
        pool = stack.enter_context(ThreadPoolExecutor(2))
        # both beside the search, which waits for neither
        hashing = pool.submit(checkpoint.content_hash)
        rest = [name for name in checkpoint.tensors if not name.startswith(checkpoint.layers_prefix)]
        if job.source.tower_left is not None:
            rest = [name for name in rest if not in_a_stage(checkpoint, name)]
        if job.source.lm_head:
            rest = [name for name in rest if not name.startswith(f"{HEAD}.")]
        copying = pool.submit(journal.add_rest, ((name, in_16_bits(checkpoint.get(name))) for name in rest))
        progress.layers(len(journal.done), layers)
        if job.recipe.balance != "none":
            balance = journal.once("sensitivity", lambda: _sensitivity(checkpoint, job, progress))
        if todo:
            shares = _shares(checkpoint, job, journal.directory, todo, balance)
            outcome = search_shares(shares, job.calibration.samples, journal.work / "samples.pt", progress, copying)
        copying.result()
        journal.copy_side_files(checkpoint.path)
        distillation = _distill(journal, checkpoint, job, progress)
        cost = measure(journal, checkpoint, job, progress)
        made = Made(hashing.result(), checkpoint.config, balance, outcome, cost, distillation)
    if source_identity(original) != job.source.stamps:
        shutil.rmtree(journal.directory)  # nothing of it is worth keeping
        raise CheckpointError(
            f"the weights in {original.path} were replaced during the run, so the result would be a mix: "
            "start again when nothing writes there. Nothing was left behind"
        )
    return made


def _distill(journal: Journal, checkpoint: Checkpoint, job: Job, progress: RunProgress) -> dict[str, Any] | None:
    """Train what is in 16 bits, in all layers together, where that is asked for."""
    if not job.recipe.distill:
        return None
    from toolkit.quantize.distillation.stage import distill_layers

    return distill_layers(journal, checkpoint, job, progress)


def _sensitivity(checkpoint: Checkpoint, job: Job, progress: RunProgress) -> list[float]:
    """Measure what a vision token counts in each layer."""
    from toolkit.quantize.search.sensitivity import measure

    progress.begin("sensitivity", 2 * checkpoint.num_layers)
    return list(measure(checkpoint, job.calibration.samples, _device(job.devices), on_step=progress.advance))


def _divided(todo: Sequence[int], layers: int, devices: int, head: int | None = None) -> list[tuple[int, ...]]:
    """Share out decoder layers and the vision tower's stages, each kind by itself; the head goes with the last."""
    kinds = [[i for i in todo if i < layers], [i for i in todo if i >= layers and i != head]]
    shares = [(*a, *b) for a, b in zip(*(divide(kind, devices) for kind in kinds), strict=True)]
    if head in todo:
        shares[-1] = (*shares[-1], head)
    return shares


def _shares(
    checkpoint: Checkpoint, job: Job, directory: Path, todo: Sequence[int], balance: Sequence[float] | None
) -> list[Share]:
    """Share the layers out; a device that would have none is left out."""
    import torch

    threads = torch.get_num_threads()
    shared = _divided(todo, checkpoint.num_layers, len(job.devices), head_number(checkpoint, job.recipe))
    return [
        Share(
            checkpoint.path,
            job.recipe,
            job.source.left,
            directory,
            device,
            job.plan.store_on_device,
            layers,
            balance,
            job.report is not None,
            threads,
        )
        for device, layers in zip(job.devices, shared, strict=True)
        if layers
    ]
