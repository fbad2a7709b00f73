"""X, Y, G of a layer -> statistics. Pure functions: they know no hook and no model.

Results come as functions of no arguments, to be called once the collector has fetched what waits on a GPU. T is the
number of rows of X [T, I] and G [T, O] (tokens, all leading dimensions together), N the number of samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zest_fast.foundation.torch_private import ragged_dimension
from zest_fast.kernels import Collector, GradientMoments, Moments
from zest_fast.kernels.channels import by_channel
from zest_fast.kernels.moments import SquaredProducts
from zest_fast.profiling.layers import Layer, channel_dim, is_transformers_conv1d

_PLAIN_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
_PLAIN_FUNCTIONS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.Linear: ("linear", functional.linear),
    nn.Conv1d: ("conv1d", functional.conv1d),
    nn.Conv2d: ("conv2d", functional.conv2d),
    nn.Conv3d: ("conv3d", functional.conv3d),
}
_GRAM_ROWS = 64  # rows of X and G that are turned to float64 at once


def has_tile_rule(module: nn.Module) -> bool:
    """Whether dW = GᵀX (or XᵀG) is exact for this module: plain Linear or transformers' Conv1D, forward as shipped.

    A forward or a function that somebody put in the place of torch's (on the class, in ``torch.nn.functional``) may
    compute anything.
    """
    if "forward" in vars(module) or "weight" not in module._parameters:
        return False
    if isinstance(module, nn.Linear):
        return _is_shipped(type(module).forward, nn.Linear)
    return is_transformers_conv1d(module) and type(module).__name__ == "Conv1D" and _is_conv1d(type(module).forward)


def _is_shipped(forward: Any, kind: type[nn.Module]) -> bool:
    """Whether it is the forward that torch ships for this kind of module, and calls the function that torch ships."""
    name, function = _PLAIN_FUNCTIONS[kind]
    return (
        forward is _PLAIN_FORWARDS[kind]
        and _stands_in(forward, kind.__module__)
        and getattr(functional, name) is function
    )


def _is_conv1d(forward: Any) -> bool:
    return _stands_in(forward, "transformers.pytorch_utils")


def _stands_in(function: Any, module: str) -> bool:
    """Whether the code of a function was written in that module."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == getattr(sys.modules.get(module), "__file__", None)


def has_output_rule(layer: Layer) -> bool:
    """Whether Y can be had again from X alone (``output_again``): plain linear layers and convolutions."""
    module = layer.output_module
    if module is not layer.module or module is None or "forward" in vars(module):
        return False
    plain = any(_is_shipped(type(module).forward, kind) for kind in _PLAIN_FORWARDS if isinstance(module, kind))
    return plain or has_tile_rule(module)


def rows(x: Tensor) -> Tensor:
    """[..., I] -> [T, I]; T is counted, since -1 has no meaning where I is 0."""
    return x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_gradient_moments(
    collector: Collector, module: nn.Module, x: Tensor, g: Tensor
) -> Callable[[], GradientMoments]:
    """Every statistic of dW and W of a linear layer, dW formed tile by tile; x [..., I], g [..., O]."""
    left, right = linear_gradient_factors(module, x, g)
    return collector.linear_gradient_moments(right, left, _weight(module))


