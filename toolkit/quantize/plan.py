"""What a quantization will need, from shapes and token counts alone, held against what the machine has."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.checkpoint.layouts import LAYOUTS, layouts_in_words
from toolkit.checkpoint.values import nbytes_in_16_bits
from toolkit.errors import FormatError, ResourceError
from toolkit.files import free_bytes
from toolkit.host import available_memory
from toolkit.quantize.distillation.plan import DistillationPlan, distillation_flops, plan_distillation
from toolkit.quantize.distillation.sizes import EPOCHS
from toolkit.quantize.search.sizes import HEAD_ROWS, REFIT_NUMBERS, REFIT_WEIGHTS, packed_bytes, screen_rows
from toolkit.quantize.stream.sizes import CHUNK_TOKENS, HELD_TOKENS, TOWER_PATCHES
from toolkit.quantize.tower import packed_linears

if TYPE_CHECKING:
    import torch

    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "Plan",
    "check_settings",
    "device_bytes",
    "divide",
    "make_plan",
    "tower_saves",
]

BITS = (4,)
#: Group sizes that the formats and vLLM's kernels know; -1 is the whole row.
GROUP_SIZES = (32, 64, 128, -1)
#: int32 words hold eight values along the outputs (GEMM) or the inputs (the others).
_PACK = 8
_FLOAT = 4
#: vLLM 0.32 pads the rows of a head to a multiple of this (``DEFAULT_VOCAB_PADDING_SIZE``).
_VOCABULARY = 64
#: What Python, torch and transformers take for themselves before any tensor: measured, CPU 0.45, CUDA 1.5 GB.
_BASE_HOST = {"cpu": 0.5e9, "cuda": 1.6e9}
#: CUDA context, cuBLAS workspaces and the allocator's rounding.
_BASE_DEVICE = 0.6e9
#: What a forward pass through a layer costs beside the whole work on it: 0.19 with the moments, which are about half
#: of that (7B, docs/results); reading the layer comes on top.
_FORWARD_SHARE = 0.2
#: Scales that a search tries on some rows, and that it tries in full, no scaling among them.
_CANDIDATES, _FINALISTS = 30, 4
#: Seconds that a layer takes on a GPU whatever its size (launches, Python, reading), and how much longer than at the
#: device's full rates the rest takes: fitted to layers of the 2B's and 7B's shape, the worst of which is 17% off
#: (docs/results/quantizer).
_GPU_LAYER, _GPU_SHORTFALL = 0.1, 1.95
#: How much slower a GPU factors a matrix than it multiplies: 30 against some 400 TFLOP/s on an H100.
_CHOLESKY = 13


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds that a run will need, and where hidden states wait.

    ``disk``: the output. ``host``: peak resident memory, mapped files not counted. ``device``: peak memory of a GPU
    (0 on a CPU, where everything is host memory). ``store_on_device``: hidden states stay on the GPU; else they wait in
    host memory. ``seconds``: from the first layer to the last, on ``devices`` of the kind.
    """

    disk: int
    host: int
    device: int
    store_on_device: bool
    seconds: float
    devices: int = 1
    #: None: there is no distillation.
    distillation: DistillationPlan | None = None

    def check(self, out: Path, device: torch.device) -> list[str]:
        """Hold the plan against the machine.

        Returns one line a resource, with both figures.

        Raises:
            ResourceError: something will not fit; the message has the figures and what to change.
        """
        parent = next(p for p in out.absolute().parents if p.exists())
        rows = [
            ("disk", self.disk, free_bytes(parent), f"free space at {parent} or choose another --out"),
            ("host memory", self.host, available_memory(), "use fewer --samples"),
        ]
        if device.type == "cuda":
            import torch

            free, _ = torch.cuda.mem_get_info(device)
            rows.append(("GPU memory", self.device, free, "use fewer --samples, or free memory on the GPU"))
        lines = [f"{what}: needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB free" for what, need, have, _ in rows]
        short = [(line, hint) for line, (_, need, have, hint) in zip(lines, rows, strict=True) if need > have]
        if short:
            raise ResourceError("\n".join(f"not enough {line}: {hint}" for line, hint in short))
        return lines

    def told_time(self) -> str:
        """Return the time that the layers will take, in words."""
        told = f"time: about {self.seconds:.0f} s for the layers, after loading and the vision tower"
        return told if self.distillation is None else f"{told}; {self.distillation.told()}"


