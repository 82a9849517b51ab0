"""The arithmetic of a 4-bit grid and of the search for it: pure functions of tensors.

A linear layer y = W x whose weight is replaced by W + D errs, over n tokens X [n, K], by a mean square of
tr(D H D^T) with H = X^T X / n: a candidate costs N K^2 multiplications whatever the number of tokens, and no forward.
AWQ (arXiv 2306.00978) chooses scales s for the inputs, W s rounded, s divided out: D = round(W s) / s - W.
"""

from __future__ import annotations

import torch

from toolkit.formats import packing
from toolkit.formats.packing import QuantizedLinear
from toolkit.quantize.search.kernels.trust import trusted

__all__ = [
    "Moments",
    "best_clip",
    "dequantize",
    "grid_steps",
    "group_moments",
    "round_error",
    "round_to_grid",
    "scale_candidates",
    "screen",
    "takes_bfloat16",
    "weight_means",
]

#: Smallest range of a group, so that an all-zero group has a scale; AutoAWQ's value.
_MIN_RANGE = 1e-5
#: Weights that the clip search works on at once.
_CLIP_WEIGHTS = 2**25


def round_to_grid(weight: torch.Tensor, group_size: int, bits: int = 4) -> QuantizedLinear:
    """Round a weight to its groups' asymmetric grids, as the file will hold them.

    The scale is rounded to fp16 first and the weights are rounded against that, so that what is searched is what is
    served. A group's range always contains 0: AutoAWQ clamps the zero point into 0..15, which cuts off a group whose
    weights all have one sign.

    Args:
        weight: [N, K], any float dtype; the work is done in float32.
        group_size: inputs that share a scale, -1 for all of a row; divides K.
        bits: width of a value.

    Returns:
        values [N, K] uint8 in 0..2^bits-1, zeros [N, K/g] uint8, scales [N, K/g] float16;
        the weight they stand for is (value - zero) x scale.
    """
    rows, columns = weight.shape
    w = _groups(weight.float(), group_size)
    step, zeros = _grid(w, bits)
    values = torch.div(w, step).round_().add_(zeros).clamp_(0, 2**bits - 1)
    return QuantizedLinear(
        values=values.to(torch.uint8).view(rows, columns),
        zeros=zeros.to(torch.uint8).view(rows, -1),
        scales=step.half().view(rows, -1),
    )


def _groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> [N, K/g, g]."""
    return weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)


def _grid(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step, a number that fp16 holds, and the zero point of each group of [N, G, g]: [N, G, 1] float32."""
    top = 2**bits - 1
    low, high = w.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low).clamp(min=_MIN_RANGE) / top).clamp(max=torch.finfo(torch.float16).max).half().float()
    return step, (low / step).round_().neg_().clamp_(0, top)


def _snap(w: torch.Tensor, bits: int) -> torch.Tensor:
    """Return weights [N, G, g] rounded to their grid, float32: what :func:`round_to_grid` does, not packed."""
    step, zeros = _grid(w, bits)
    return torch.div(w, step).round_().clamp_(-zeros, 2**bits - 1 - zeros).mul_(step)


def grid_steps(weight: torch.Tensor, group_size: int, bits: int = 4) -> torch.Tensor:
    """Return the steps [N, K/g] float32 of a weight's grids, as :func:`round_to_grid` makes them."""
    return _grid(_groups(weight.float(), group_size), bits)[0].squeeze(-1)


def round_error(weight: torch.Tensor, scales: torch.Tensor, group_size: int, bits: int = 4) -> torch.Tensor:
    """Return what rounding a weight [N, K] float32 under scales [K] for its inputs changes: [N, K]."""
    return _snap(_groups(weight * scales, group_size), bits).view_as(weight).div_(scales).sub_(weight)


def takes_bfloat16(device: torch.device) -> bool:
    """Return whether products of bfloat16 are fast there, twice as fast as TF32's; sums are float32."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and trusted("products of bfloat16 summed in float32", device, lambda: _products_agree(device))
    )


def _products_agree(device: torch.device) -> bool:
    """Multiply small factors both ways; the products of numbers that bfloat16 holds are exact in float32."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-64, 64, (256, 256), generator=rng).to(device, torch.bfloat16) for _ in "ab")
    return torch.equal(_product(a, b).cpu(), a.float().cpu() @ b.float().cpu())


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a [n, k] b [k, m] in float32, the factors in b's precision."""
    if b.dtype == torch.float32:
        return a @ b
    if b.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(b.dtype).float() @ b.float()


