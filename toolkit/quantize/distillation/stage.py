"""Distillation as a step of a run: the layers in a journal, what they learn, and the layers that take their place.

What was learned is written first, whole, beside the layers; then each layer's file is replaced by one that has it. A
run that was killed in between puts it into the layers once more, which changes nothing in those that have it already.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.console import note
from toolkit.errors import ResourceError
from toolkit.files import replacing
from toolkit.formats.packing import pack_scales
from toolkit.quantize.devices import made_ready
from toolkit.quantize.distillation.divergence import Head
from toolkit.quantize.distillation.layers import Student, learning_layer
from toolkit.quantize.distillation.lessons import Lessons
from toolkit.quantize.distillation.train import Rates, distill
from toolkit.quantize.parts import Parts, write_layer
from toolkit.quantize.search.gram import takes_bfloat16
from toolkit.quantize.stream.layers import StreamedLayers
from toolkit.quantize.stream.passing import LayerStream
from toolkit.quantize.stream.shell import embed, load_shell
from toolkit.quantize.stream.states import States

if TYPE_CHECKING:
    from torch import Tensor, nn

    from toolkit.quantize.job import Job
    from toolkit.quantize.journal import Journal
    from toolkit.quantize.progress import RunProgress

__all__ = ["RATES", "distill_layers"]

#: The best of three rates in one run on real weights (docs/results/README.md#real-lm); other numbers of steps are not
#: measured.
RATES = Rates()
#: What was learned, in the journal's directory; no weight file, by its name.
_FILE = "distilled.learned"


def distill_layers(journal: Journal, checkpoint: Checkpoint, job: Job, progress: RunProgress) -> dict[str, Any]:
    """Distil the source into the finished layers of a journal, once for all runs.

    Args:
        journal: with all layers written.
        checkpoint: the source, an adapter merged.
        job: what is asked.
        progress: is shown what happens.

    Returns:
        for qvl.json: "held_back_kl" at the start and at each look, nats a token; "taken", the look whose state was
        kept; "steps"; "samples_held_back"; or "left_out", why. With "seconds" and "peak_device_bytes" of the run that
        did it.

    Raises:
        ResourceError: memory that no back-off could save.
    """
    why = _left_out(job)
    if why is not None:
        note(f"distillation is left out: {why}")
        return {"left_out": why}
    told: dict[str, Any] = journal.once("distilled", lambda: _learned(journal, checkpoint, job, progress))
    before, after = told["held_back_kl"][0], told["held_back_kl"][told["taken"]]
    held = f"{told['samples_held_back']} samples held back"
    if told["taken"]:
        _put_in(journal, checkpoint, job)
        note(f"distillation brought the KL on {held} from {before:.3g} to {after:.3g} nats a token")
    else:
        note(f"distillation did no good to {held} ({before:.3g} nats a token) and is undone")
    return told


def _left_out(job: Job) -> str | None:
    if len(job.calibration.samples) < 2:
        return "of one sample none can be held back"
    return None if job.plan.distillation is None else job.plan.distillation.left_out


def _learned(journal: Journal, checkpoint: Checkpoint, job: Job, progress: RunProgress) -> dict[str, Any]:
    """Train, and write what was learned."""
    from safetensors.torch import save_file

    began, device = time.perf_counter(), made_ready(job.devices[0])
    cuda = device.type == "cuda"
    try:
        model, head, lessons = _Preparation(journal, checkpoint, job, device, progress).made()
        found = distill(model, head, lessons, replace(RATES, seed=job.recipe.seed), _shown(progress), note)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory on {device} in distillation: free memory there and run the same command again; "
            "add --no-distill to do without"
        ) from error
    tensors = {}
    for index, layer in enumerate(model.learned()):
        for name, learned in layer.items():
            tensors[checkpoint.layer_prefix(index) + name] = learned.value().cpu()
    with replacing(journal.directory / _FILE, durable=True) as path:
        save_file(tensors, path)
    return {
        "held_back_kl": found.looks,
        "taken": found.taken,
        "steps": found.steps,
        "samples_held_back": found.held,
        "seconds": round(time.perf_counter() - began, 3),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
    }


def _shown(progress: RunProgress) -> Callable[[int, int], None]:
    """Return what shows a step."""

    def show(step: int, steps: int) -> None:
        if step == 1:
            progress.begin("distillation", steps)
        progress.advance(step)

    return show


class _Preparation:
    """Passes the samples through the source's layers, and gathers the quantized ones on the way."""

    def __init__(
        self, journal: Journal, checkpoint: Checkpoint, job: Job, device: torch.device, progress: RunProgress
    ) -> None:
        self.parts = Parts(journal.directory)
        self.checkpoint = checkpoint
        self.job = job
        self.device = device
        self.progress = progress
        self.narrow = takes_bfloat16(device)
        on_device = job.plan.distillation is not None and job.plan.distillation.store_on_device
        self.store = device if on_device else torch.device("cpu")

    @torch.no_grad()
    def made(self) -> tuple[Student, Head, Lessons]:
        """Return what can learn, the source's head, and what is to be learned."""
        samples = self.job.calibration.samples
        self.progress.begin("vision tower", len(samples))
        shell, config = load_shell(self.checkpoint, self.device)
        states = embed(shell, samples, self.device, self.store, self.progress.advance)
        del shell
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        moving = States.join(states)
        layers = StreamedLayers(self.checkpoint, config, self.device)
        stream = LayerStream({}, layers.widths, self.device, self.store, on_note=note)
        self.progress.begin("source's answers", len(layers))
        learning: list[nn.Module] = []
        try:
            for index in range(len(layers)):
                layer = layers.load(index)
                stream.pass_through(layer, moving, narrow=self.narrow)
                moving.add()
                learning.append(self._learning(layer, index))
                self.progress.advance(index + 1)
        finally:
            layers.close()
        head = self._head()
        model = Student(learning, self.device, narrow=self.narrow)
        return model, head, Lessons(states, self._true(head, moving))

    def _learning(self, layer: nn.Module, index: int) -> nn.Module:
        dtype = torch.bfloat16 if self.narrow else torch.float32
        return learning_layer(layer, self.checkpoint, self.job.recipe, index, self.parts.layer_file(index), dtype)

    def _head(self) -> Head:
        checkpoint, language = self.checkpoint, self.checkpoint.language_prefix
        weight = checkpoint.get(checkpoint.head_name).to(self.device)
        norm = checkpoint.get(f"{language}norm.weight").to(self.device, torch.float32)
        eps = float(checkpoint.text_config["rms_norm_eps"])
        return Head(norm, eps, weight if self.narrow and weight.dtype != torch.float32 else weight.float())

    def _true(self, head: Head, moving: States) -> list[Tensor]:
        """Return what the source's head is given, by sample."""
        return [
            head.normed(hidden.to(self.device)).to(head.weight.dtype).to(self.store)
            for hidden in moving.hidden[0].split(moving.lengths)
        ]


def _put_in(journal: Journal, checkpoint: Checkpoint, job: Job) -> None:
    """Give all layers what was learned."""
    from safetensors.torch import load_file

    parts, layout, form = Parts(journal.directory), LAYOUTS[job.recipe.format], job.recipe.format
    records = parts.records()
    shapes = checkpoint.linear_shapes()
    learned = load_file(parts.directory / _FILE)
    for index in range(checkpoint.num_layers):
        prefix = checkpoint.layer_prefix(index)
        tensors = load_file(parts.layer_file(index))
        new = {}
        for name, value in learned.items():
            if not name.startswith(prefix):
                continue
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            if kind == "scales":
                new[f"{prefix}{module}.{layout.packed[2]}"] = pack_scales(form, value, shapes[module][0])
            else:
                new[name] = value
        if any(not torch.equal(tensors[name], value) for name, value in new.items()):
            write_layer(parts.directory, index, {**tensors, **new}, records[index])
