"""What distillation will need, from shapes and token counts alone, and whether a device holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.quantize.distillation.sizes import CHUNK_TOKENS, LOGITS
from toolkit.quantize.search.sizes import packed_bytes
from toolkit.quantize.stream.sizes import CHUNK_TOKENS as STREAM_TOKENS

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.recipe import Recipe

__all__ = ["DistillationPlan", "distillation_flops", "plan_distillation"]

_FLOAT, _HALF = 4, 2
#: Bytes beside the scale in the file of what learns: share, gradient, Adam's two memories, and the best so far.
_LEARNING = 5 * _FLOAT


@dataclass(frozen=True)
class DistillationPlan:
    """Bytes that distillation takes where it runs, and where the samples wait; on a CPU all of it is host memory.

    ``device``: its peak, the samples counted if they wait there. ``host``: for the samples, if they wait there.
    ``left_out``: why there is no distillation; None: there is. ``seconds``: it takes, about.
    """

    device: int
    host: int
    store_on_device: bool
    seconds: float
    left_out: str | None = None

    def told(self) -> str:
        """Return it in words."""
        if self.left_out is not None:
            return f"distillation: left out, {self.left_out}"
        return f"distillation: about {self.seconds:.0f} s more, {self.device / 1e9:.1f} GB where it runs"


def plan_distillation(
    checkpoint: Checkpoint, recipe: Recipe, tokens: int, longest: int, *, total: int | None, base: float
) -> DistillationPlan:
    """Work out what distillation needs; ``seconds`` is left at 0.

    Args:
        checkpoint: the source.
        recipe: what is asked for.
        tokens: of all samples. longest: of the longest.
        total: bytes of memory that the GPU has, whoever uses them now: what is left out may not change from run to run
            on one machine. None: it runs on a CPU.
        base: bytes that are taken before any tensor.
    """
    widths, shapes = checkpoint.family.widths(checkpoint.text_config), checkpoint.linear_shapes()
    hidden, inner, layers = widths["hidden"], widths["inner"], checkpoint.num_layers
    vocabulary = int(checkpoint.text_config["vocab_size"])
    weights = sum(k * n for k, n in shapes.values())
    groups = sum(n * (1 if recipe.group_size == -1 else k // recipe.group_size) for k, n in shapes.values())
    packed = sum(packed_bytes(k, n, recipe.group_size) for k, n in shapes.values())
    resident = layers * (packed + groups * _LEARNING) + vocabulary * hidden * (_FLOAT if total is None else _HALF)
    chunk = min(max(CHUNK_TOKENS, longest), tokens)
    widest = max(k * n for k, n in shapes.values())
    passing = chunk * (
        layers * hidden * _FLOAT + 12 * hidden * _FLOAT + 6 * inner * (_FLOAT if total is None else _HALF)
    )
    learning = passing + 4 * _FLOAT * widest + 5 * _FLOAT * min(LOGITS, chunk * vocabulary)
    stream = min(max(STREAM_TOKENS, longest), tokens) * (4 * inner + 8 * hidden) * _FLOAT
    before = 2 * weights * _FLOAT + stream
    states = tokens * hidden * _FLOAT * (2 + len(checkpoint.vision.deepstack))
    visual = sum(t.numel for name, t in checkpoint.tensors.items() if name.startswith(checkpoint.visual_prefix))
    needed = int(base + max(visual * _FLOAT, resident + max(learning, before)))
    if total is None or needed + states <= total:
        return DistillationPlan(needed + states, 0, True, 0.0)
    why = None
    if needed > total:
        why = f"it takes {needed / 1e9:.0f} GB of GPU memory, and there are {total / 1e9:.0f} GB"
    return DistillationPlan(needed, states, False, 0.0, why)


def distillation_flops(checkpoint: Checkpoint, tokens: int, epochs: float) -> float:
    """Return the operations that distillation takes: the source's pass, and in an epoch four products a weight and
    token     (forward, again, and both gradients), three of the output head.
    """
    weights = checkpoint.num_layers * sum(k * n for k, n in checkpoint.linear_shapes().values())
    head = int(checkpoint.text_config["vocab_size"]) * checkpoint.family.widths(checkpoint.text_config)["hidden"]
    return 2.0 * tokens * (weights + epochs * (4 * weights + 3 * head))
