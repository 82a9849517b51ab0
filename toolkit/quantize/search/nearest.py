"""Rounding to nearest: no scales, no clips, nothing searched. What the others are held against."""

from __future__ import annotations

import torch

from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.strategy import LayerTask, Searched, SearchSettings, linear

__all__ = ["NearestRounding"]


class NearestRounding:
    """Rounds every linear to nearest."""

    advances = False

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings

    def search(self, task: LayerTask) -> Searched:
        """Round a layer's linears."""
        found = Searched()
        for unit, names in self.settings.family.fused.items():
            if names[0] not in task.skip:
                weights = {name: linear(task.layer, name).weight for name in names}
                found.scales[unit] = torch.ones(1, device=weights[names[0]].device)
                for name, weight in weights.items():
                    found.linears[name] = round_to_grid(weight, self.settings.group_size, self.settings.bits)
        return found
