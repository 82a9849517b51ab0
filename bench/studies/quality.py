"""Which of several quantizations of one model is nearest to its source, on a user's own images and texts.

No server: every directory goes through transformers in turn, on a GPU or a CPU, its packed weights read back, and what
counts is KL(source || candidate) on the tokens of the manifest's answers (on all text, where a chat has none). All
candidates read the same tokens, so they are compared in pairs, and minutes are enough to tell two settings apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.studies.settings import QualitySettings
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.compat import patch_torchvision
from toolkit.console import err, note, out, warn
from toolkit.errors import FormatError
from toolkit.sources.directory import resolve
from toolkit.tables import table
from toolkit.units import human_bytes
from toolkit.version import __version__

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from toolkit.calibration.inputs import PreparedSample

__all__ = ["run"]


def run(candidates: Sequence[Path], settings: QualitySettings) -> dict[str, Any]:
    """Measure candidates against their source; print a table, and write JSON where it was asked for.

    Raises:
        CheckpointError: a directory is no checkpoint.
        FormatError: one is of another shape than the source.
        ManifestError: there is nothing to predict.
    """
    import torch

    source = Checkpoint.open(resolve(settings.source))
    for path in candidates:
        _refuse_another(source, Checkpoint.open(path))
    device = torch.device(settings.device if settings.device != "auto" else _default_device())
    samples = _samples(source, settings)
    found = _measure(source, candidates, samples, device, settings)
    _show(found)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        note(f"written to {settings.out}")
    return found


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(source: Checkpoint, device: torch.device) -> str:
    """Return what to compute in: float32 where it fits, for bfloat16's own noise is as large as a good drift."""
    import torch

    if device.type != "cuda":
        return "float32"
    free, _ = torch.cuda.mem_get_info(device)
    needed = 4 * sum(tensor.numel for tensor in source.tensors.values())
    if needed < 0.8 * free:
        return "float32"
    warn("the model does not fit in float32: in bfloat16, drifts that are nearly equal are told apart less well")
    return "bfloat16"


def _refuse_another(source: Checkpoint, other: Checkpoint) -> None:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    # an MLP that was padded for more GPUs is wider, and computes the same
    for key in keys:
        before, after = source.text_config[key], other.text_config[key]
        if before != after and not (key == "intermediate_size" and after > before):
            raise FormatError(
                f"{other.path} has {key} {after} and {source.path} {before}: it is not made of that model. "
                "Give its own source as --source."
            )


def _samples(source: Checkpoint, settings: QualitySettings) -> list[PreparedSample]:
    from toolkit.quantize.progress import RunProgress
    from toolkit.quantize.recipe import Recipe
    from toolkit.quantize.samples import prepare_samples

    recipe = Recipe(
        calib=settings.data,
        samples=settings.samples,
        seed=settings.seed,
        max_tokens=settings.max_tokens,
        max_pixels=settings.max_pixels,
    )
    with RunProgress() as progress:
        return prepare_samples(source, recipe, progress).samples


def _measure(
    source: Checkpoint,
    candidates: Sequence[Path],
    samples: Sequence[PreparedSample],
    device: torch.device,
    settings: QualitySettings,
) -> dict[str, Any]:
    patch_torchvision()
    import torch
    import transformers
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from toolkit.fidelity.answers import differs_by_answer, kl_by_answer, predictions
    from toolkit.fidelity.paired import compare, summarize
    from toolkit.fidelity.turns import Turns

    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    turns = Turns.of(tokenizer)
    positions = [predictions(sample, turns) for sample in samples]
    tokens = [len(where) for where in positions]
    dtype = _dtype(source, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        reader = _Reader(samples, positions, device, dtype, progress)
        states, head = reader.read(source.path)
        rows = []
        for path in candidates:
            began = time.perf_counter()
            after, own = reader.read(path)
            sums = [float(kl.sum()) for kl in kl_by_answer(states, after, head, own)]
            rows.append((path, sums, differs_by_answer(states, after, head, own), time.perf_counter() - began))
    first = rows[0][1]
    told = []
    for path, sums, changed, seconds in rows:
        checkpoint = Checkpoint.open(path)
        told.append(
            {
                "path": str(path),
                "bytes": checkpoint.nbytes,
                "kl": summarize(sums, tokens, settings.seed).to_dict(),
                "over_first": compare(first, sums, tokens, settings.seed).to_dict(),
                "changed": sum(changed),
                "seconds": round(seconds, 1),
                "answer_kl": [float(f"{kl / n:.4g}") for kl, n in zip(sums, tokens, strict=True)],
            }
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "source": {"path": str(source.path), "bytes": source.nbytes},
        "data": settings.data,
        "seed": settings.seed,
        "answers": len(tokens),
        "tokens": sum(tokens),
        "device": name,
        "dtype": dtype,
        "versions": {"qvl": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "candidates": told,
    }


@dataclass(frozen=True)
class _Reader:
    """Has models read the answers, one model after the other."""

    samples: Sequence[PreparedSample]
    positions: Sequence[torch.Tensor]
    device: torch.device
    dtype: str
    progress: Progress

    def read(self, path: Path) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return what a model makes of the answers, and its head [V, D]; the model is gone afterwards."""
        import torch

        from toolkit.fidelity.answers import final_states
        from toolkit.formats.reference import load_reference

        task = self.progress.add_task(path.name, total=len(self.samples))
        model = load_reference(Checkpoint.open(path), getattr(torch, self.dtype), self.device)
        found = final_states(
            model, self.samples, self.positions, lambda done: self.progress.update(task, completed=done)
        )
        head = model.lm_head.weight.detach().clone()
        del model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found, head


def _band(band: dict[str, float], digits: str) -> str:
    return f"{band['value']:{digits}} [{band['low']:{digits}}, {band['high']:{digits}}]"


def _show(found: dict[str, Any]) -> None:
    shown = table(
        ("candidate", "size", "mean KL", "over the first: mean", "trimmed", "geometric", "changed"), range(1, 7)
    )
    source = found["source"]["bytes"]
    for row in found["candidates"]:
        ratios = row["over_first"]
        own = row is found["candidates"][0]
        shown.add_row(
            Path(row["path"]).name,
            f"{human_bytes(row['bytes'])} ({row['bytes'] / source:.0%})",
            f"{row['kl']['mean']['value']:.2e}",
            *("1" if own else _band(ratios[key], ".2f") for key in ("mean", "trimmed", "geometric")),
            str(row["changed"]),
        )
    out.print(shown)
    where = f"{found['device']}, {found['dtype']}"
    out.print(f"{found['answers']} answers, {found['tokens']} tokens, {where}. KL in nats a token from the source;")
    out.print("ratios paired, with 95% intervals: of means, without the worst 1%, geometric over answers.")
