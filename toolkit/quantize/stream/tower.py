"""The vision tower, one block at a time: images become hidden states of patches, blocks are read and dropped.

A tower's stages are its blocks and its merger. Images of all samples are joined in one row of patches; attention keeps
them apart by the lengths of their segments, which the model itself says for each block (windows, frames, whole images).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.errors import ManifestError
from toolkit.quantize.stream.passing import held_samples
from toolkit.quantize.stream.shell import Patches, bare_model
from toolkit.quantize.stream.sizes import TOWER_PATCHES
from toolkit.quantize.stream.states import Batch, States

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.models.family import Unit

__all__ = ["Merger", "PatchStates", "Stage", "TowerStream", "stages", "whole"]


@dataclass(frozen=True)
class Stage:
    """A block or the merger: what precedes its names behind `Names.visual`, its linears, its norms."""

    prefix: str
    units: tuple[Unit, ...]
    norms: tuple[str, ...]


def stages(checkpoint: Checkpoint) -> list[Stage]:
    """Return a vision tower's stages in the order they run."""
    tower = checkpoint.family.tower
    blocks = [Stage(f"blocks.{i}.", tower.units, tuple(tower.norms)) for i in range(checkpoint.vision.depth)]
    return [*blocks, Stage("merger.", tower.merger_units, tower.merger_norm[:1])]


@dataclass
class PatchStates(States):
    """Images between two stages, in one row of patches.

    ``hidden``, ``rope`` and ``lengths`` as in `States`, of patches and images; ``vision`` is true everywhere.
    ``segments``: by stage and image, lengths of what attends to itself. ``stage``: the one that comes next.
    """

    segments: Sequence[Sequence[Sequence[int]]] = ()
    stage: int = 0

    @classmethod
    def of(cls, images: Sequence[PatchStates]) -> PatchStates:
        """Return one row of all images."""
        joined = States.join(images)
        segments = [[image.segments[stage][0] for image in images] for stage in range(len(images[0].segments))]
        return cls(joined.hidden, joined.rope, joined.lengths, joined.vision, segments=segments)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return a block's arguments for a micro-batch; ``hidden_states`` is [T, D] float32."""
        rope = tuple(table[..., batch.start : batch.stop, :] for table in self.rope)
        images = self.segments[self.stage][batch.first : batch.first + len(batch.lengths)]
        lengths = torch.tensor([0, *(length for image in images for length in image)])
        return {
            "hidden_states": self.hidden[0, batch.start : batch.stop].to(device),
            "position_embeddings": rope,
            "cu_seqlens": lengths.cumsum(0).to(device, torch.int32),
        }


class Merger(nn.Module):
    """A merger where a block is expected: it is shown the patches, and hands them on as they are."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its name inside the merger."""
        return self.merger.get_submodule(target)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[T, D] -> the same."""
        self.merger(hidden_states)
        return hidden_states.clone()


def whole(module: nn.Module) -> nn.Module:
    """Return a block as it is, and the merger that a `Merger` shows the patches."""
    return module.merger if isinstance(module, Merger) else module


class _Seen(nn.Module):
    """Stands where a block would: keeps what it is called with, and hands the patches on."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[T, D] -> the same."""
        self.arguments = {"hidden_states": hidden_states, **kwargs}
        return hidden_states


class TowerStream:
    """The vision tower of a checkpoint, of which only the patch embedding and one stage are in memory."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Args: the source, and where stages go (as float32)."""
        self.checkpoint = checkpoint
        self.device = device
        self.stages = stages(checkpoint)
        model, _ = bare_model(checkpoint)
        self._visual = model.model.visual
        self._blocks = list(self._visual.blocks)
        self._merger = self._visual.merger
        embedding = self._visual.patch_embed.proj
        bias = None if embedding.bias is None else self._get("patch_embed.proj.bias")
        self._visual.patch_embed = Patches(self._get("patch_embed.proj.weight"), bias)
        self._visual.rotary_pos_emb.to(device)
        self._visual.blocks = nn.ModuleList([_Seen() for _ in self._blocks])
        self._visual.merger = nn.Identity()

    def _get(self, name: str) -> torch.Tensor:
        return self.checkpoint.get(self.checkpoint.visual_prefix + name).to(self.device, torch.float32)

    @torch.no_grad()
    def patches(
        self,
        samples: Sequence[PreparedSample],
        store: torch.device,
        limit: int = TOWER_PATCHES,
        on_image: Callable[[int], None] | None = None,
    ) -> tuple[PatchStates, PatchStates]:
        """Bring the samples' images before the first block; returns those to search on, and those to check with.

        Args:
            samples: model inputs.
            store: where hidden states are to wait.
            limit: patches of all images at most, unless the first alone has more; beyond, images are left out evenly.
            on_image: called with the number of images done.

        Raises:
            ManifestError: no sample has an image or video.
        """
        images = [
            (pixels, grid)
            for sample in samples
            for name, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
            if name in sample.inputs
            for pixels, grid in zip(
                sample.inputs[name].split(sample.inputs[grids].prod(1).tolist()), sample.inputs[grids], strict=True
            )
        ]
        if not images:
            raise ManifestError(
                "--vision awq: no calibration sample has an image or video, and the vision tower is quantized by what "
                "it sees. Calibrate with images, or leave the tower in 16 bits"
            )
        total = sum(len(pixels) for pixels, _ in images)
        count = max(1, min(len(images), len(images) * limit // total))
        chosen = [images[i * len(images) // count] for i in range(count)]
        found = []
        for pixels, grid in chosen:
            found.append(self._embedded(pixels, grid, store))
            if on_image is not None:
                on_image(len(found))
        held = held_samples([image.lengths[0] for image in found])
        rest = [image for i, image in enumerate(found) if i not in held] or found
        return PatchStates.of(rest), PatchStates.of([found[i] for i in sorted(held)])

    def _embedded(self, pixels: torch.Tensor, grid: torch.Tensor, store: torch.device) -> PatchStates:
        """Return one image's patches as the first block is given them."""
        self._visual(pixels.to(self.device, torch.float32), grid_thw=grid.to(self.device).unsqueeze(0))
        seen = [block.arguments for block in self._visual.blocks]
        bounds = [arguments["cu_seqlens"].tolist() for arguments in seen]
        segments = [[[b - a for a, b in itertools.pairwise(ends)]] for ends in bounds]
        hidden = seen[0]["hidden_states"].unsqueeze(0)
        vision = torch.ones(hidden.shape[1], dtype=torch.bool, device=self.device)
        lengths = [hidden.shape[1]]
        return PatchStates(
            hidden.to(store),
            seen[0]["position_embeddings"],
            lengths,
            vision,
            segments=[*segments, [[lengths[0]]]],
        )

    def load(self, index: int) -> nn.Module:
        """Return stage ``index`` in float32 on the device."""
        stage = self.stages[index]
        module = self._merger if index == len(self._blocks) else self._blocks[index]
        module.load_state_dict({name: self._get(stage.prefix + name) for name in module.state_dict()}, assign=True)
        module.requires_grad_(False).eval()
        return Merger(module) if module is self._merger else module

    def drop(self, index: int) -> None:
        """Let go of a stage's weights."""
        (self._merger if index == len(self._blocks) else self._blocks[index]).to("meta")