def linear_gradient(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """dW itself, for a weight whose uses have to be added up first."""
    left, right = linear_gradient_factors(module, x, g)
    return (left.t() @ right).to(_weight(module).dtype)


def linear_gradient_factors(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """L [T, rows of W] and R [T, columns of W] with dW = LᵀR; x [..., I], g [..., O]."""
    x, g = rows(x).to(g.dtype), rows(g)
    return (x, g) if is_transformers_conv1d(module) else (g, x)  # the former's W is [I, O]


def linear_gradient_moments_without_tiles(
    collector: Collector, module: nn.Module, x: Tensor, g: Tensor, product: bool
) -> Callable[[], GradientMoments]:
    """The statistics of dW that have closed forms; those of |dW| and |W⊙dW| are NaN.

    ΣdW = Σ_t (Σ_i X_ti)(Σ_k G_tk), ‖dW‖² = Σ_ts (x_t·x_s)(g_t·g_s), ΣW⊙dW = Σ_tk (x_t·w_k) G_tk (only where
    ``product``). Float64 throughout, since the sums may cancel. x_t·w_k is Y without its bias, computed anew: Y is
    rounded to the digits of the bias, under which a small product is noise, and may have been overwritten.
    """
    x, g, weight = rows(x), rows(g), _weight(module)
    matrix = weight if is_transformers_conv1d(module) else weight.t()
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)  # of dW, of its squares, of W⊙dW
    for start in range(0, len(x), _GRAM_ROWS):
        xs, gs = x[start : start + _GRAM_ROWS].double(), g[start : start + _GRAM_ROWS].double()
        sums[0] += xs.sum(1) @ gs.sum(1)
        if product:
            sums[2] += ((x[start : start + _GRAM_ROWS] @ matrix).double() * gs).sum()
        for other in range(0, start + 1, _GRAM_ROWS):
            xo, go = x[other : other + _GRAM_ROWS].double(), g[other : other + _GRAM_ROWS].double()
            sums[1] += ((xs @ xo.t()) * (gs @ go.t())).sum() * (1 if other == start else 2)
    (of_weight,) = collector.moments([weight])
    of_gradient = collector.numbers(sums, lambda *found: found)

    def result() -> GradientMoments:
        (total, square, of_both), w, count = of_gradient(), of_weight(), float(weight.numel())
        m2 = max(square - total**2 / count, 0.0) if count else 0.0
        nonfinite = 0.0 if math.isfinite(total + square) else 1.0
        gradient = Moments.checked(count, total / max(count, 1.0), m2, math.nan, math.nan, nonfinite)
        return GradientMoments.checked(gradient, w.mean, w.m2, w.nonfinite, of_both if product else math.nan, math.nan)

    return result


def weight_gradient_moments(collector: Collector, dw: Tensor, weight: Tensor) -> Callable[[], GradientMoments]:
    """Every statistic of a gradient that exists as a whole; any layer."""
    if dw.layout != torch.strided:  # nn.Embedding(sparse=True)
        dw = dw.coalesce().to_dense()
    return collector.gradient_moments(dw.detach(), weight.detach())


def products_of_one_use(collector: Collector, layer: Layer, y: Tensor, g: Tensor) -> Callable[[], SquaredProducts]:
    """What fisher is made of, Σ S² with S [N, K] = Σ_p Y⊙G, without S."""
    y, g, channel = _alike(layer, y, g)
    return _over(y.shape[0], collector.squared_channel_products(y.detach(), g.detach(), channel))


def output_products(collector: Collector, layer: Layer, y: Tensor, g: Tensor) -> Tensor:
    """S [N, K] = Σ_p Y⊙G in float64, for a layer whose uses have to be added up first."""
    if y.is_nested:
        return _jagged_products(y, g)
    y, g, channel = _alike(layer, y, g)
    return collector.channel_products(by_channel(y, channel), by_channel(g, channel))


def _jagged_products(y: Tensor, g: Tensor) -> Tensor:
    """``output_products`` of samples of different lengths, [N, j, K], by plain torch."""
    values, offsets = jagged_rows(y)
    gradients, _ = jagged_rows(g)
    products = values.double() * gradients.double()
    samples = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=y.device), offsets.diff())
    sums = products.new_zeros(len(offsets) - 1, products.shape[-1])
    return sums.index_add_(0, samples, products.flatten(1, -2).sum(1) if products.dim() > 2 else products)


def jagged_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of every sample, one after another, and where each sample begins, of a jagged tensor [N, j, ...].

    Raises ValueError for another kind of nested tensor.
    """
    if x.layout != torch.jagged or x.lengths() is not None or ragged_dimension(x) != 1:  # type: ignore[attr-defined]
        raise ValueError(
            "its output is a nested tensor whose samples do not lie dense, one after another; use the layout "
            "torch.jagged without gaps, or pad the batch"
        )
    return x.detach().values(), x.offsets()  # type: ignore[attr-defined]


def squared_products(collector: Collector, s: Tensor) -> Callable[[], SquaredProducts]:
    """The same of S [N, K], all uses added up."""
    return _over(s.shape[0], collector.numbers(s.square().sum()[None], float))


def _over(samples: int, total: Callable[[], float]) -> Callable[[], SquaredProducts]:
    return lambda: SquaredProducts(total(), samples)


def output_again(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Y from X, for a layer whose output of this dtype was overwritten in place after it was computed."""
    weight = _weight(module)
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != weight.dtype)
    with torch.no_grad(), autocast:
        return type(module).forward(module, x.detach())


def _alike(layer: Layer, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, int]:
    """y and g of one dtype, samples first, and which dimension has the channels."""
    channel = channel_dim(layer, y)
    if y.dim() <= -channel:  # an input without a batch dimension: one sample
        missing = 1 - channel - y.dim()
        y, g = y.reshape((1,) * missing + y.shape), g.reshape((1,) * missing + g.shape)
    if g.dtype != y.dtype:
        g = g.to(y.dtype)
    return y, g, channel % y.dim()


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()
