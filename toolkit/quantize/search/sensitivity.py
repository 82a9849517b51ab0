"""How much the loss depends on vision tokens and how much on text tokens: weights for a calibration's tokens.

MBQ (Li et al., "MBQ: Modality-Balanced Quantization for Large Vision-Language Models", arXiv 2412.19509) finds that a
decoder layer's error at a text token costs far more than one at a vision token, while images fill most of a
calibration's tokens. It measures mean |dL/dy| over the tokens of each modality and weights their errors by it.

Here the gradient is taken without ever holding the model: layers are streamed forward, then backward, each recomputed
from its input. Of the inputs, the square root of the number of layers wait in host memory, the rest are made again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from toolkit.compat import patch_torchvision
from toolkit.errors import ManifestError
from toolkit.quantize.stream.layers import StreamedLayers
from toolkit.quantize.stream.shell import embed, load_shell
from toolkit.quantize.stream.states import States

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["measure", "token_weights"]

#: Tokens of all samples taken, unless the first alone has more: 3 GB of hidden states in the 7B.
_MOST_TOKENS = 16384

#: Tokens that go through a layer at once; with what autograd keeps of them, 1.3 GB in the 7B.
_TOKENS = 2048
#: Rows of the output head on the device at once, and positions that are compared with them.
_VOCABULARY, _POSITIONS = 4096, 8192


def token_weights(vision: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return how much each token's squared error is to count: vision tokens ``ratio`` squared, text tokens 1.

    An error e of a layer's output changes the loss by g . e in the first order, g its gradient. MBQ bounds that by
    |g| |e| and so weights absolute errors by mean |g|. Second moments add up squared errors, and there the power is
    two: rounding errors have no preferred sign, so the terms of g . e add up like a random walk, to an expected square
    of sum g^2 e^2. (For the divergence from the unquantized model, whose gradient is zero, g^2 is the diagonal of its
    Hessian, the Fisher information, where the tokens' labels are drawn from the model.) Weighting squares by |g| would
    treat an error of half the size at twice the gradient as half as bad, though it moves the loss as far.

    Args:
        vision: bool [T], of all tokens that are weighted against each other.
        ratio: of the gradients, from :func:`measure`.

    Returns:
        float32 [T], of mean 1.
    """
    weights = torch.where(vision, ratio**2, 1.0)
    return weights / weights.mean()


def measure(
    checkpoint: Checkpoint,
    samples: Sequence[PreparedSample],
    device: torch.device,
    *,
    limit: int = 64,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Return, per decoder layer, mean |dL/dy| over vision tokens divided by mean |dL/dy| over text tokens.

    y is the layer's output; L is a sample's mean next-token cross-entropy, over the assistant's answers with the token
    that ends them where there are any, else over all text. The mean is over all tokens of all samples taken.

    As in MBQ's own code no ratio is below the median of all layers' ratios. The last layers' need it: nothing reads a
    vision token's state after the last layer, so the gradient there is 0, while that layer's keys and values of vision
    tokens still matter.

    The ratios are rough, since a few samples make up most of the gradient: of the embedded model's, 3 of 56 make up two
    thirds and more, and draws of 56 give 0.8 to 1.9 for the first layer.

    Args:
        checkpoint: the unquantized model.
        samples: of a calibration; the first with vision tokens are taken.
        device: where layers run, one at a time.
        limit: how many samples at most; fewer are taken where they are long.
        on_step: called with the number of passes done, of 2 x layers.

    Raises:
        ManifestError: no sample has vision tokens.
    """
    chosen: list[PreparedSample] = []
    for sample in [sample for sample in samples if sample.vision_tokens][:limit]:
        if chosen and sum(s.tokens for s in chosen) + sample.tokens > _MOST_TOKENS:
            break
        chosen.append(sample)
    if not chosen:
        raise ManifestError(
            "modalities can't be balanced: no calibration sample has an image or video. "
            "Calibrate with images, or leave out --balance modality"
        )
    shell, config = load_shell(checkpoint, device)
    states = States.join(embed(shell, chosen, device, torch.device("cpu")))
    del shell
    layers = StreamedLayers(checkpoint, config, device)
    try:
        ratios = _Pass(layers, states, device, on_step).run(*_targets(checkpoint, chosen, states), checkpoint)
    finally:
        layers.close()
    least = statistics.median(ratios)
    return [max(ratio, least) for ratio in ratios]


class _Pass:
    """One pass of the samples forward and back through the streamed layers."""

    def __init__(
        self, layers: StreamedLayers, states: States, device: torch.device, on_step: Callable[[int], None] | None
    ) -> None:
        self.layers = layers
        self.states = states
        self.device = device
        self.on_step = on_step
        self.done = 0

    def run(
        self, positions: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor, checkpoint: Checkpoint
    ) -> list[float]:
        """Return the layers' ratios; ``positions``, ``targets``, ``shares``: from :func:`_targets`."""
        stride = math.isqrt(len(self.layers) - 1) + 1
        kept: dict[int, torch.Tensor] = {}
        for index in range(len(self.layers)):
            if index % stride == 0:
                kept[index] = self.states.hidden
            self._forward(index)
            self._step()
        gradient = torch.zeros_like(self.states.hidden)
        gradient[0, positions] = _head_gradient(
            checkpoint, self.states.hidden[0, positions], targets, shares, self.device
        )
        ratios = []
        for first in sorted(kept, reverse=True):
            self.states.hidden = kept.pop(first)
            inputs = [self.states.hidden]
            for index in range(first, min(first + stride, len(self.layers)) - 1):
                self._forward(index)
                inputs.append(self.states.hidden)
            while inputs:
                ratios.append(self._ratio(gradient))
                self.states.hidden = inputs.pop()
                self._backward(first + len(inputs), gradient)
                self._step()
        return ratios[::-1]

    def _step(self) -> None:
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done)

    def _ratio(self, gradient: torch.Tensor) -> float:
        sizes = gradient[0].abs().mean(-1).double()
        vision = self.states.vision.cpu()
        return float(sizes[vision].mean() / sizes[~vision].mean())

    @torch.no_grad()
    def _forward(self, index: int) -> None:
        """Replace the hidden states by what layer ``index`` makes of them."""
        layer = self.layers.load(index)
        output = torch.empty_like(self.states.hidden)
        for batch in self.states.batches(_TOKENS):
            output[:, batch.start : batch.stop] = layer(**self.states.inputs(batch, self.device))
        if index < len(self.states.added):
            output[:, self.states.vision.to(output.device)] += self.states.added[index].to(output.device)
        self.states.hidden = output

    def _backward(self, index: int, gradient: torch.Tensor) -> None:
        """Replace the gradient with respect to layer ``index``'s output by that with respect to its input."""
        layer = self.layers.load(index, then=index - 1)
        for batch in self.states.batches(_TOKENS):
            part = gradient[:, batch.start : batch.stop]
            arguments = self.states.inputs(batch, self.device)
            x = arguments["hidden_states"].detach().requires_grad_()
            with torch.enable_grad():
                y = layer(**{**arguments, "hidden_states": x})
            part.copy_(torch.autograd.grad(y, x, part.to(self.device))[0])


