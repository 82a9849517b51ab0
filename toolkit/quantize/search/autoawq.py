"""AutoAWQ's own search, as one strategy. The only module that imports awq, which is archived.

Its classes are imported so that it works: torchvision mended first, no farewell message at each start.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from toolkit.compat import patch_torchvision
from toolkit.formats.packing import dequantize
from toolkit.quantize.search.clips import best_clip
from toolkit.quantize.search.gram import group_moments
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.search.scales import weight_means
from toolkit.quantize.search.strategy import LayerTask, Searched, SearchSettings, linear
from toolkit.quantize.stream.passing import LayerStream

patch_torchvision()
# recorded, not filtered: something in the import chain puts the default filters back
with warnings.catch_warnings(record=True):
    from awq.models.qwen2vl import Qwen2VLAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

__all__ = ["AwqQuantizer", "Qwen2VLAwqQuantizer"]


class Qwen2VLAwqQuantizer(AwqQuantizer):
    """AutoAWQ's search for a layer, on the samples of a stream.

    AutoAWQ's own loop chooses the scales. What is AutoAWQ's: the grids of scales and clips and the losses that choose.
    What is ours: how inputs are captured (each sample alone, so no padding enters a mean or a loss), where they wait,
    float32 throughout, rounding against the fp16 scales the file holds, the clip's loss by second moments, and two
    mends:

    - AutoAWQ saves the weights it restores after each candidate with ``.cpu()``, which copies on a GPU but is the same
      memory on a CPU: the first candidate's scaling then stays in the weights. With duo scaling that candidate is not
      the identity and the layer is wrecked; see docs/awq-on-cpu.md.
    - its zero point is clamped without widening the range, which cuts off groups whose weights share one sign.
    """

    advances = False

    def __init__(self, stream: LayerStream, settings: SearchSettings, *, duo_scaling: bool = False) -> None:
        """Args: the samples, what holds for all layers, and AutoAWQ's grid: activations over weights."""
        self.stream = stream
        self.settings = settings
        self.units = settings.family.fused
        self.device = stream.device
        self._stand_in: torch.Tensor | None = None
        self._searched_input: torch.Tensor
        super().__init__(
            Qwen2VLAWQForCausalLM,
            model=None,
            tokenizer=None,
            w_bit=settings.bits,
            group_size=settings.group_size,
            zero_point=True,
            version="GEMM",
            calib_data=None,
            split="",
            text_column="",
            duo_scaling=duo_scaling,
            apply_clip=settings.clip,
        )

    def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> tuple[Any, Any, Any]:
        """Return no layers and no inputs: both come one layer at a time."""
        return [], {}, None

    def search(self, task: LayerTask) -> Searched:
        """Search a copy of a layer with AutoAWQ's grids and losses; the samples stay where they are."""
        layer = copy.deepcopy(task.layer)
        feats = self._get_input_feat(layer, {})
        task.clock("forward")
        steps = [
            self._search_best_scale(layer, **config)
            for config in self.awq_model.get_layers_for_scaling(layer, feats, {})
            if not task.skip.intersection(names_of(layer, config))
        ]
        task.clock("scale")
        found = Searched()
        for previous, names, scales in steps:
            unit = next(unit for unit, members in self.units.items() if names[0] in members)
            applied = self._apply_scales(layer, previous, names, scales.to(self.device))
            found.scales[unit] = applied
            if isinstance(layer.get_submodule(previous), nn.Linear):
                found.rows[previous] = applied.unsqueeze(1)
            seen = feats[names[0]]
            seen.div_(applied.to(seen.device))
        self._round(layer, feats, task.skip, found)
        task.clock("clip")
        weights = {f"{name}.weight" for names in self.units.values() for name in names}
        found.others = {name: value for name, value in layer.state_dict().items() if name not in weights}
        return found

    def _round(self, layer: nn.Module, feats: dict[str, torch.Tensor], skip: frozenset[str], found: Searched) -> None:
        """Clip and round the linears of a layer that is scaled."""
        for unit, names in self.units.items():
            if names[0] in skip:
                continue
            found.scales.setdefault(unit, torch.ones(1, device=self.device))
            for name in names:
                weight = linear(layer, name).weight
                # AutoAWQ clips neither q nor k, whose product is attended with
                if self.apply_clip and not name.endswith(("q_proj", "k_proj")):
                    bound = self._compute_best_clip(weight, feats[name])
                    weight = weight.reshape(*bound.shape[:2], -1).clamp(-bound, bound).reshape(weight.shape)
                found.linears[name] = round_to_grid(weight, self.group_size, self.w_bit)

    def _get_input_feat(self, layer: nn.Module, named_linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Return every linear's input [1, T, K]; q, k, v share one tensor, and so do gate and up."""
        feats: dict[str, list[torch.Tensor]] = {unit: [] for unit in self.units}

        def take(seen: dict[str, torch.Tensor], _: slice) -> None:
            for unit, x in seen.items():
                feats[unit].append(x.to(self.stream.store, copy=True))

        self.stream.peek(layer, take)
        joined = {unit: torch.cat(parts).unsqueeze(0) for unit, parts in feats.items()}
        return {name: joined[unit] for unit, names in self.units.items() for name in names}

    @torch.no_grad()
    def _module_forward(self, x: torch.Tensor, module: nn.Module, module_kwargs: dict[str, Any]) -> torch.Tensor:
        """Run the joined inputs [1, T, K] through a module of the layer, in micro-batches that back off.

        Attention runs over whole samples, since tokens see only their own chat; anything else over tokens as they come.
        """
        if x is self._stand_in:
            x = self._searched_input
        outputs: list[torch.Tensor] = []
        done, first = 0, 0
        while done < x.shape[1]:
            alone, part = None, None
            with contextlib.suppress(torch.OutOfMemoryError):
                if hasattr(module, "q_proj"):
                    batch = self.stream.calibration.batch(first, self.stream.chunk_tokens)
                    alone = batch.stop - batch.start if len(batch.lengths) == 1 else None
                    arguments = self.stream.calibration.inputs(batch, self.device)
                    arguments["hidden_states"] = x[:, batch.start : batch.stop].to(self.device)
                    part = module(**arguments)[0].to(self.stream.store)
                    first += len(batch.lengths)
                else:
                    part = module(x[:, done : done + self.stream.chunk_tokens].to(self.device)).to(self.stream.store)
            if part is None:
                self.stream.back_off(alone)
                continue
            outputs.append(part)
            done += part.shape[1]
        return torch.cat(outputs, dim=1)

    def pseudo_quantize_tensor(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round to the grid the file will hold and back. Shapes as AutoAWQ's; any leading dims are kept."""
        columns = self.group_size if self.group_size > 0 else w.shape[-1]
        rounded = round_to_grid(w.reshape(-1, columns), -1, self.w_bit)
        rows = w.shape[0]
        return (
            dequantize(rounded, torch.float32).reshape(w.shape).to(w.dtype),
            rounded.scales.view(rows, -1),
            rounded.zeros.view(rows, -1),
        )

    @torch.no_grad()
    def _search_best_scale(
        self,
        module: nn.Module,
        prev_op: nn.Module,
        layers: Sequence[nn.Linear],
        inp: torch.Tensor,
        module2inspect: nn.Module | None = None,
        kwargs: Any = None,
    ) -> tuple[str, tuple[str, ...], torch.Tensor]:
        """Find the scales of the linears that share an input: AutoAWQ's grid and loss, inputs left where they wait.

        Its own version moves the whole input to the device, and takes no group size of -1. ``kwargs`` are not needed:
        samples bring their own. Returns names of the previous operation and of the linears, and the scales [K].
        """
        inspected = layers[0] if module2inspect is None else module2inspect
        w_mean = weight_means(torch.cat([layer.weight for layer in layers]), self.group_size)
        x_sum = torch.zeros(inp.shape[-1], device=self.device)
        for chunk in inp.split(self.stream.chunk_tokens, dim=1):
            x_sum += chunk.to(self.device).abs().sum((0, 1))
        x_mean = x_sum / (inp.shape[0] * inp.shape[1])
        self._searched_input = inp
        # AutoAWQ's loop asks its input only for the device to work on, and hands it to _module_forward
        self._stand_in = torch.empty(0, device=self.device)
        true = self._module_forward(inp, inspected, {})
        scales = self._compute_best_scale(self._stand_in, w_mean, x_mean, inspected, layers, true, {})
        names = {id(part): name for name, part in module.named_modules()}
        return names[id(prev_op)], tuple(names[id(layer)] for layer in layers), scales

    def _compute_best_scale(
        self, x: torch.Tensor, w_mean: torch.Tensor, x_mean: torch.Tensor, module2inspect: nn.Module, *args: Any
    ) -> torch.Tensor:
        """AutoAWQ's grid, on weights it can really restore: see the class."""
        with _copied_state(module2inspect):
            scales: torch.Tensor = super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args)
        return scales

    @torch.no_grad()
    def _compute_best_clip(self, w: torch.Tensor, input_feat: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """AutoAWQ's clip search by second moments: its grid and loss, over all tokens instead of some 512."""
        tokens = input_feat.reshape(-1, input_feat.shape[-1])
        moments: torch.Tensor | None = None
        for chunk in tokens.split(self.stream.chunk_tokens):
            part = group_moments(chunk.to(self.device), self.group_size) * (chunk.shape[0] / tokens.shape[0])
            moments = part if moments is None else moments.add_(part)
        assert moments is not None
        return best_clip(w, moments, self.w_bit)

    def _apply_scales(
        self, layer: nn.Module, previous: str, names: Sequence[str], scales: torch.Tensor
    ) -> torch.Tensor:
        """Divide the previous operation's output by the scales [K] and multiply the linears' inputs with them.

        A norm's weight is saved in a narrow dtype: what its rounding loses is given back to the linears, so the product
        stays exact. Returns the scales that the inputs were really divided by.
        """
        before: Any = layer.get_submodule(previous)
        if isinstance(before, nn.Linear):
            before.weight.data[-scales.numel() :].div_(scales.view(-1, 1))
            if before.bias is not None:
                before.bias.data[-scales.numel() :].div_(scales)
        else:
            old = before.weight.data
            new = (old / scales).to(self.settings.norm_dtype).float()
            scales = torch.where(new != 0, old / new, scales)
            before.weight.data = new
        for name in names:
            linear(layer, name).weight.data.mul_(scales.view(1, -1))
        return scales


def names_of(layer: nn.Module, config: dict[str, Any]) -> set[str]:
    """Return the local names of the modules that one of AutoAWQ's scaling steps touches."""
    touched = {id(module) for module in (*config["layers"], config["prev_op"])}
    return {name for name, module in layer.named_modules() if id(module) in touched}


@contextlib.contextmanager
def _copied_state(module: nn.Module) -> Iterator[None]:
    """Make ``module.state_dict()`` return copies inside the block, whatever device the module is on."""
    original = module.state_dict

    def copied(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in original(*args, **kwargs).items()}

    module.state_dict = copied  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del module.state_dict
