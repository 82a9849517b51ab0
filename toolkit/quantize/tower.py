"""The vision tower's share of a quantization: its stages, block by block, each written as soon as it is done.

In the journal a stage is a layer behind the decoder's: block i of a model with n decoder layers is number n + i, the
merger the last. Which linears are packed follows from shapes alone: where the group size divides the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.left_out import tower_packs
from toolkit.checkpoint.values import in_16_bits
from toolkit.quantize.parts import write_layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe
    from toolkit.quantize.search.tower import StageSearched
    from toolkit.quantize.stream.passing import LayerStream
    from toolkit.quantize.stream.states import Held
    from toolkit.quantize.stream.tower import Stage, TowerStream

__all__ = ["TowerWork", "in_a_stage", "packed_linears", "stage_name", "stage_number", "stage_numbers"]

#: Is given a stage's number, its error, seconds by step.
Finished = Callable[[int, float, dict[str, float]], None]


def packed_linears(checkpoint: Checkpoint, group_size: int) -> frozenset[str]:
    """Return the tower's linears that are packed at this group size, by their names behind `Names.visual`."""
    modules = checkpoint.family.tower.modules(checkpoint.vision)
    return frozenset(name for name, (n, k) in modules.items() if tower_packs(k, n, group_size) and _is_staged(name))


def _is_staged(name: str) -> bool:
    return name.startswith(("blocks.", "merger."))


def in_a_stage(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor belongs to a stage of the tower: to a block or the merger."""
    return name.startswith(checkpoint.visual_prefix) and _is_staged(name.removeprefix(checkpoint.visual_prefix))


def stage_number(checkpoint: Checkpoint) -> range:
    """Return the journal's numbers of the tower's stages."""
    return range(checkpoint.num_layers, checkpoint.num_layers + checkpoint.vision.depth + 1)


def stage_numbers(checkpoint: Checkpoint, recipe: Recipe) -> list[int]:
    """Return the journal's numbers of the tower's stages; none where it stays in 16 bits."""
    return list(stage_number(checkpoint)) if recipe.vision == "awq" else []


def stage_name(checkpoint: Checkpoint, index: int) -> str:
    """Return how a number of the journal is called: "layer 3", "vision block 0", "vision merger"."""
    block = index - checkpoint.num_layers
    if block < 0:
        return f"layer {index}"
    return f"vision block {block}" if block < checkpoint.vision.depth else "vision merger"


class TowerWork:
    """Searches stages of the vision tower, and passes the images through those before and between."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, directory: Path, device: torch.device) -> None:
        """Args: the source, what is asked, the journal's directory, where stages are worked on."""
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.directory = directory
        self.device = device

    def run(
        self,
        samples: Sequence[PreparedSample],
        wanted: Sequence[int],
        store: torch.device,
        on_note: Callable[[str], None],
        finished: Finished,
    ) -> None:
        """Search the stages ``wanted``, numbered from 0.

        Args:
            samples: model inputs, of which the images count.
            wanted: stages.
            store: where patches wait.
            on_note: told when memory backs off.
            finished: called for each stage.
        """
        import torch

        from toolkit.quantize.layer import Clock
        from toolkit.quantize.search.tower import TowerSearch
        from toolkit.quantize.stream.tower import TowerStream

        tower = TowerStream(self.checkpoint, self.device)
        stream = self._stream(store, on_note)
        stream.calibration, stream.held = tower.patches(samples, store)
        packed = packed_linears(self.checkpoint, self.recipe.group_size)
        with torch.no_grad():
            for index in range(max(wanted) + 1):
                clock, stage = Clock(self.device), tower.stages[index]
                module = tower.load(index)
                clock("load")
                stream.calibration.stage = stream.held.stage = index
                stream.units = {unit.name: unit.linears for unit in stage.units}
                if index not in wanted:
                    stream.skip(module)
                    tower.drop(index)
                    continue
                held = stream.hold(module)
                names = {name.removeprefix(stage.prefix) for name in packed if name.startswith(stage.prefix)}
                searched = TowerSearch(stream, self._settings(tower, stage), frozenset(names)).search(
                    module, stage.units, held.inputs
                )
                clock("search")
                error = self._error(stream, module, held, searched)
                clock("check")
                self._write(index, stage, searched, error)
                clock("write")
                tower.drop(index)
                finished(index, error, {**clock.seconds, "total": sum(clock.seconds.values())})

    def _stream(self, store: torch.device, on_note: Callable[[str], None]) -> LayerStream:
        from toolkit.quantize.search.gram import takes_bfloat16
        from toolkit.quantize.stream.passing import LayerStream

        vision = self.checkpoint.vision
        narrow = takes_bfloat16(self.device)
        return LayerStream({}, (vision.width, vision.inner), self.device, store, narrow=narrow, on_note=on_note)

    def _settings(self, tower: TowerStream, stage: Stage) -> Any:
        from toolkit.quantize.search.strategy import SearchSettings

        checkpoint, recipe = self.checkpoint, self.recipe
        norm = in_16_bits(checkpoint.get(f"{checkpoint.visual_prefix}{stage.prefix}{stage.norms[0]}.weight"))
        return SearchSettings(
            checkpoint.family, recipe.group_size, recipe.bits, norm.dtype, recipe.clip, recipe.rounding or "nearest"
        )

    def _error(self, stream: LayerStream, module: nn.Module, held: Held, searched: StageSearched) -> float:
        """Return the relative squared error of a stage's output on the held patches, as `LayerResult.error`.

        What a block adds to its input counts as the signal; of the merger, its whole output.
        """
        from toolkit.quantize.stream.tower import whole

        wrong = signal = 0.0
        inner: Any = whole(module)
        kept = {name: (m.weight.data, m.bias.data) for name in searched.effective if (m := inner.get_submodule(name))}
        batches = list(held.states.batches(stream.chunk_tokens))

        def output(arguments: dict[str, Any]) -> torch.Tensor:
            found: torch.Tensor = inner(arguments["hidden_states"]) if inner is not module else inner(**arguments)
            return found

        for batch in batches:
            arguments = held.states.inputs(batch, self.device)
            true = output(arguments)
            for name, weight in searched.effective.items():
                inner.get_submodule(name).weight.data, inner.get_submodule(name).bias.data = (
                    weight,
                    searched.biases[name],
                )
            wrong += (output(arguments) - true).double().pow(2).sum().item()
            for name, (weight, bias) in kept.items():
                changed = inner.get_submodule(name)
                changed.weight.data, changed.bias.data = weight, bias
            added = true if inner is not module else true - arguments["hidden_states"]
            signal += added.double().pow(2).sum().item()
        return wrong / max(signal, 1e-30)

    def _write(self, index: int, stage: Stage, searched: StageSearched, error: float) -> None:
        from toolkit.formats.packing import named, pack_as

        checkpoint, form = self.checkpoint, self.recipe.format
        prefix = checkpoint.visual_prefix + stage.prefix
        tensors: dict[str, torch.Tensor] = {}
        for name, values in searched.linears.items():
            tensors |= named(form, f"{prefix}{name}", pack_as(form, values))
        for name, tensor in searched.others.items():
            tensors[prefix + name] = in_16_bits(tensor.to(checkpoint.get(prefix + name).dtype))
        number = checkpoint.num_layers + index
        record = {"layer": number, "stage": prefix[:-1], "relative_error": error, "choices": searched.choices}
        write_layer(self.directory, number, {name: t.cpu() for name, t in tensors.items()}, record)