def _targets(
    checkpoint: Checkpoint, samples: Sequence[PreparedSample], states: States
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is to be predicted, n tokens of all samples.

    Returns:
        positions int64 [n] in the joined row, each one before the token it predicts; the tokens, int64 [n]; and each
        one's share in the loss, float32 [n], which adds up to 1 in every sample.
    """
    patch_torchvision()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    positions, targets, shares = [], [], []
    start = 0
    for sample, vision in zip(samples, states.vision.cpu().split(states.lengths), strict=True):
        ids = sample.inputs["input_ids"][0].cpu()
        predicted = _answers(ids, opening, end)
        if not bool(predicted.any()):
            predicted = ~vision
        before = predicted[1:].nonzero().flatten()
        positions.append(before + start)
        targets.append(ids[before + 1])
        shares.append(torch.full((len(before),), 1 / max(1, len(before))))
        start += len(ids)
    return torch.cat(positions), torch.cat(targets), torch.cat(shares)


def _answers(ids: torch.Tensor, opening: Sequence[int], end: int) -> torch.Tensor:
    """Return which tokens [T] the assistant says: from after each ``opening`` to the next ``end``, with that."""
    tokens = ids.tolist()
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for start in range(len(opening), len(tokens)):
        if tokens[start - len(opening) : start] == list(opening):
            stop = tokens.index(end, start) + 1 if end in tokens[start:] else len(tokens)
            found[start:stop] = True
    return found


def _head_gradient(
    checkpoint: Checkpoint, hidden: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return the gradient of the sum of ``shares`` x cross-entropy with respect to the last layer's output.

    The gradient with respect to the normed state is softmax(W h) W - W[target]; its first term is attention from h to
    the rows of the head, so it is summed up over pieces of the vocabulary as flash attention does over keys.

    Args:
        checkpoint: holds the last norm and the head (the embeddings where they are tied).
        hidden: float32 [n, D], the last layer's output where something is predicted.
        targets: int64 [n].
        shares: float32 [n].
        device: where to compute.

    Returns:
        float32 [n, D], where ``hidden`` is.
    """
    prefix = checkpoint.language_prefix
    norm = checkpoint.get(f"{prefix}norm.weight").to(device, torch.float32)
    eps = float(checkpoint.text_config["rms_norm_eps"])
    head = checkpoint.get(checkpoint.head_name)
    found = torch.empty_like(hidden)
    for part in torch.arange(len(hidden)).split(_POSITIONS):
        x = hidden[part].to(device).requires_grad_()
        y = nn.functional.rms_norm(x, norm.shape, norm, eps)
        with torch.no_grad():
            at_y = _mean_row(y, head, device) - head[targets[part]].to(device, torch.float32)
        found[part] = torch.autograd.grad(y, x, at_y * shares[part].to(device).unsqueeze(1))[0].to(found.device)
    return found


def _mean_row(y: torch.Tensor, head: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return softmax(y W^T) W, [n, D] for y [n, D] and W [V, D]."""
    top = torch.full((len(y), 1), -torch.inf, device=device)
    total, rows = torch.zeros_like(top), torch.zeros_like(y)
    for piece in head.split(_VOCABULARY):
        piece = piece.to(device, torch.float32)
        logits = y @ piece.t()
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        old, top = (top - higher).exp_(), higher
        weights = (logits - top).exp_()
        total = total * old + weights.sum(1, keepdim=True)
        rows = (rows * old).addmm_(weights, piece)
    return rows / total
