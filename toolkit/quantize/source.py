"""The checkpoint that is quantized: opened, checked against what is asked, merged with an adapter."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.left_out import Linear, describe
from toolkit.checkpoint.problems import refuse_broken
from toolkit.console import note
from toolkit.errors import AlreadyQuantized, FormatError
from toolkit.quantize.identity import file_stamps, source_identity
from toolkit.quantize.plan import GROUP_SIZES, check_settings, tower_saves
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.search.mixed import choose, skipped
from toolkit.quantize.tower import packed_linears
from toolkit.sources.directory import resolve

__all__ = ["Source", "merged", "open_source"]


@dataclass(frozen=True)
class Source:
    """What is quantized.

    ``told``: where it came from, as in qvl.json. ``left``: linears that stay in 16 bits. ``stamps``: size and time of
    its files; ``adapter_stamps``: of an adapter's. ``tower_left``: linears of the vision tower that stay in 16 bits,
    by their names behind `Names.visual`; None: the tower is not quantized. ``lm_head``: whether the output head is.
    """

    checkpoint: Checkpoint
    told: dict[str, Any]
    left: frozenset[Linear]
    stamps: dict[str, dict[str, int]]
    adapter_stamps: dict[str, dict[str, int]]
    tower_left: tuple[str, ...] | None = None
    lm_head: bool = False

    @property
    def parts(self) -> int:
        """How many pieces are searched: decoder layers, the vision tower's stages and the head, if they are."""
        stages = 0 if self.tower_left is None else self.checkpoint.vision.depth + 1
        return self.checkpoint.num_layers + stages + self.lm_head

    @property
    def left_in_words(self) -> str | None:
        """Which linears stay in 16 bits; None: none."""
        checkpoint = self.checkpoint
        return describe(self.left, checkpoint.num_layers, checkpoint.family) if self.left else None


def open_source(model: str, out: Path, recipe: Recipe, force: bool) -> Source:
    """Open a checkpoint and refuse what can't be: before anything is read, written or waited for.

    Args:
        model: directory, hub id or ``demo``.
        out: directory to be written.
        recipe: what is asked.
        force: whether ``out`` may exist.

    Raises:
        QvlError: of the kind of what is wrong.
    """
    checkpoint = Checkpoint.open(resolve(model, recipe.revision))
    if checkpoint.quantization is not None:
        raise AlreadyQuantized(
            f"{checkpoint.path} is quantized already ({checkpoint.quantization.format}, group size "
            f"{checkpoint.quantization.group_size}): quantize its fp16 source, or `qvl convert` it to another format"
        )
    refuse_broken(checkpoint)
    check_settings(checkpoint, recipe)
    CheckpointWriter(out, force, source=checkpoint.path).check_out()
    if recipe.adapter is not None:
        from toolkit.sources.adapter import check_adapter

        check_adapter(recipe.adapter, checkpoint)
    left = skipped(recipe.skip, checkpoint)
    if recipe.from_report is not None:
        from toolkit.checkpoint.weights import read_json

        report = read_json(recipe.from_report)
        left |= choose(report, recipe.budget, checkpoint, recipe.group_size, elsewhere=tower_saves(checkpoint, recipe))
    adapter = str(recipe.adapter) if recipe.adapter else None
    source = Source(
        checkpoint,
        {"model": model, "revision": recipe.revision, "adapter": adapter},
        left,
        source_identity(checkpoint),
        _adapter_stamps(recipe.adapter),
        _tower_left(checkpoint, recipe),
        recipe.lm_head,
    )
    if any(tensor.dtype == "F32" for tensor in checkpoint.tensors.values()):
        note("the source holds fp32 weights: what is not packed (vision tower, embeddings, norms) is written as fp16")
    if left:
        note(f"left in 16 bits: {source.left_in_words}")
    return source


def _tower_left(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...] | None:
    """Return which linears of the vision tower its groups leave in 16 bits; None where it is not quantized."""
    if recipe.vision != "awq":
        return None
    if checkpoint.family.model_type != "qwen2_vl":
        raise FormatError(
            f"--vision awq: the vision tower of {checkpoint.family.title} can't be quantized yet, only Qwen2-VL's: "
            "leave --vision out"
        )
    modules = checkpoint.family.tower.modules(checkpoint.vision)
    packed = packed_linears(checkpoint, recipe.group_size)
    left = tuple(name for name in modules if name not in packed)
    if not packed:
        works = [str(size) for size in GROUP_SIZES if packed_linears(checkpoint, size)]
        raise FormatError(
            f"--vision awq: groups of {recipe.group_size} divide no linear of the vision tower, which is "
            f"{checkpoint.vision.width} wide: use --group-size {' or '.join(works)}, or leave the tower in 16 bits"
        )
    if left:
        kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in left)
        note(
            f"of the vision tower, {', '.join(kinds)} stay in 16 bits ({len(left)} of {len(modules)} linears): "
            f"groups of {recipe.group_size} don't divide their inputs"
        )
    return left


def merged(checkpoint: Checkpoint, adapter: Path, to: Path) -> Checkpoint:
    """Merge a LoRA adapter into a copy of the checkpoint in directory ``to``, which is emptied first."""
    from toolkit.console import err
    from toolkit.sources.adapter import merge

    shutil.rmtree(to, ignore_errors=True)
    with err.status(f"merging {adapter} into {checkpoint.path.name}"):
        return Checkpoint.open(merge(checkpoint, adapter, to / checkpoint.path.name))


def _adapter_stamps(adapter: Path | None) -> dict[str, dict[str, int]]:
    if adapter is None or not adapter.is_dir():
        return {}
    return file_stamps(file for file in adapter.iterdir() if file.is_file())