def dequantize(layer: QuantizedLinear) -> torch.Tensor:
    """Return the float32 weight [N, K] that a quantized linear stands for."""
    return packing.dequantize(layer, torch.float32)


def group_moments(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the second moments X^T X / n of every group of inputs.

    Args:
        x: [n, K], n tokens; the sum is taken in float32.
        group_size: g, -1 for all of K.

    Returns:
        [K/g, g, g] float32: the diagonal blocks of the Gram matrix of a linear layer's inputs.
    """
    tokens, columns = x.shape
    group = columns if group_size == -1 else group_size
    blocks = x.float().view(tokens, -1, group).transpose(0, 1)
    return torch.bmm(blocks.transpose(1, 2), blocks) / tokens


def best_clip(
    weight: torch.Tensor, moments: torch.Tensor, bits: int = 4, grid: int = 20, max_shrink: float = 0.5
) -> torch.Tensor:
    """Find, for every group of every row, the bound on |w| that costs the group's output least.

    AutoAWQ's grid and loss (`_compute_best_clip`): bounds max |w| x (1 - i/grid), the mean over tokens of the squared
    error of the group's partial sum. With d the error of the group's weights that mean is d^T H d, H the group's
    moments, so all tokens count and a step costs g instead of n multiplications a weight.

    Args:
        weight: [N, K].
        moments: [K/g, g, g] from :func:`group_moments`.
        bits: width of a value.
        grid, max_shrink: bounds tried: the first ``grid * max_shrink`` of ``grid``.

    Returns:
        [N, K/g, 1], the bounds.
    """
    groups, group, _ = moments.shape
    tried = int(max_shrink * grid)
    if _has_clip_kernel(weight, group):
        from toolkit.quantize.search.kernels import clip as _clip_kernel

        return _clip_kernel.best_clip(weight, moments.contiguous(), bits, grid, tried, _MIN_RANGE)
    # a few rows at a time: what is tried is four times as large as what it is tried on
    chunks = weight.float().view(-1, groups, group).split(max(1, _CLIP_WEIGHTS // (groups * group)))
    return torch.cat([_best_clip(w, moments, bits, grid, tried) for w in chunks])


def _has_clip_kernel(weight: torch.Tensor, group: int) -> bool:
    """Return whether the Triton kernel takes this weight: groups that fill its tiles, a GPU that multiplies in TF32."""
    device = weight.device
    return (
        weight.is_cuda
        and group in (32, 64, 128)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and trusted(f"clips of {group}", device, lambda: _clip_kernel_agrees(device, group))
    )


def _clip_kernel_agrees(device: torch.device, group: int) -> bool:
    """Search the clips of a small weight with the kernel and without; near ties may fall either way."""
    from toolkit.quantize.search.kernels import clip as _clip_kernel

    rng = torch.Generator().manual_seed(0)
    weight = (torch.randn(100, 2 * group, generator=rng) ** 3).to(device)
    x = (torch.randn(500, 2 * group, generator=rng) @ torch.randn(2 * group, 2 * group, generator=rng)).to(device)
    moments = group_moments(x, group)
    w = weight.view(100, 2, group)

    def loss(bounds: torch.Tensor) -> float:
        d = (_snap(w.clamp(-bounds, bounds), 4) - w).transpose(0, 1)
        return float((torch.bmm(d, moments) * d).sum())

    ours = loss(_clip_kernel.best_clip(weight, moments, 4, 20, 10, _MIN_RANGE))
    return ours <= 1.01 * loss(_best_clip(w, moments, 4, 20, 10))


def _best_clip(w: torch.Tensor, moments: torch.Tensor, bits: int, grid: int, tried: int) -> torch.Tensor:
    widest = w.abs().amax(-1, keepdim=True)
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for step in range(tried):
        bound = widest * (1 - step / grid)
        d = _snap(w.clamp(-bound, bound), bits).sub_(w).transpose(0, 1)
        loss = torch.bmm(d, moments).mul_(d).sum(-1).t().unsqueeze(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, bound, best)
    return best


class Moments:
    """Second moments and mean sizes of a linear layer's inputs, summed over tokens in float32.

    ``second``: [K, K], sum of w x x^T. ``sizes``: [K], sum of w |x|; both are means once :meth:`finish` was called.
    ``weight``: sum of the tokens' weights w. ``tokens``: how many tokens of equal weight would tell as much.
    """

    #: Columns that are multiplied at once: H is symmetric, so only blocks on and above the diagonal are computed.
    _BLOCK = 2048

    def __init__(self, inputs: int, device: torch.device, *, narrow: bool = False) -> None:
        """Args: K, where the sums are, and whether inputs are rounded to bfloat16 before they are multiplied."""
        self.narrow = narrow
        self.second = torch.zeros(inputs, inputs, device=device)
        self.sizes = torch.zeros(inputs, device=device)
        self.weight = self._squares = 0.0

    @property
    def tokens(self) -> float:
        """(sum of w)^2 / sum of w^2."""
        return self.weight**2 / self._squares

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens [n, K], any float dtype; ``weights`` [n] scale what each counts (None: 1); ``x`` may change."""
        if weights is None:
            self.weight += x.shape[0]
            self._squares += x.shape[0]
        else:
            self.weight += float(weights.sum())
            self._squares += float(weights.square().sum())
            x = x.float().mul_(weights.sqrt().unsqueeze(1))
        if weights is None:
            self.sizes += torch.linalg.vector_norm(x, 1, dim=0, dtype=torch.float32)
        else:
            self.sizes += weights.sqrt() @ x.abs()
        x = x.bfloat16() if self.narrow else x.float()
        for start in range(0, x.shape[1], self._BLOCK):
            block = slice(start, start + self._BLOCK)
            if self.narrow:
                self.second[block, start:] += _product(x[:, block].t(), x[:, start:])
            else:
                self.second[block, start:].addmm_(x[:, block].t(), x[:, start:])

    def finish(self) -> None:
        """Divide by the weight, fill in the lower half."""
        self.second /= self.weight
        self.sizes /= self.weight
        columns = self.second.shape[0]
        for start in range(0, columns, self._BLOCK):
            stop = min(start + self._BLOCK, columns)
            self.second[stop:, start:stop] = self.second[start:stop, stop:].t()

    def blocks(self, group_size: int, scales: torch.Tensor | None = None) -> torch.Tensor:
        """Return the diagonal blocks [K/g, g, g] for inputs divided by ``scales`` [K]."""
        columns = self.second.shape[0]
        group = columns if group_size == -1 else group_size
        groups = columns // group
        blocks = torch.stack(
            [self.second[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(groups)]
        )
        if scales is not None:
            s = scales.view(groups, group)
            blocks /= s.unsqueeze(1) * s.unsqueeze(2)
        return blocks


def weight_means(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return, of each input channel, the mean size of its weights [N, K] within their groups, 0 to 1: [K] float32."""
    groups = weight.float().view(-1, weight.shape[1] if group_size == -1 else group_size).abs()
    return (groups / (groups.amax(1, keepdim=True) + 1e-6)).view_as(weight).mean(0)


def scale_candidates(x_sizes: torch.Tensor, w_sizes: torch.Tensor | None, ratios: torch.Tensor) -> torch.Tensor:
    """Return AWQ's scales [R, K] for exponents r: plain, x^r, or with ``w_sizes`` its duo scaling, x^r / w^(1-r).

    Args:
        x_sizes: [K], how large each input channel is.
        w_sizes: [K], how large its weights are, 0 to 1.
        ratios: [R], the exponents, 0 to 1.
    """
    r = ratios.unsqueeze(1)
    scales = x_sizes.clamp(min=1e-6).unsqueeze(0).pow(r)
    if w_sizes is not None:
        scales = scales / (w_sizes.pow(1 - r) + 1e-4)
    scales = scales.clamp(min=1e-4)
    return scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()


def screen(
    weight: torch.Tensor, moments: torch.Tensor, candidates: torch.Tensor, group_size: int, bits: int = 4
) -> torch.Tensor:
    """Return tr(D H D^T) [C] of each candidate's rounding error D.

    Args:
        weight: [N, K] float32.
        moments: H, [K, K] float32, or bfloat16 where that is enough and faster; sums are float32.
        candidates: scales [C, K].
        group_size, bits: of the grid.
    """
    losses = []
    for scales in candidates:
        error = round_error(weight, scales, group_size, bits)
        losses.append(_product(error, moments).mul_(error).sum())
    return torch.stack(losses)
