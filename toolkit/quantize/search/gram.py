"""Second moments of a linear's inputs, which are their Gram matrix over the number of tokens.

A linear layer y = W x whose weight is replaced by W + D errs, over n tokens X [n, K], by a mean square of
tr(D H D^T) with H = X^T X / n: a candidate costs N K^2 multiplications whatever the number of tokens, and no forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from toolkit.quantize.search.kernels.trust import trusted
from toolkit.quantize.stream.states import Inputs

__all__ = ["Moments", "PairedMoments", "exact_products", "group_moments", "product", "takes_bfloat16"]


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
                self.second[block, start:] += product(x[:, block].t(), x[:, start:])
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


class PairedMoments(Moments):
    """Moments of inputs behind layers that are quantized, and how the source's inputs differ from them.

    ``drift``: [K, K], mean of w (x_source - x) x^T once :meth:`finish` was called: entry (i, k) says how much of what
    channel i has lost goes with channel k. ``lack``: [R, K], the same of what the outputs are added to.
    """

    def __init__(self, inputs: int, residual: int, device: torch.device, *, narrow: bool = False) -> None:
        """Args: K; R, the width of what the outputs are added to (0: to nothing); the others as for `Moments`."""
        super().__init__(inputs, device, narrow=narrow)
        self.drift = torch.zeros(inputs, inputs, device=device)
        self.lack = torch.zeros(residual, inputs, device=device)

    def add_pair(self, source: Inputs, behind: Inputs, weights: torch.Tensor | None = None) -> None:
        """Add the same tokens in the source and behind quantized layers; all may be overwritten."""
        x = behind.x.float()
        narrowed = x.bfloat16() if self.narrow else x
        self._add_product(self.drift, source.x.float().sub_(x), narrowed, weights)
        if behind.residual is not None and source.residual is not None:
            self._add_product(self.lack, source.residual.float() - behind.residual, narrowed, weights)
        self.add(x, weights)

    def _add_product(self, to: torch.Tensor, lost: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add lost^T x to what is [R, K], some rows at a time; ``lost`` [n, R] is overwritten."""
        lost = lost if weights is None else lost.mul_(weights.unsqueeze(1))
        lost = lost.to(x.dtype)
        for start in range(0, lost.shape[1], self._BLOCK):
            block = slice(start, start + self._BLOCK)
            if self.narrow:
                to[block] += product(lost[:, block].t(), x)
            else:
                to[block].addmm_(lost[:, block].t(), x)

    def finish(self) -> None:
        """Divide by the weight, fill in the lower half."""
        self.drift /= self.weight
        self.lack /= self.weight
        super().finish()


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
    return torch.equal(product(a, b).cpu(), a.float().cpu() @ b.float().cpu())


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 in float32 in the block, where a GPU was allowed to round factors to TF32's ten bits.

    For systems of equations, whose solution is as many times less exact than their matrix as its condition says.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a [n, k] b [k, m] in float32, the factors in b's precision."""
    if b.dtype == torch.float32:
        return a @ b
    if b.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(b.dtype).float() @ b.float()