def divide(layers: Sequence[int], devices: int) -> list[tuple[int, ...]]:
    """Share layers out so that all devices end together: a later share is smaller, for it takes time to get there."""
    weights = [(1 - _FORWARD_SHARE) ** i for i in range(devices)]
    bounds = [round(len(layers) * sum(weights[:i]) / sum(weights)) for i in range(devices + 1)]
    return [tuple(layers[a:b]) for a, b in itertools.pairwise(bounds)]


def check_settings(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse what the formats, vLLM's kernels or the model's shapes do not allow.

    Raises:
        FormatError: names the setting, and for a group size the layer that it does not divide and sizes that work.
    """
    bits, group_size = recipe.bits, recipe.group_size
    if recipe.format not in LAYOUTS:
        raise FormatError(f"unknown format {recipe.format!r}: choose {layouts_in_words()}")
    if bits not in BITS:
        raise FormatError(f"{bits} bits: the formats hold 4-bit values only, use --bits 4")
    shapes = checkpoint.linear_shapes()

    def fits(size: int) -> bool:
        return all(k % (k if size == -1 else size) == 0 for k, _ in shapes.values())

    works = [str(size) for size in GROUP_SIZES if fits(size)]
    if group_size not in GROUP_SIZES:
        raise FormatError(f"group size {group_size} is not one that engines have kernels for: use {', '.join(works)}")
    if not fits(group_size):
        name, (inputs, _) = next((n, s) for n, s in shapes.items() if s[0] % group_size)
        raise FormatError(
            f"group size {group_size} does not divide the {inputs} inputs of {checkpoint.layer_prefix(0)}{name}: "
            f"use {', '.join(works)}"
        )
    vocabulary = int(checkpoint.text_config["vocab_size"])
    if recipe.lm_head and vocabulary % _VOCABULARY:
        raise FormatError(
            f"--lm-head: engines pad a vocabulary to a multiple of {_VOCABULARY}, and can't pad packed rows: "
            f"{vocabulary} is none, leave --lm-head out"
        )
    for name, (inputs, outputs) in shapes.items():
        if outputs % _PACK or inputs % _PACK:
            raise FormatError(
                f"{checkpoint.layer_prefix(0)}{name} is {inputs} x {outputs}: AWQ packs {_PACK} values to a word, "
                f"so both must be multiples of {_PACK}"
            )


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[PreparedSample], device: torch.device, devices: int = 1
) -> Plan:
    """Work out what a run needs from shapes and token counts.

    Args:
        checkpoint: the source.
        recipe: what is asked for.
        samples: the prepared samples.
        device: where layers are searched. devices: how many of its kind share the layers.
    """
    shapes = checkpoint.linear_shapes()
    layers = checkpoint.num_layers
    first = checkpoint.layer_prefix(0)
    packed = sum(packed_bytes(k, n, recipe.group_size) for k, n in shapes.values())
    layer_bytes = sum(checkpoint.tensors[f"{first}{name}.weight"].nbytes for name in shapes)
    linears = {f"{name}.weight" for index in range(layers) for name in checkpoint.linear_names(index)}
    tower = _packed_tower(checkpoint, recipe)
    linears |= {f"{checkpoint.visual_prefix}{name}.weight" for name in tower}
    vocabulary, hidden = (int(checkpoint.text_config[key]) for key in ("vocab_size", "hidden_size"))
    head = packed_bytes(hidden, vocabulary, recipe.group_size) if recipe.lm_head else 0
    linears |= {"lm_head.weight"} if recipe.lm_head else set()
    rest = sum(nbytes_in_16_bits(tensor) for name, tensor in checkpoint.tensors.items() if name not in linears)
    disk = rest + layers * packed + sum(tower.values()) + head + 30_000_000  # tokenizer and config files

    tokens = sum(sample.tokens for sample in samples)
    sample_bytes = sum(value.nbytes for sample in samples for value in sample.inputs.values())
    patches = sum(sample.vision_tokens for sample in samples) * checkpoint.vision.merge**2
    needs = _Needs(checkpoint, recipe, tokens, max(sample.tokens for sample in samples), patches)
    # one layer is written, the next waits; of the head, its pieces and the whole. What is not quantized is copied from
    # the mapped file
    writing = max(2 * packed, 2 * head)
    seconds = _seconds(checkpoint, recipe, tokens, device) * layers
    if tower:
        seconds += _tower_seconds(checkpoint, min(patches, TOWER_PATCHES), device)
    if recipe.lm_head:
        seconds += _head_seconds((vocabulary, hidden), recipe, tokens, device)
    if devices > 1:
        seconds *= max(map(len, divide(range(layers), devices))) / layers
    distillation = _distillation(checkpoint, recipe, samples, device)
    if device.type == "cpu":
        searching = devices * (_BASE_HOST["cpu"] + needs.peak(True))
        host = int(max(searching, distillation.device if distillation else 0) + sample_bytes + writing)
        return Plan(disk, host, 0, False, seconds, devices, distillation)
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    on_device, off_device = (int(_BASE_DEVICE + layer_bytes + needs.peak(on)) for on in (True, False))
    host = int(devices * _BASE_HOST["cuda"] + sample_bytes + writing)
    fits = on_device <= free
    waiting = 0 if fits else devices * max(needs.states, needs.tower_states)
    then = distillation if distillation is not None and distillation.left_out is None else None
    return Plan(
        disk,
        int(host + max(waiting, then.host if then else 0)),
        max(on_device if fits else off_device, then.device if then else 0),
        fits,
        seconds,
        devices,
        distillation,
    )


def _distillation(
    checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[PreparedSample], device: torch.device
) -> DistillationPlan | None:
    """Return what distillation will need; None where it was not asked for."""
    from toolkit.quantize.search.gram import takes_bfloat16

    if not recipe.distill:
        return None
    total = None
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
    tokens, longest = sum(sample.tokens for sample in samples), max(sample.tokens for sample in samples)
    base = _BASE_HOST["cpu"] if total is None else _BASE_DEVICE
    found = plan_distillation(checkpoint, recipe, tokens, longest, total=total, base=base)
    # the rates are of float32, of whose operations a GPU does half as many as of bfloat16's
    rate, shortfall = _rates(device)[0] * (2 if takes_bfloat16(device) else 1), 1 if total is None else _GPU_SHORTFALL
    return replace(found, seconds=shortfall * distillation_flops(checkpoint, tokens, EPOCHS) / rate)


def device_bytes(checkpoint: Checkpoint, recipe: Recipe, tokens: int, longest: int) -> tuple[int, int]:
    """Return the GPU memory that a run needs, and the host memory beside it, as for a card too small for the states.

    For a plan without samples at hand: all that counts of them is their tokens, in all and of the longest.
    """
    shapes, first = checkpoint.linear_shapes(), checkpoint.layer_prefix(0)
    layer_bytes = sum(checkpoint.tensors[f"{first}{name}.weight"].nbytes for name in shapes)
    packed = sum(packed_bytes(k, n, recipe.group_size) for k, n in shapes.values())
    needs = _Needs(checkpoint, recipe, tokens, longest)
    device = _BASE_DEVICE + layer_bytes + needs.peak(False)
    return int(device), int(_BASE_HOST["cuda"] + 2 * packed + needs.states)


def _packed_tower(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, int]:
    """Return the bytes of each linear of the vision tower that is packed, by its name behind `Names.visual`."""
    if recipe.vision != "awq":
        return {}
    shapes = checkpoint.family.tower.modules(checkpoint.vision)
    names = packed_linears(checkpoint, recipe.group_size)
    return {name: packed_bytes(shapes[name][1], shapes[name][0], recipe.group_size) for name in names}


def tower_saves(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Return how many bytes the vision tower takes less than in 16 bits; 0 where it is not packed."""
    prefix, packed = checkpoint.visual_prefix, _packed_tower(checkpoint, recipe)
    return sum(checkpoint.tensors[f"{prefix}{name}.weight"].nbytes - size for name, size in packed.items())


class _Needs:
    """Bytes that a layer's search takes, by what they are for; float32 throughout."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, tokens: int, longest: int, patches: int = 0) -> None:
        text = checkpoint.text_config
        widths, vision = checkpoint.family.widths(text), checkpoint.vision
        hidden, inner, query = widths["hidden"], widths["inner"], widths["query"]
        shapes = checkpoint.linear_shapes()
        held = min(HELD_TOKENS + longest, tokens)
        chunk = min(max(CHUNK_TOKENS, longest), tokens)
        self.layer = sum(k * n for k, n in shapes.values()) * _FLOAT
        #: hidden states, and what is added to those of images behind the first layers
        self.states = tokens * hidden * _FLOAT * (1 + len(vision.deepstack))
        rope = 2 * tokens * widths["head"] * _FLOAT
        self.held = held * (4 * hidden + query + inner) * _FLOAT + rope
        #: a unit's moments by its inputs
        self.moments = (2 * hidden**2 + query**2 + inner**2) * _FLOAT
        self.passing = chunk * (4 * inner + 4 * hidden + 4 * query) * _FLOAT
        widest = hidden * inner * _FLOAT
        compensated = recipe.rounding == "compensated"
        #: rounding down_proj: scaled weight, values, error, beside all moments and the factor of its own
        self.down = self.moments + (inner**2 * _FLOAT if compensated else 0) + 5 * widest
        #: rounding gate and up together, when down_proj's moments are gone
        self.gate_up = ((2 + compensated) * hidden**2 + query**2) * _FLOAT + 10 * widest + 2 * held * inner * _FLOAT
        if recipe.effort == "best":
            self._on_two_ways(recipe, shapes, held, (hidden, inner))
        #: AutoAWQ's search keeps every linear's input and its modules' outputs
        self.features = tokens * (6 * hidden + inner) * _FLOAT if recipe.search == "autoawq" else 0
        visual = [t for name, t in checkpoint.tensors.items() if name.startswith(checkpoint.visual_prefix)]
        self.vision = sum(t.numel for t in visual) * _FLOAT
        #: a vision block's widest activations: four patches a token, the MLP four times as wide as the block or less
        self.seeing = vision.merge**2 * longest * 4 * max(vision.inner, 4 * vision.width) * _FLOAT
        self.head = self._head(recipe, hidden, int(text["vocab_size"]), held) if recipe.lm_head else 0
        self.tower = self.tower_states = 0
        if recipe.vision == "awq":
            self._tower(checkpoint, min(patches, TOWER_PATCHES), longest)

    def _on_two_ways(
        self, recipe: Recipe, shapes: Mapping[str, tuple[int, int]], held: int, widths: tuple[int, int]
    ) -> None:
        """Count what the thorough search takes: all twice, but the moments of one unit at a time."""
        hidden, inner = widths
        self.layer, self.states, self.passing = 2 * self.layer, 2 * self.states, 2 * self.passing
        self.held += held * (hidden + inner) * _FLOAT
        self.moments = 2 * inner**2 * _FLOAT
        groups = inner // (inner if recipe.group_size == -1 else recipe.group_size)
        rows = max(outputs for _, outputs in shapes.values())
        widest = hidden * inner * _FLOAT
        refit = (3 * min(REFIT_WEIGHTS, 2 * hidden * inner) + min(REFIT_NUMBERS, rows * groups**2)) * _FLOAT
        #: target and values of down_proj, beside moments, drift and how its columns depend on each other
        self.down = 3 * inner**2 * _FLOAT + 7 * widest + refit
        self.gate_up = 3 * hidden**2 * _FLOAT + 14 * widest + 2 * held * inner * _FLOAT + refit

    def _tower(self, checkpoint: Checkpoint, patches: int, longest: int) -> None:
        """What a stage of the vision tower takes: its weights and what rounds them, the patches and what is held."""
        vision = checkpoint.vision
        modules = checkpoint.family.tower.modules(vision).values()
        widest, inputs = max(n * k for n, k in modules), max(k for _, k in modules)
        stage = max(12 * vision.width**2, 2 * (vision.width * vision.merge**2) ** 2) * _FLOAT
        chunk = max(CHUNK_TOKENS, 4 * longest) * (3 * vision.inner + 8 * vision.width) * _FLOAT
        held = min(HELD_TOKENS + 4 * longest, patches or 4 * longest) * (4 * vision.width + vision.inner) * _FLOAT
        self.tower_states = 2 * patches * vision.width * _FLOAT
        self.tower = stage + chunk + held + (3 * inputs**2 + 6 * widest) * _FLOAT

    def _head(self, recipe: Recipe, hidden: int, vocabulary: int, held: int) -> int:
        """What the output head takes: its moments, a piece of its rows and what rounds that, tokens held."""
        rows = min(HEAD_ROWS, vocabulary)
        thorough = recipe.effort == "best"
        squares, copies = (6, 14) if thorough else (3, 10)
        piece = copies * rows * hidden + 3 * held * rows
        return (squares * hidden**2 + piece + (2 + thorough) * held * hidden) * _FLOAT

    def peak(self, states_too: bool) -> int:
        """Return the bytes of the worst moment, hidden states counted or not."""
        states = self.states if states_too else 0
        embedding = self.vision + self.seeing + 2 * states
        searching = max(self.moments + self.passing, self.down, self.gate_up)
        if self.features:
            searching = max(self.passing, 3 * self.layer) + (self.features if states_too else 0)
        tower = self.tower + (self.tower_states if states_too else 0)
        return max(embedding, states + self.layer + self.held + searching, tower, states + self.head)


def _seconds(checkpoint: Checkpoint, recipe: Recipe, tokens: int, device: torch.device) -> float:
    """Return the seconds that a layer will take: its multiplications and its memory traffic over the device's rates.

    The counts are those of :mod:`toolkit.quantize.search.moments`; how far they hold is in docs/results.
    """
    from toolkit.quantize.search.gram import takes_bfloat16

    flops_rate, bytes_rate = _rates(device)
    widths = checkpoint.family.widths(checkpoint.text_config)
    hidden, inner, query = widths["hidden"], widths["inner"], widths["query"]
    shapes = checkpoint.linear_shapes()
    weights = sum(k * n for k, n in shapes.values())
    squares = 2 * hidden**2 + query**2 + inner**2
    held = min(HELD_TOKENS, tokens // 10 + 1)
    kernels = device.type == "cuda"  # Triton's, which read a weight once where torch reads it ten times
    narrow = 0.5 if recipe.search == "moments" and takes_bfloat16(device) else 1.0  # the rates are of float32

    flops = narrow * 2.0 * tokens * weights  # the forward pass
    flops += narrow * 1.1 * tokens * squares  # moments: a good half of each
    traffic = 12.0 * tokens * (8 * hidden + 4 * inner)
    if recipe.effort == "best":
        flops *= 4  # to each unit, and through the layer, on two ways; the drift has no symmetry to use
        traffic *= 5
        # the target, two products a sweep and one for each comparison, and the equations of the scales
        flops += 37 * sum(n * k**2 for k, n in shapes.values())
        traffic += (80 if kernels else 300) * _FLOAT * weights
    elif recipe.search == "autoawq":  # twenty forwards of each module, weights restored each time
        flops += 20 * 2.0 * tokens * weights
        traffic += 20 * _FLOAT * (6 * weights + 4 * tokens * inner)
    else:
        # 1.3 times as many rows as wanted, on average: a stride is a whole number
        screened = [(1.3 * screen_rows(columns), columns) for columns in (hidden, query, hidden, inner)]
        flops += narrow * _CANDIDATES * 2 * sum(rows * columns**2 for rows, columns in screened)
        traffic += _CANDIDATES * 10 * _FLOAT * sum(rows * columns for rows, columns in screened)
        flops += narrow * _FINALISTS * 2 * hidden * (query**2 + inner**2)  # of o and down, exactly
        flops += (_FINALISTS + 4) * 2 * held * weights  # of the others; and what checks them
        traffic += 30 * _FLOAT * weights
    if recipe.clip:
        traffic += (2 if kernels else 100) * _FLOAT * weights
    if recipe.rounding == "compensated":
        triangles = (2 * hidden**3 + query**3 + inner**3) / 3
        flops += 2 * (hidden * (weights - hidden * inner - query * hidden) + (query**2 + inner**2) * hidden)
        flops += triangles * (_CHOLESKY if kernels else 2)
        traffic += (8 if kernels else 40) * _FLOAT * weights
    ideal = flops / flops_rate + traffic / bytes_rate
    return _GPU_LAYER + _GPU_SHORTFALL * ideal if kernels else ideal


def _tower_seconds(checkpoint: Checkpoint, patches: int, device: torch.device) -> float:
    """Return the seconds that the vision tower's stages will take: their products, once each as `_seconds` counts."""
    flops_rate, _ = _rates(device)
    shapes = list(checkpoint.family.tower.modules(checkpoint.vision).values())
    weights, squares = sum(n * k for n, k in shapes), sum(k * k for _, k in shapes)
    rounding = sum(n * k * k * 2 + k**3 for n, k in shapes)
    screening = 40 * 2 * sum(screen_rows(k) * k * k for _, k in shapes)
    return 1.3 * (2.0 * patches * weights + 1.1 * patches * squares + rounding + screening) / flops_rate


def _head_seconds(shape: tuple[int, int], recipe: Recipe, tokens: int, device: torch.device) -> float:
    """Return the seconds that the output head [V, D] will take: its products once each, as `_seconds` counts."""
    flops_rate, bytes_rate = _rates(device)
    rows, hidden = shape
    held = min(HELD_TOKENS, tokens // 10 + 1)
    sweeps = 40 if recipe.effort == "best" else 1
    flops = 2.0 * rows * hidden**2 * sweeps + 6 * held * rows * hidden + 1.1 * tokens * hidden**2
    kernels = device.type == "cuda"
    traffic = (10 if kernels else 140) * _FLOAT * rows * hidden
    ideal = flops / flops_rate + traffic / bytes_rate
    return _GPU_SHORTFALL * ideal if kernels else ideal


def _rates(device: torch.device) -> tuple[float, float]:
    """Return a device's rates: operations a second of a float32 product as the search does it, bytes a second of a
    copy. Measured once a process, for as many threads as torch has."""
    import torch

    return _measured_rates(device, torch.get_num_threads())


@lru_cache
def _measured_rates(device: torch.device, threads: int) -> tuple[float, float]:
    import torch

    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    # A GPU is asked for several calls at once, so that starting them does not count; on a CPU a call takes long enough.
    size, calls = (8192, 10) if cuda else (1024, 1)
    a = torch.randn(size, size, device=device)
    b = torch.empty_like(a)

    def rate(work: float, call: Callable[[], object]) -> float:
        best = 0.0
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            for _ in range(calls):
                call()
            if cuda:
                torch.cuda.synchronize(device)
            best = max(best, calls * work / (time.perf_counter() - began))
        return best

    return rate(2.0 * size**3, lambda: torch.mm(a, a, out=b)), rate(8.0 * size**2, lambda: b.copy_(a))
