"""The calibration samples as model inputs, and what is recorded of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.console import note, warn
from toolkit.errors import CheckpointError, ManifestError
from toolkit.fidelity.turns import Turns

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.calibration.manifest import CalibrationSample
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.progress import RunProgress
    from toolkit.quantize.recipe import Recipe

__all__ = ["Calibration", "prepare_samples"]


@dataclass(frozen=True)
class Calibration:
    """The samples that are used, and what qvl.json says of them."""

    samples: list[PreparedSample]
    record: dict[str, Any]
    #: How the chat template marks answers.
    turns: Turns


def prepare_samples(checkpoint: Checkpoint, recipe: Recipe, progress: RunProgress) -> Calibration:
    """Read the manifest and turn its samples into model inputs.

    Raises:
        CheckpointError: its processor can't be loaded, or its template does not show images.
        ManifestError: it can't be read, or no sample is short enough.
    """
    from toolkit.calibration.inputs import digest, prepare
    from toolkit.calibration.manifest import read_manifest
    from toolkit.compat import patch_torchvision
    from toolkit.sources.adapter import with_side_files

    patch_torchvision()
    from transformers import AutoProcessor

    too_long: list[str] = []

    def skip(sample: CalibrationSample, tokens: int) -> None:
        too_long.append(f"{sample.where} ({tokens} tokens)")

    with _manifest(recipe) as path:
        samples = read_manifest(path, recipe.samples, recipe.seed)
        if len(samples) < recipe.samples:
            note(f"the manifest has {len(samples)} samples; all are used")
        try:
            with with_side_files(checkpoint, recipe.adapter) as place:
                processor = AutoProcessor.from_pretrained(place)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"transformers can't load the processor in {checkpoint.path}: {reason}") from error
        inputs = prepare(samples, processor, max_tokens=recipe.max_tokens, max_pixels=recipe.max_pixels, skipped=skip)
        prepared = list(progress.track("reading samples", inputs, len(samples)))
    if too_long:
        warn(f"{len(too_long)} samples are over {recipe.max_tokens} tokens and left out, the first: {too_long[0]}")
    if not prepared:
        raise ManifestError(
            f"no sample of {recipe.calib} is within {recipe.max_tokens} tokens: "
            "raise --max-tokens or lower --max-pixels"
        )
    if not any(sample.vision_tokens for sample in prepared):
        warn(
            f"no sample of {recipe.calib} has an image or video: what the model makes of images is left to chance. "
            "Put chats with images like your users' into the manifest (docs/calibration.md)"
        )
    record = {
        "manifest": recipe.calib,
        "samples": len(prepared),
        "skipped": len(too_long),
        "tokens": sum(p.tokens for p in prepared),
        "vision_tokens": sum(p.vision_tokens for p in prepared),
        "sha256": digest(prepared),
    }
    return Calibration(prepared, record, Turns.of(processor.tokenizer))


@contextlib.contextmanager
def _manifest(recipe: Recipe) -> Iterator[Path]:
    """Yield the manifest's path; the demo's is drawn anew, from its training seeds."""
    if recipe.calib != "demo":
        yield Path(recipe.calib)
        return
    from toolkit.tasks.manifests import write_calibration

    with tempfile.TemporaryDirectory(prefix="qvl-calibration-") as directory:
        yield write_calibration(Path(directory), samples=recipe.samples, seed=recipe.seed)
