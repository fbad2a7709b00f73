"""What one pass learns of each layer: the observer of the taps reduces what it is handed and keeps numbers only."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zest_fast.foundation.nearest import some
from zest_fast.kernels import Collector, GradientMoments, Moments
from zest_fast.kernels.moments import SquaredProducts
from zest_fast.profiling import layer_rules
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.metrics import NEEDS_TILES, PRODUCT, WEIGHT, LayerStatistics
from zest_fast.profiling.processes.local import local_part

_Products = Callable[[], SquaredProducts]
_OUTPUT_NAME = "its output"
# Of means over a whole tensor, in which the rounding of a second computation (checkpointing) averages out.
_AGAIN, _AGAIN_ON_A_GPU = 1e-6, 1e-4


def naming_the_layer(method: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel refuses is an error that names the layer (or parameter) it was refused for."""

    @functools.wraps(method)
    def wrapped(self: Statistics, subject: Layer | Weight, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, subject, *arguments, **options)
        except (ValueError, TypeError, NotImplementedError) as error:
            name = subject.name if isinstance(subject, Layer) else subject.layers[0].name
            refusal = type(error)(f"layer {name!r}: {error}")
            refusal.is_final = True  # type: ignore[union-attr]  # another run would only go around it
            raise refusal from error

    return wrapped


class Statistics:
    """The observer of one pass. Results may wait on a GPU until ``finish``.

    Args:
        needed: kinds of statistics, as ``zest_fast.profiling.metrics.statistics_needed`` gives them.
        backend: as in ``zest_fast.profile``.
        may_be_written: whether somebody may have written into an output since the layer returned it.
    """

    def __init__(
        self, needed: frozenset[str], backend: str, may_be_written: Callable[[Tensor], bool] = lambda y: True
    ) -> None:
        self.needed = needed
        self.backend = backend
        self._may_be_written = may_be_written
        self.collector = Collector(backend)
        self._outputs: dict[Layer, list[Callable[[], Moments]]] = {}
        self._gradients: dict[Weight, Callable[[], GradientMoments]] = {}
        self._weights: dict[Weight, Callable[[], Moments]] = {}
        self._products: dict[Layer, list[Tensor]] = {}
        self._fisher: dict[Layer, list[_Products]] = {}
        self._fisher_of_passes: dict[Layer, list[list[_Products]]] = {}
        self.outputs: dict[Layer, Moments] = {}
        self.gradients: dict[Weight, GradientMoments] = {}
        self.weights: dict[Weight, Moments] = {}
        self.fisher: dict[Layer, list[SquaredProducts]] = {}
        """One of each use, where uses cannot be added up first."""
        self.missed_outputs: dict[Layer, str] = {}
        """Layers some of whose outputs could not be observed, and why: what is known of the others is not used."""
        self.missed_gradients: dict[Layer, str] = {}
        """The same of the gradients of their outputs."""
        self._outputs_again: dict[Layer, list[tuple[Callable[[], Moments], float]]] = {}
        self.overwritten: set[Layer] = set()
        """Layers whose output was written to past autograd after they returned it, so that S is not theirs."""

    @naming_the_layer
    def output(self, layer: Layer, y: Tensor) -> Callable[[], None] | None:
        self._outputs.setdefault(layer, []).append(self._output_moments(y))
        return None

    def _output_moments(self, y: Tensor) -> Callable[[], Moments]:
        return self.collector.moments_of(_entries(y), _OUTPUT_NAME)

    @naming_the_layer
    def linear(self, layer: Layer, x: Tensor, g: Tensor) -> None:
        # ΣW⊙dW = Σ(x·w)⊙G holds for products before rounding: in half precision tiles are nearer to the truth.
        rounded = PRODUCT in self.needed and g.dtype.itemsize < 4
        if NEEDS_TILES & self.needed or x.dtype != g.dtype or rounded:
            found = layer_rules.linear_gradient_moments(self.collector, layer.module, x, g)
        else:
            found = layer_rules.linear_gradient_moments_without_tiles(
                self.collector, layer.module, x, g, PRODUCT in self.needed
            )
        self._gradients[layer.weight] = found

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        self.reduce(weight, dw, weight.parameter)

    @naming_the_layer
    def reduce(self, weight: Weight, dw: Tensor, w: Tensor) -> None:
        """Statistics of a gradient and of a weight, or of the parts of them that lie here."""
        self._gradients[weight] = layer_rules.weight_gradient_moments(self.collector, dw, w)

    @naming_the_layer
    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        output = y()
        self._require_as_returned(layer, output)
        if only_use and not output.is_nested:
            self._fisher[layer] = [layer_rules.products_of_one_use(self.collector, layer, output, g)]
        else:
            products = layer_rules.output_products(self.collector, layer, output, g)
            self._products.setdefault(layer, []).append(products)

    def untouched(self, layer: Layer) -> None:
        self._fisher[layer] = []

    def missed(self, layer: Layer, why: str, *, outputs: bool) -> None:
        self.missed_gradients[layer] = why
        if outputs:
            self.missed_outputs[layer] = why

    def _require_as_returned(self, layer: Layer, y: Tensor) -> None:
        """Notes what tells, once results are there, whether Y is still what the layer returned (see ``finish``)."""
        if self._may_be_written(_entries(y)):
            found = self._output_moments(y)
            self._outputs_again.setdefault(layer, []).append((found, _AGAIN if y.is_cpu else _AGAIN_ON_A_GPU))

    def end_pass(self) -> None:
        """What comes from now on are gradients of another backward pass, over other samples of the same batch.

        S of several uses is summed first; where they differ in the number of samples, fisher is summed over uses.
        """
        for layer, products in self._products.items():
            if len({s.shape for s in products}) == 1:
                products = [torch.stack(products).sum(0)]
            self._fisher[layer] = [layer_rules.squared_products(self.collector, s) for s in products]
        for layer, uses in self._fisher.items():
            self._fisher_of_passes.setdefault(layer, []).append(uses)
        self._products.clear()
        self._fisher.clear()

    def finish(self, layers: Iterable[Layer]) -> None:
        """Fetches all results, and the statistics of weights that no gradient brought along."""
        self.end_pass()
        for layer in self.missed_outputs:
            self._outputs.pop(layer, None)
        for layer in self.missed_gradients:
            self._fisher_of_passes.pop(layer, None)
        if WEIGHT in self.needed:
            by_device: dict[torch.device, list[Weight]] = {}
            for weight in {layer.weight: None for layer in layers if layer.weight not in self._gradients}:
                by_device.setdefault(weight.parameter.device, []).append(weight)
            for weights in by_device.values():
                names = [f"the weight of layer {weight.layers[0].name!r}" for weight in weights]
                try:
                    found = self.collector.moments([local_part(weight.parameter.detach()) for weight in weights], names)
                except (ValueError, TypeError, NotImplementedError) as error:
                    raise type(error)(f"weights of {some(w.layers[0].name for w in weights)}: {error}") from error
                self._weights.update(zip(weights, found, strict=True))
        self.collector.fetch()
        self.outputs = {layer: _merged([later() for later in found]) for layer, found in self._outputs.items()}
        self.gradients = {weight: later() for weight, later in self._gradients.items()}
        self.weights = {weight: later() for weight, later in self._weights.items()}
        self.fisher = {layer: _of_all_passes(passes) for layer, passes in self._fisher_of_passes.items()}
        for layer, again in self._outputs_again.items():
            returned = [later() for later in self._outputs.get(layer, ())]
            if returned and not all(any(_alike(a(), b, rel) for b in returned) for a, rel in again):
                self.overwritten.add(layer)

    def of(self, layer: Layer, loss_scale: float) -> tuple[LayerStatistics, int]:
        """The statistics of a layer, gradients divided by the loss scale, and how many entries were not finite."""
        s = LayerStatistics(count=float(layer.weight.parameter.numel()))
        nonfinite = 0.0
        gradients = self.gradients.get(layer.weight)
        if gradients is not None:
            s.weight_mean, s.weight_std = gradients.weight_mean, gradients.weight_std
            s.weight_norm = gradients.weight_norm
            s.gradient = _divided(gradients.gradient, loss_scale)
            s.product_sum = gradients.product_sum / loss_scale
            s.product_abs_sum = gradients.product_abs_sum / loss_scale
            nonfinite += gradients.gradient.nonfinite + gradients.weight_nonfinite
        elif layer.weight in self.weights:
            w = self.weights[layer.weight]
            s.weight_mean, s.weight_std, s.weight_norm = w.mean, w.std, w.norm
            nonfinite += w.nonfinite
        if layer in self.outputs:
            s.output = self.outputs[layer]
            nonfinite += s.output.nonfinite
        if layer in self.fisher:
            s.fisher = sum(products.fisher for products in self.fisher[layer]) / loss_scale**2
            if not math.isfinite(s.fisher):
                s.fisher = math.nan
        return s, int(nonfinite)


