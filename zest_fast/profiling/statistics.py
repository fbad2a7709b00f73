"""What one pass learns of each layer: the observer of the taps reduces what it is handed and keeps numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zest_fast import kernels
from zest_fast.kernels import GradientMoments, Moments
from zest_fast.profiling import layer_rules
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.metrics import NEEDS_TILES, PRODUCT, WEIGHT, LayerStatistics


class Statistics:
    """The observer of one pass.

    Args:
        needed: kinds of statistics, as ``zest_fast.profiling.metrics.statistics_needed`` gives them.
        backend: as in ``zest_fast.profile``.
    """

    def __init__(self, needed: frozenset[str], backend: str) -> None:
        self.needed = needed
        self.backend = backend
        self._products: dict[Layer, list[Tensor]] = {}
        self.outputs: dict[Layer, Moments] = {}
        self.gradients: dict[Weight, GradientMoments] = {}
        self.fisher: dict[Layer, float] = {}

    def output(self, layer: Layer, y: Tensor) -> None:
        found = kernels.implementation(self.backend, y.device).moments(y)
        before = self.outputs.get(layer)
        self.outputs[layer] = found if before is None else before.merge(found)

    def linear(self, layer: Layer, x: Tensor, g: Tensor, y: Callable[[], Tensor]) -> None:
        if NEEDS_TILES & self.needed or x.dtype != g.dtype:
            found = layer_rules.linear_gradient_moments(layer.module, x, g, self.backend)
        else:
            found = layer_rules.linear_gradient_moments_without_tiles(
                layer.module, x, g, y() if PRODUCT in self.needed else None
            )
        self.gradients[layer.weight] = found

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        self.gradients[weight] = layer_rules.weight_gradient_moments(dw, weight.parameter, self.backend)

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        if only_use:
            self.fisher[layer] = layer_rules.fisher_of_one_use(layer, y(), g, self.backend)
        else:
            self._products.setdefault(layer, []).append(layer_rules.output_products(layer, y(), g, self.backend))

    def finish(self) -> None:
        """S of several uses is summed first; where they differ in the number of samples, fisher is summed over uses."""
        for layer, products in self._products.items():
            if len({s.shape for s in products}) == 1:
                products = [torch.stack(products).sum(0)]
            self.fisher[layer] = sum(layer_rules.fisher_of_products(s) for s in products)

    def of(self, layer: Layer, loss_scale: float) -> tuple[LayerStatistics, int]:
        """The statistics of a layer, gradients divided by the loss scale, and how many entries were not finite."""
        weight = layer.weight.parameter.detach()
        s = LayerStatistics(count=float(weight.numel()))
        nonfinite = 0.0
        gradients = self.gradients.get(layer.weight)
        if gradients is not None:
            s.weight_mean, s.weight_std = gradients.weight_mean, gradients.weight_std
            s.weight_norm = gradients.weight_norm
            s.gradient = _divided(gradients.gradient, loss_scale)
            s.product_sum = gradients.product_sum / loss_scale
            s.product_abs_sum = gradients.product_abs_sum / loss_scale
            nonfinite += gradients.gradient.nonfinite + gradients.weight_nonfinite
        elif WEIGHT in self.needed:
            w = kernels.moments([weight], backend=self.backend)[0]
            s.weight_mean, s.weight_std, s.weight_norm = w.mean, w.std, w.norm
            nonfinite += w.nonfinite
        if layer in self.outputs:
            s.output = self.outputs[layer]
            nonfinite += s.output.nonfinite
        if layer in self.fisher:
            s.fisher = self.fisher[layer] / loss_scale**2
            if not math.isfinite(s.fisher):
                s.fisher = math.nan
        return s, int(nonfinite)


def _divided(m: Moments, scale: float) -> Moments:
    if scale == 1.0:
        return m
    return Moments(m.count, m.mean / scale, m.m2 / scale**2, m.abs_mean / scale, m.abs_m2 / scale**2, m.nonfinite)
