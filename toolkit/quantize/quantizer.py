"""AutoAWQ's quantizer on Qwen2-VL: layers streamed, samples of any length without padding, memory that backs off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.checkpoint import LINEARS
from toolkit.errors import ResourceError
from toolkit.quantize._awq import AwqQuantizer
from toolkit.quantize.model import StreamedLayers
from toolkit.quantize.search import best_clip, dequantize, group_moments, round_to_grid

if TYPE_CHECKING:
    from toolkit.calibration import PreparedSample
    from toolkit.formats.packing import QuantizedLinear

__all__ = ["LayerResult", "Qwen2VLAwqQuantizer"]

#: Tokens that go through a module at once, to start with; halved when the device runs out of memory.
_CHUNK_TOKENS = 16384
#: Below this many tokens at once the trouble is not the chunk.
_MIN_CHUNK_TOKENS = 64


@dataclass
class LayerResult:
    """One quantized decoder layer.

    ``linears``: by local module name.
    ``others``: tensors of the layer that changed without being quantized (norms, biases), float32, by local name.
    ``error``: relative squared error of the layer's output on the calibration tokens, against float32, where what the
    layer adds to its input counts as the signal: |y_q - y|^2 / |y - x|^2.
    """

    index: int
    linears: dict[str, QuantizedLinear]
    others: dict[str, torch.Tensor]
    error: float
    seconds: dict[str, float] = field(default_factory=dict)


class Qwen2VLAwqQuantizer(AwqQuantizer):  # type: ignore[misc]
    """AutoAWQ's search, fed by :mod:`toolkit.calibration` and one streamed layer at a time.

    What is AutoAWQ's: the grids of scales and clips and the losses that choose. What is ours: how inputs are captured
    (each sample alone, so no padding enters a mean or a loss), where they wait, float32 throughout, rounding against
    the fp16 scales the file holds, the clip's loss by second moments, and two mends:

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
        **kwargs: Any,
    ) -> None:
        """Args beyond AutoAWQ's.

        samples: model inputs from :func:`toolkit.calibration.prepare`.
        layers: the source's decoder layers.
        device: where layers are searched. store: where a layer's inputs wait (the device, or the CPU).
        norm_dtype: dtype that norm weights are saved in; scales are corrected for the rounding it brings.
        on_layer: called with each finished layer. on_note: told when memory backs off.
        on_capture: called after each sample's pass through the vision tower.
        """
        self.samples = samples
        self.layers = layers
        self.device = device
        self.store = store
        self.norm_dtype = norm_dtype
        self.on_layer = on_layer
        self.on_note = on_note
        self.on_capture = on_capture
        self.chunk_tokens = _CHUNK_TOKENS
        self._stand_in: torch.Tensor | None = None
        self._searched_input: torch.Tensor
        #: Per sample: hidden states [1, T, D] before and after the current layer, and what else the layer takes.
        self.inps: list[torch.Tensor]
        self.outputs: list[torch.Tensor]
        self.module_kwargs: list[dict[str, Any]]
        super().__init__(*args, **kwargs)

    # --- inputs -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> tuple[Any, Any, Any]:
        """Run every sample, alone, up to the first decoder layer; then let go of vision tower and embeddings.

        Returns what AutoAWQ's does, in our form: layers, per-sample kwargs, per-sample hidden states [1, T, D].
        """
        model: Any = self.model
        first = self.awq_model.get_model_layers(model)[0]
        captured: list[tuple[torch.Tensor, dict[str, Any]]] = []
        original = first.forward

        def catch(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            kept = {
                "position_embeddings": tuple(t.to(self.store) for t in kwargs["position_embeddings"]),
                "attention_mask": kwargs.get("attention_mask"),
            }
            captured.append((hidden_states.to(self.store), kept))
            return hidden_states

        first.forward = catch
        try:
            for sample in self.samples:
                inputs = {k: v.to(self.device) for k, v in sample.inputs.items()}
                # logits of the last token only: AutoAWQ's inputs are what is wanted, not the answer
                model(**inputs, use_cache=False, logits_to_keep=1)
                if self.on_capture is not None:
                    self.on_capture(len(captured))
        finally:
            first.forward = original
        self.awq_model.model = None
        return self.layers, [kwargs for _, kwargs in captured], [hidden for hidden, _ in captured]

    def _get_input_feat(self, layer: nn.Module, named_linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Run the samples through the layer; keep every linear's input [1, sum of T, K] and the layer's outputs.

        q, k, v share one tensor, and so do gate and up.
        """
        shared = {
            "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.o_proj": ("self_attn.o_proj",),
            "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj": ("mlp.down_proj",),
        }
        feats: dict[str, list[torch.Tensor]] = {name: [] for name in shared}
        handles = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: feats[name].append(args[0].detach().to(self.store))
            )
            for name in shared
        ]
        outputs = []
        try:
            for hidden, kwargs in zip(self.inps, self.module_kwargs, strict=True):
                outputs.append(self._sample_forward(layer, hidden, kwargs).to(self.store))
        finally:
            for handle in handles:
                handle.remove()
        self.outputs = outputs
        joined = {name: torch.cat(parts, dim=1) for name, parts in feats.items()}
        return {name: joined[source] for source, names in shared.items() for name in names if name in named_linears}

    def _sample_forward(self, module: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Run one sample [1, T, D] through a decoder layer or its attention, on the device."""
        cos, sin = (t.to(self.device) for t in kwargs["position_embeddings"])
        output = module(
            hidden_states=hidden.to(self.device),
            position_embeddings=(cos, sin),
            attention_mask=kwargs["attention_mask"],
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def _module_forward(self, x: torch.Tensor, module: nn.Module, module_kwargs: dict[str, Any]) -> torch.Tensor:
        """Run the joined inputs [1, sum of T, K] through a module of the layer.

        Attention runs sample by sample, since tokens see only their own chat; anything else in chunks of tokens that
        are halved when the device runs out of memory.
        """
        if x is self._stand_in:
            x = self._searched_input
        if hasattr(module, "q_proj"):
            lengths = [hidden.shape[1] for hidden in self.inps]
            parts = [
                self._sample_forward(module, part, kwargs).to(self.store)
                for part, kwargs in zip(x.split(lengths, dim=1), self.module_kwargs, strict=True)
            ]
            return torch.cat(parts, dim=1)
        outputs: list[torch.Tensor] = []
        done, total = 0, x.shape[1]
        while done < total:
            try:
                part = module(x[:, done : done + self.chunk_tokens].to(self.device)).to(self.store)
            except torch.OutOfMemoryError as error:
                self._back_off(error)
                continue
            outputs.append(part)
            done += part.shape[1]
        return torch.cat(outputs, dim=1)

    def _back_off(self, error: torch.OutOfMemoryError) -> None:
        """Halve the chunk of tokens, or give up with a message when it can't be the chunk's fault."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.chunk_tokens // 2 < _MIN_CHUNK_TOKENS:
            raise ResourceError(
                f"out of memory on {self.device} even with {self.chunk_tokens} tokens at a time: "
                "calibrate with fewer --samples, or free memory on the device"
            ) from error
        self.chunk_tokens //= 2
        self.on_note(f"{self.device} is out of memory: going on with {self.chunk_tokens} tokens at a time")

    # --- search -------------------------------------------------------------------------------------------------

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
        weight = torch.cat([linear.weight for linear in layers])
        groups = weight.view(-1, self.group_size if self.group_size > 0 else weight.shape[1])
        # of each input channel, the mean size of its weights within their groups, 0 to 1
        w_mean = (groups.abs() / (groups.abs().amax(1, keepdim=True) + 1e-6)).view_as(weight).mean(0)
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
        return names[id(prev_op)], tuple(names[id(linear)] for linear in layers), scales

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

    # --- the loop -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(self) -> None:
        """Search, scale, clip and round layer after layer; each goes to ``on_layer`` when done."""
        self.model = None  # vision tower and embeddings have done their work
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for index in range(len(self.layers)):
            began = time.perf_counter()
            layer = self.layers.load(index)
            result = self._quantize_layer(index, layer)
            result.seconds["total"] = time.perf_counter() - began
            self.on_layer(result)

    def _quantize_layer(self, index: int, layer: nn.Module) -> LayerResult:
        seconds: dict[str, float] = {}
        clock = _Clock(seconds, self.device)
        linears = {name: _linear(layer, name) for name in LINEARS}
        feats = self._get_input_feat(layer, linears)
        clock("capture")
        found = [
            self._search_best_scale(layer, **config)
            for config in self.awq_model.get_layers_for_scaling(layer, feats, {})
        ]
        clock("scale")
        for previous, names, scales in found:
            applied = self._apply_scales(layer, previous, names, scales.to(self.device))
            for tensor in {id(feats[n]): feats[n] for n in names}.values():
                tensor.div_(applied.to(tensor.device))
        if self.apply_clip:
            for name, limit in self._search_best_clip(layer, linears, feats):
                linear = linears[name]
                bound = limit.to(self.device)
                linear.weight.data = (
                    linear.weight.reshape(*bound.shape[:2], -1).clamp(-bound, bound).reshape(linear.weight.shape)
                )
        del feats
        clock("clip")
        rounded = {}
        for name, linear in linears.items():
            rounded[name] = round_to_grid(linear.weight, self.group_size, self.w_bit)
            linear.weight.data = dequantize(rounded[name])
        clock("round")
        error = self._output_error(layer)
        clock("check")
        self.inps, self.outputs = self.outputs, []
        others = {
            name: value for name, value in layer.state_dict().items() if name.removesuffix(".weight") not in linears
        }
        return LayerResult(index, rounded, others, error, seconds)

    def _search_best_clip(
        self, layer: nn.Module, named_linears: Any, input_feat: Any
    ) -> list[tuple[str, torch.Tensor]]:
        """AutoAWQ's choice of what to clip (not q and k, whose product is attended with), on the layer's own device."""
        return [
            (name, self._compute_best_clip(linear.weight, input_feat[name]))
            for name, linear in named_linears.items()
            if not name.endswith(("q_proj", "k_proj"))
        ]

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
            _linear(layer, name).weight.data.mul_(scales.view(1, -1))
        return scales

    def _output_error(self, layer: nn.Module) -> float:
        """Relative squared error of the rounded layer's output; see :class:`LayerResult`."""
        wrong = signal = 0.0
        for hidden, kwargs, true in zip(self.inps, self.module_kwargs, self.outputs, strict=True):
            got = self._sample_forward(layer, hidden, kwargs)
            true = true.to(self.device)
            wrong += (got - true).double().pow(2).sum().item()
            signal += (true - hidden.to(self.device)).double().pow(2).sum().item()
        return wrong / max(signal, 1e-30)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module


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