def _entries(y: Tensor) -> Tensor:
    """All of them, in the memory where they lie: the rows of a jagged tensor."""
    return layer_rules.jagged_rows(y)[0] if y.is_nested else y


def _alike(a: Moments, b: Moments, rel: float) -> bool:
    """Whether two sets of moments are those of one tensor, or of one that was computed again (checkpointing)."""
    if a.nonfinite or b.nonfinite:
        return a.nonfinite == b.nonfinite
    close = functools.partial(math.isclose, rel_tol=rel)
    return (
        a.count == b.count
        and abs(a.mean - b.mean) <= rel * a.abs_mean
        and close(a.abs_mean, b.abs_mean)
        and close(a.norm, b.norm)
    ) or a.count == b.count == 0


def _of_all_passes(passes: list[list[_Products]]) -> list[SquaredProducts]:
    """For each use, of the samples of all backward passes as one batch; NaN where these differ in their uses."""
    if len({len(uses) for uses in passes}) > 1:
        return [SquaredProducts(math.nan, 1)]
    return [functools.reduce(SquaredProducts.merge, (later() for later in use)) for use in zip(*passes, strict=True)]


def _merged(parts: list[Moments]) -> Moments:
    return functools.reduce(Moments.merge, parts)


def _divided(m: Moments, scale: float) -> Moments:
    if scale == 1.0:
        return m
    return Moments(m.count, m.mean / scale, m.m2 / scale**2, m.abs_mean / scale, m.abs_m2 / scale**2, m.nonfinite)
