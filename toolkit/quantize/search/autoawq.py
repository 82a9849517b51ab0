"""AutoAWQ's quantizer on Qwen2-VL: layers streamed, samples of any length without padding, memory that backs off."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.errors import ResourceError
from toolkit.quantize.plan import CHUNK_TOKENS, HELD_TOKENS
from toolkit.quantize.search.awq_classes import AwqQuantizer
from toolkit.quantize.search.grid import (
    Moments,
    best_clip,
    dequantize,
    group_moments,
    round_to_grid,
    takes_bfloat16,
    weight_means,
)
from toolkit.quantize.search.mixed import FUSED
from toolkit.quantize.search.moments import Held, LayerSearch, Searched, linear
from toolkit.quantize.stream import States, StreamedLayers, embed

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample

__all__ = ["LayerResult", "Qwen2VLAwqQuantizer"]

#: Below this many tokens at once the trouble is not the chunk.
_MIN_CHUNK_TOKENS = 64
#: Tokens kept out of the search to check it: at most this share of all.
_HELD_SHARE = 0.1


@dataclass
class LayerResult:
    """One quantized decoder layer.

    ``found``: what the search decided. ``error``: relative squared error of the layer's output on the held tokens,
    where what the layer adds to its input counts as the signal: |y_q - y|^2 / |y - x|^2. ``errors``: the same by way of
    quantizing ("rtn", "autoawq", "moments"), for the whole layer and for each unit alone; filled for a report.
    """

    index: int
    found: Searched
    error: float
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Qwen2VLAwqQuantizer(AwqQuantizer):
    """AutoAWQ's quantizer, fed by :mod:`toolkit.calibration.inputs` and one streamed layer at a time.

    With ``search="moments"`` a layer is searched by :class:`toolkit.quantize.search.moments.LayerSearch`. With
    ``"autoawq"``
    AutoAWQ's own loop chooses the scales, on the same tokens. What is AutoAWQ's then: the grids of scales and clips and
    the losses that choose. What is ours: how inputs are captured (each sample alone, so no padding enters a mean or a
    loss), where they wait, float32 throughout, rounding against the fp16 scales the file holds, the clip's loss by
    second moments, and two mends:

    - AutoAWQ saves the weights it restores after each candidate with ``.cpu()``, which copies on a GPU but is the same
      memory on a CPU: the first candidate's scaling then stays in the weights. With duo scaling that candidate is not
      the identity and the layer is wrecked; see docs/awq-on-cpu.md.
    - its zero point is clamped without widening the range, which cuts off groups whose weights share one sign.
    """

    def __init__(
        self,
        *args: Any,
        samples: Sequence[PreparedSample],
        layers: StreamedLayers,
        device: torch.device,
        store: torch.device,
        norm_dtype: torch.dtype,
        on_layer: Callable[[LayerResult], None],
        on_note: Callable[[str], None],
        on_capture: Callable[[int], None] | None = None,
        on_forward: Callable[[int], None] | None = None,
        search: str = "moments",
        rounding: str = "nearest",
        wanted: Sequence[int] | None = None,
        skip: Callable[[int], frozenset[str]] = lambda index: frozenset(),
        balance: Sequence[float] | None = None,
        report: bool = False,
        **kwargs: Any,
    ) -> None:
        """Args beyond AutoAWQ's.

        samples: model inputs from :func:`toolkit.calibration.inputs.prepare`.
        layers: the source's decoder layers.
        device: where layers are searched. store: where hidden states wait (the device, or the CPU).
        norm_dtype: dtype that norm weights are saved in; scales are corrected for the rounding it brings.
        on_layer: called with each finished layer. on_note: told when memory backs off.
        on_capture: called after each sample's pass through the vision tower.
        on_forward: called with each layer that samples only passed through.
        search: ``moments`` or ``autoawq``. rounding: ``nearest`` or ``compensated`` (moments only).
        wanted: layers to search (None: all); samples pass through the others.
        skip: local names of a layer's linears that stay in 16 bits.
        balance: of each layer, what a vision token counts beside a text token.
        report: fill in ``errors``, which takes AutoAWQ's search and ours for each layer.
        """
        self.samples = samples
        self.layers = layers
        self.device = device
        self.store = store
        self.norm_dtype = norm_dtype
        self.on_layer = on_layer
        self.on_note = on_note
        self.on_capture = on_capture
        self.on_forward = on_forward
        self.search = search
        self.rounding = rounding
        self.wanted = frozenset(range(len(layers)) if wanted is None else wanted)
        self.skip = skip
        self.balance = balance
        self.report = report
        self.chunk_tokens = CHUNK_TOKENS
        self._stand_in: torch.Tensor | None = None
        self._searched_input: torch.Tensor
        #: The samples that are searched on, and those that check the search, between two layers.
        self.inps: States
        self.held: States
        super().__init__(*args, **kwargs)

    # --- inputs -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> tuple[Any, Any, Any]:
        """Run every sample up to the first decoder layer, then let go of the vision tower; set some samples apart.

        Returns what AutoAWQ's does, in our form: layers, no kwargs, the calibration's states.
        """
        states = embed(self.model, self.samples, self.device, self.store, self.on_capture)
        self.awq_model.model = None
        held = _held_samples([state.lengths[0] for state in states])
        self.held = States.join([states[i] for i in held])
        # a single sample has to do for both
        rest = [state for i, state in enumerate(states) if i not in held] or states
        return self.layers, {}, States.join(rest)

    def _pass(
        self, layer: nn.Module, states: States, take: Callable[[dict[str, torch.Tensor], slice], None] | None = None
    ) -> torch.Tensor:
        """Run all samples through a layer in micro-batches; ``states.hidden`` becomes, and is returned as, its output.

        ``take`` is given each unit's input [n, K] and which tokens they are; it may overwrite them. Samples that are
        searched on run in bfloat16 where that is fast, as the served model does, but for what is added up between
        layers; those that check the search, in float32.
        """
        narrow = takes_bfloat16(self.device) and states is self.inps
        seen: dict[str, torch.Tensor] = {}
        handles = [
            layer.get_submodule(names[0]).register_forward_pre_hook(
                lambda _, args, unit=unit: seen.__setitem__(unit, args[0][0])
            )
            for unit, names in FUSED.items()
            if take is not None
        ]
        first = 0
        try:
            while first < len(states.lengths):
                batch = states.batch(first, self.chunk_tokens)
                output = None
                with (
                    contextlib.suppress(torch.OutOfMemoryError),
                    torch.autocast("cuda", torch.bfloat16, enabled=narrow),
                ):
                    output = layer(**states.inputs(batch, self.device))
                if output is None:
                    seen.clear()
                    self._back_off(batch.stop - batch.start if len(batch.lengths) == 1 else None)
                    continue
                tokens = slice(batch.start, batch.stop)
                states.hidden[:, tokens] = output.to(states.hidden.device)
                del output
                if take is not None:
                    take(seen, tokens)
                    seen.clear()
                first += len(batch.lengths)
        finally:
            for handle in handles:
                handle.remove()
        return states.hidden

    def _back_off(self, alone: int | None = None) -> None:
        """Halve the micro-batch, or say why that can't help: ``alone`` is the length of a sample on its own.

        To be called when the error is gone, for as long as it lives it holds on to what the failed pass allocated.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if alone is not None:
            raise ResourceError(
                f"out of memory on {self.device}: one sample of {alone} tokens does not fit. Leave such samples "
                f"out with --max-tokens {self._tokens_that_fit(alone)}, use smaller pictures with --max-pixels, "
                "or free memory"
            )
        if self.chunk_tokens // 2 < _MIN_CHUNK_TOKENS:
            raise ResourceError(
                f"out of memory on {self.device} even with {self.chunk_tokens} tokens at a time: "
                "free memory on the device, or choose a larger one (`qvl quantize --dry-run` says what is needed)"
            )
        self.chunk_tokens //= 2
        self.on_note(f"{self.device} is out of memory: going on with {self.chunk_tokens} tokens at a time")

    def _make_room(self) -> bool:
        """Let the hidden states wait in host memory; returns False when they do already."""
        if self.inps.hidden.device.type == "cpu":
            return False
        self.inps.hidden = self.inps.hidden.cpu()
        torch.cuda.empty_cache()
        self.on_note(f"{self.device} is out of memory: from here on hidden states wait in host memory")
        return True

    def _tokens_that_fit(self, alone: int) -> int:
        """Guess how long a sample may be, from the memory that is free and the widest tensors that it needs."""
        if self.device.type != "cuda":
            return alone // 2
        free, _ = torch.cuda.mem_get_info(self.device)
        hidden, inner = self.layers.widths
        return int(min(free // (4 * (4 * inner + 8 * hidden)), alone // 2))

    # --- the loop -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(self) -> None:
        """Search and round the wanted layers, one after the other; each goes to ``on_layer`` when done."""
        self.model = None  # vision tower and embeddings have done their work
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for index in range(max(self.wanted, default=-1) + 1):
                seconds: dict[str, float] = {}
                clock = _Clock(seconds, self.device)
                layer = self.layers.load(index)
                clock("load")
                if index not in self.wanted:
                    self._pass(layer, self.inps)
                    self._pass(layer, self.held)
                    if self.on_forward is not None:
                        self.on_forward(index)
                    continue
                result = self._quantize_layer(index, layer, clock)
                result.seconds = {**seconds, "total": sum(seconds.values())}
                self.on_layer(result)
        finally:
            self.layers.close()

    def _quantize_layer(self, index: int, layer: nn.Module, clock: _Clock) -> LayerResult:
        held = self._hold(layer)
        ways: dict[str, Searched] = {}
        if self.report:
            ways["rtn"] = self._nearest(index, layer)
        if self.search == "autoawq" or self.report:
            ways["autoawq"] = self._search_autoawq(index, copy.deepcopy(layer), clock)
        if self.search == "moments" or self.report:
            ways["moments"] = self._search_moments(index, layer, held, clock)
        else:
            self._pass(layer, self.inps)
        found = ways[self.search]
        errors: dict[str, dict[str, float]] = {}
        if self.report:
            errors = {way: self._errors(layer, searched, held) for way, searched in ways.items()}
        units = [unit for unit in FUSED if unit in found.scales]
        error = self._output_error(layer, found, units, held) if not self.report else errors[self.search]["layer"]
        clock("check")
        self.held.hidden = held.output
        return LayerResult(index, found, error, errors)

    def _hold(self, layer: nn.Module) -> Held:
        """Run the held samples through a layer, keeping what it is given and what it makes of it."""
        inputs: dict[str, list[torch.Tensor]] = {unit: [] for unit in FUSED}

        def take(seen: dict[str, torch.Tensor], _: slice) -> None:
            for unit, x in seen.items():
                inputs[unit].append(x.clone())

        before = copy.copy(self.held)
        before.hidden = self.held.hidden.clone()
        output = self._pass(layer, self.held, take)
        return Held(before, output, {unit: torch.cat(parts) for unit, parts in inputs.items()})

    def _search_moments(self, index: int, layer: nn.Module, held: Held, clock: _Clock) -> Searched:
        """Gather moments in one pass over the samples and search with them."""
        from toolkit.quantize.search.sensitivity import token_weights

        narrow = takes_bfloat16(self.device)
        moments = {
            unit: Moments(linear(layer, names[0]).in_features, self.device, narrow=narrow)
            for unit, names in FUSED.items()
        }
        weights = None if self.balance is None else token_weights(self.inps.vision, self.balance[index])

        def take(seen: dict[str, torch.Tensor], tokens: slice) -> None:
            for unit, x in seen.items():
                moments[unit].add(x, None if weights is None else weights[tokens])

        self._pass(layer, self.inps, take)
        for found in moments.values():
            found.finish()
        clock("forward")
        return LayerSearch(
            layer,
            moments,
            held,
            group_size=self.group_size,
            bits=self.w_bit,
            norm_dtype=self.norm_dtype,
            clip=self.apply_clip,
            rounding=self.rounding,
            skip=self.skip(index),
            clock=clock,
            make_room=self._make_room,
        ).run()

    # --- errors -------------------------------------------------------------------------------------------------

    def _nearest(self, index: int, layer: nn.Module) -> Searched:
        """Round to nearest, nothing else."""
        found = Searched({}, {})
        for unit, names in FUSED.items():
            if names[0] not in self.skip(index):
                found.scales[unit] = torch.ones(1, device=self.device)
                for name in names:
                    found.linears[name] = round_to_grid(linear(layer, name).weight, self.group_size, self.w_bit)
        return found

    def _errors(self, layer: nn.Module, found: Searched, held: Held) -> dict[str, float]:
        """Return the error of the layer with all its units quantized ("layer"), and with each alone, by unit."""
        units = [unit for unit in FUSED if unit in found.scales]
        alone = {unit: self._output_error(layer, found, [unit], held) for unit in units}
        return {"layer": self._output_error(layer, found, units, held), **alone}

    def _output_error(self, layer: nn.Module, found: Searched, units: Sequence[str], held: Held) -> float:
        """Relative squared error of the layer's output with these units quantized; see :class:`LayerResult`."""
        names = [(unit, name) for unit in units for name in FUSED[unit]]
        kept = {name: linear(layer, name).weight.data for _, name in names}
        for unit, name in names:
            linear(layer, name).weight.data = found.effective(unit, name)
        wrong = signal = 0.0
        for batch in held.states.batches(self.chunk_tokens):
            arguments = held.states.inputs(batch, self.device)
            true = held.output[:, batch.start : batch.stop].to(self.device)
            wrong += (layer(**arguments) - true).double().pow(2).sum().item()
            signal += (true - arguments["hidden_states"]).double().pow(2).sum().item()
        for name, weight in kept.items():
            linear(layer, name).weight.data = weight
        return wrong / max(signal, 1e-30)

    # --- AutoAWQ's search ---------------------------------------------------------------------------------------

    def _search_autoawq(self, index: int, layer: nn.Module, clock: _Clock) -> Searched:
        """Search a layer, which is changed by it, with AutoAWQ's grids and losses; the samples stay where they are."""
        feats = self._get_input_feat(layer, {})
        clock("forward")
        left = self.skip(index)
        steps = [
            self._search_best_scale(layer, **config)
            for config in self.awq_model.get_layers_for_scaling(layer, feats, {})
            if not left.intersection(names_of(layer, config))
        ]
        clock("scale")
        found = Searched({}, {})
        for previous, names, scales in steps:
            unit = next(unit for unit, members in FUSED.items() if names[0] in members)
            applied = self._apply_scales(layer, previous, names, scales.to(self.device))
            found.scales[unit] = applied
            if isinstance(layer.get_submodule(previous), nn.Linear):
                found.rows[previous] = applied.unsqueeze(1)
            seen = feats[names[0]]
            seen.div_(applied.to(seen.device))
        for unit, names in FUSED.items():
            if names[0] in left:
                continue
            found.scales.setdefault(unit, torch.ones(1, device=self.device))
            for name in names:
                weight = linear(layer, name).weight
                # AutoAWQ clips neither q nor k, whose product is attended with
                if self.apply_clip and not name.endswith(("q_proj", "k_proj")):
                    bound = self._compute_best_clip(weight, feats[name])
                    weight = weight.reshape(*bound.shape[:2], -1).clamp(-bound, bound).reshape(weight.shape)
                found.linears[name] = round_to_grid(weight, self.group_size, self.w_bit)
        clock("clip")
        weights = {f"{name}.weight" for names in FUSED.values() for name in names}
        found.others = {name: value for name, value in layer.state_dict().items() if name not in weights}
        return found

    def _get_input_feat(self, layer: nn.Module, named_linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Return every linear's input [1, T, K]; q, k, v share one tensor, and so do gate and up."""
        feats: dict[str, list[torch.Tensor]] = {unit: [] for unit in FUSED}

        def take(seen: dict[str, torch.Tensor], _: slice) -> None:
            for unit, x in seen.items():
                feats[unit].append(x.to(self.store, copy=True))

        before = copy.copy(self.inps)
        before.hidden = before.hidden.clone()
        self._pass(layer, before, take)
        joined = {unit: torch.cat(parts).unsqueeze(0) for unit, parts in feats.items()}
        return {name: joined[unit] for unit, names in FUSED.items() for name in names}

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
                    batch = self.inps.batch(first, self.chunk_tokens)
                    alone = batch.stop - batch.start if len(batch.lengths) == 1 else None
                    arguments = self.inps.inputs(batch, self.device)
                    arguments["hidden_states"] = x[:, batch.start : batch.stop].to(self.device)
                    part = module(**arguments)[0].to(self.store)
                    first += len(batch.lengths)
                else:
                    part = module(x[:, done : done + self.chunk_tokens].to(self.device)).to(self.store)
            if part is None:
                self._back_off(alone)
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
            dequantize(rounded).reshape(w.shape).to(w.dtype),
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
        for chunk in inp.split(self.chunk_tokens, dim=1):
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
        for chunk in tokens.split(self.chunk_tokens):
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
            new = (old / scales).to(self.norm_dtype).float()
            scales = torch.where(new != 0, old / new, scales)
            before.weight.data = new
        for name in names:
            linear(layer, name).weight.data.mul_(scales.view(1, -1))
        return scales


def names_of(layer: nn.Module, config: dict[str, Any]) -> set[str]:
    """Return the local names of the modules that one of AutoAWQ's scaling steps touches."""
    touched = {id(module) for module in (*config["layers"], config["prev_op"])}
    return {name for name, module in layer.named_modules() if id(module) in touched}


def _held_samples(lengths: Sequence[int]) -> frozenset[int]:
    """Choose the samples that check the search: spread over the whole, one at least, few against the rest."""
    budget = min(HELD_TOKENS, int(sum(lengths) * _HELD_SHARE))
    count = max(1, round(budget * len(lengths) / sum(lengths)))
    return frozenset(i * len(lengths) // count for i in range(count))


class _Clock:
    """Adds up seconds by step; waits for the device so that a step is charged its own work."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __call__(self, step: str) -> None:
        now = self._now()
        self._seconds[step] = self._seconds.get(step, 0.0) + now - self._last
        self._last = now


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
