"""The statistics of zest_fast.kernels in PyTorch, three times.

    separate_*  the definitions, one torch expression per statistic
    lean_*      sums from which they follow, each by the reduction that torch runs fastest, in reused temporaries
    compiled_*  the same sums in one expression, fused by torch.compile (needs a C++ compiler at run time)

lean and compiled take the deviation from Σx² - (Σx)²/n, which loses digits on offset data; the kernels do not. They get
this advantage because it makes them stronger opponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Sums = dict[str, Tensor]
SUMS_OF_X = ("sum", "square", "abs")  #: in the order of compiled_moments
SUMS_OF_GRADIENT = ("grad_sum", "grad_square", "grad_abs", "weight_sum", "weight_square", "product_abs", "product")
BLOCK = 1 << 16  # entries: four blocks of float32 fit a second-level cache of 1 MiB, and 2 µs a call do not matter yet


class Scratch:
    """Two buffers that grow to the largest tensor and are reused: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0), torch.empty(0)]

    def like(self, x: Tensor, which: int = 0) -> Tensor:
        """An uninitialised, contiguous tensor of x's shape and dtype."""
        buffer = self._buffers[which]
        if buffer.numel() < x.numel() or buffer.dtype != x.dtype:
            buffer = self._buffers[which] = x.new_empty(x.numel())
        return buffer[: x.numel()].view(x.shape)


def separate_moments(x: Tensor) -> Sums:
    """Mean and deviation of x and of |x|, any shape."""
    return {
        "mean": x.mean(),
        "std": x.std(correction=0),
        "abs_mean": x.abs().mean(),
        "abs_std": x.abs().std(correction=0),
    }


def separate_gradient_moments(dw: Tensor, w: Tensor) -> Sums:
    """The moments of dW, mean, deviation and norm of W, the norm of dW, and plain and snip."""
    return {
        **separate_moments(dw),
        "norm": dw.norm(),
        "weight_mean": w.mean(),
        "weight_std": w.std(correction=0),
        "weight_norm": w.norm(),
        "plain": (w * dw).mean(),
        "snip": (w * dw).abs().sum(),
    }


def lean_moments(x: Tensor, scratch: Scratch) -> Sums:
    """Σx, Σx² and Σ|x|."""
    rows = [_block_moments(block, scratch) for block in x.reshape(-1).split(BLOCK)]
    return _total(SUMS_OF_X, rows)


def _block_moments(x: Tensor, scratch: Scratch) -> tuple[Tensor, ...]:
    return x.sum(), _square(x), torch.abs(x, out=scratch.like(x)).sum()


def lean_gradient_moments(dw: Tensor, w: Tensor, scratch: Scratch) -> Sums:
    """Σ and Σ² of dW and W, Σ|dW|, ΣW⊙dW, and Σ|W⊙dW| as the dot product of |W| and |dW|."""
    blocks = zip(dw.reshape(-1).split(BLOCK), w.reshape(-1).split(BLOCK), strict=True)
    rows = [_block_gradient_moments(dw_block, w_block, scratch) for dw_block, w_block in blocks]
    return _total(SUMS_OF_GRADIENT, rows)


def _block_gradient_moments(dw: Tensor, w: Tensor, scratch: Scratch) -> tuple[Tensor, ...]:
    abs_w, abs_dw = torch.abs(w, out=scratch.like(w)), torch.abs(dw, out=scratch.like(dw, 1))
    of_dw = dw.sum(), _square(dw), abs_dw.sum()
    return (*of_dw, w.sum(), _square(w), _dot(abs_w, abs_dw, out=abs_w), _dot(w, dw, out=abs_w))


def _total(names: tuple[str, ...], rows: list[tuple[Tensor, ...]]) -> Sums:
    """The sums of all blocks; a single block needs no adding up."""
    if len(rows) == 1:
        return dict(zip(names, rows[0], strict=True))
    flat = torch.stack([value for row in rows for value in row])
    return dict(zip(names, flat.view(len(rows), -1).sum(0), strict=True))


def _square(x: Tensor) -> Tensor:
    """Σx² by the fastest reduction for the dtype: torch.dot is 400 times slower in bfloat16."""
    return torch.dot(x, x) if x.dtype in (torch.float32, torch.float64) else torch.linalg.vector_norm(x).square()


def _dot(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Σxy, likewise; `out` may be overwritten with the products."""
    return torch.dot(x, y) if x.dtype in (torch.float32, torch.float64) else torch.mul(x, y, out=out).sum()


def statistics_of_x(n: int, sums: Mapping[str, float]) -> dict[str, float]:
    """What separate_moments gives, of the sums of lean_moments over n entries."""
    mean, std = mean_and_deviation(n, sums["sum"], sums["square"])
    abs_mean, abs_std = mean_and_deviation(n, sums["abs"], sums["square"])
    return {"mean": mean, "std": std, "abs_mean": abs_mean, "abs_std": abs_std}


def statistics_of_gradient(n: int, sums: Mapping[str, float]) -> dict[str, float]:
    """What separate_gradient_moments gives, of the sums of lean_gradient_moments over n entries."""
    of_dw = {name: sums[f"grad_{name}"] for name in SUMS_OF_X}
    weight_mean, weight_std = mean_and_deviation(n, sums["weight_sum"], sums["weight_square"])
    return {
        **statistics_of_x(n, of_dw),
        "norm": math.sqrt(sums["grad_square"]),
        "weight_mean": weight_mean,
        "weight_std": weight_std,
        "weight_norm": math.sqrt(sums["weight_square"]),
        "plain": sums["product"] / n,
        "snip": sums["product_abs"],
    }


def mean_and_deviation(n: int, total: float, square: float) -> tuple[float, float]:
    """Of n entries, of their sum and their sum of squares."""
    mean = total / n
    return mean, math.sqrt(max(0.0, square / n - mean * mean))


def separate_channel_products(y: Tensor, g: Tensor, positions: list[int]) -> Tensor:
    """S [N, K] = Σ over the dimensions `positions` of Y⊙G."""
    return (y * g).sum(positions)


def lean_channel_products(y: Tensor, g: Tensor, positions: list[int], scratch: Scratch) -> Tensor:
    """The same sample by sample with the product in a reused buffer (einsum, vecdot and bmm were slower)."""
    inner = [position - 1 for position in positions]
    return torch.stack([torch.mul(a, b, out=scratch.like(a)).sum(inner) for a, b in zip(y, g, strict=True)])


def compiled_moments() -> Callable[[Tensor], Any]:
    """A compiled function x -> the sums of lean_moments, in float32."""

    def sums(x: Tensor) -> Tensor:
        x = x.float()
        return torch.stack([x.sum(), (x * x).sum(), x.abs().sum()])

    return torch.compile(sums, dynamic=True)


def compiled_gradient_moments() -> Callable[[Tensor, Tensor], Any]:
    """A compiled function (dw, w) -> the sums of lean_gradient_moments, in float32."""

    def sums(dw: Tensor, w: Tensor) -> Tensor:
        dw, w = dw.float(), w.float()
        product = w * dw
        terms = (dw, dw * dw, dw.abs(), w, w * w, product.abs(), product)
        return torch.stack([term.sum() for term in terms])

    return torch.compile(sums, dynamic=True)


def compiled_channel_products(positions: list[int]) -> Callable[[Tensor, Tensor], Any]:
    """A compiled function (y, g) -> S [N, K]."""
    return torch.compile(lambda y, g: (y.float() * g.float()).sum(positions), dynamic=True)
