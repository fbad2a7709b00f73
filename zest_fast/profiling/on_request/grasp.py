"""GraSP (Wang et al. 2020, sign and temperature 1 as in zero-cost-nas): −Σ W⊙(Hg) of each weight.

g is the gradient of all profiled layers together, held constant, and H its derivative with respect to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zest_fast.foundation.nearest import some
from zest_fast.kernels import Collector
from zest_fast.profiling.graph import custom_functions, leaves_of
from zest_fast.profiling.layer_rules import weight_gradient_moments
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.loss import loss_of
from zest_fast.profiling.metrics import LayerStatistics
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.on_request.measure import Asked
from zest_fast.profiling.taps import anchor_outputs


class Grasp:
    """The statistic ``grasp`` of every weight (see ``measure.Measure``)."""

    def __init__(self, asked: Asked) -> None:
        self._compute_loss = loss_of(asked.model, asked.batch, asked.loss_fn, asked.closure)
        self._model = asked.model
        self._found: dict[Weight, float] = {}

    def measure(self, passes: GradientPass, collector: Collector) -> str:
        recurrent = any(isinstance(module, nn.RNNBase) for module in self._model.modules())
        self._found, note = grasp(passes, self._compute_loss, collector, recurrent)
        return note

    def add_to(self, statistics: LayerStatistics, weight: Weight, loss_scale: float) -> None:
        if weight in self._found:
            statistics.grasp = self._found[weight] / loss_scale**2


DOUBTFUL = 0.1
"""Relative error that a finite difference across kinks may well have; a term that is missing makes a larger one."""


def grasp(
    passes: GradientPass, compute_loss: Callable[[], Tensor], collector: Collector, recurrent: bool
) -> tuple[dict[Weight, float], str]:
    """grasp of each weight, and a note where it was not had by double backward; "" where it was.

    Keeps one buffer of its size for each weight, and the graph of the gradient.

    recurrent: whether the model has an LSTM or its like, for which cuDNN has no second derivative.
    """
    try:
        found, custom = _by_double_backward(passes, compute_loss, collector, recurrent)
        reason = ""
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # custom functions, reentrant checkpointing, kernels without a second derivative
        found, custom, reason = {}, [], str(error).partition("\n")[0]
    if not custom and not reason:
        return found, ""
    differences = _by_finite_difference(passes, compute_loss, collector)
    if custom and _apart(found, differences):  # what a backward does out of autograd's sight is a constant to it
        reason = f"it contradicts the difference; {', '.join(custom)} may hide from it"
    if not reason:
        return found, ""
    return differences, f"grasp is a central finite difference, since double backward failed: {reason}"


def _apart(found: dict[Weight, float], differences: dict[Weight, float]) -> bool:
    error = math.hypot(*(found[weight] - difference for weight, difference in differences.items()))
    return error > DOUBTFUL * math.hypot(*differences.values())


def _by_double_backward(
    passes: GradientPass, compute_loss: Callable[[], Tensor], collector: Collector, recurrent: bool
) -> tuple[dict[Weight, float], list[str]]:
    """Also the names of functions in the graph of which autograd cannot know the second derivative."""
    weights = passes.weights
    products: dict[Weight, Callable[[], float]] = {}
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for handle in anchor_outputs(passes.embeddings):
            stack.callback(handle.remove)
        loss = passes.loss(compute_loss)
        if leaves_of(loss)[1]:  # torch.autograd.grad passes it by in silence
            raise RuntimeError("reentrant checkpointing hides a part of the graph")
        gradients = torch.autograd.grad(
            loss, [weight.parameter for weight in weights], create_graph=True, allow_unused=True
        )
        custom = custom_functions(loss)
        missing = [weight.layers[0].name for weight, g in zip(weights, gradients, strict=True) if g is None]
        if missing:
            raise RuntimeError(f"the gradient of {some(missing)} is not in the graph")
        for weight in weights:
            stack.callback(_hand_over(weight, products, collector).remove)
        curved = [g for g in gradients if g.requires_grad]
        if curved:
            torch.autograd.backward(
                curved, [g.detach() for g in curved], inputs=[weight.parameter for weight in weights]
            )
    collector.fetch()
    return {weight: -products[weight]() if weight in products else 0.0 for weight in weights}, custom


def _hand_over(
    weight: Weight, products: dict[Weight, Callable[[], float]], collector: Collector
) -> torch.utils.hooks.RemovableHandle:
    """A hook that reduces (Hg) of a weight to ΣW⊙(Hg) and drops it."""

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        products[weight] = _product_sum(collector, p.grad, p)
        p.grad = None

    return weight.parameter.register_post_accumulate_grad_hook(hook)


def _product_sum(collector: Collector, gradient: Tensor, weight: Tensor) -> Callable[[], float]:
    moments = weight_gradient_moments(collector, gradient, weight)
    return lambda: moments().product_sum


def _by_finite_difference(
    passes: GradientPass, compute_loss: Callable[[], Tensor], collector: Collector
) -> dict[Weight, float]:
    """Hg as (∇L(Θ + hg) − ∇L(Θ − hg)) / 2h.

    The step moves Θ by the square root of its precision, relative to its norm. For smooth losses the cube root would
    balance the errors of the formula (h²) and of rounding (1/h); a smaller one crosses fewer kinks.
    """
    gradients: dict[Weight, Tensor] = {}
    passes.run(compute_loss, gradients.__setitem__)
    weights = list(gradients)
    values = [weight.parameter.detach() for weight in weights]
    directions = [gradients[weight].to_dense() for weight in weights]
    length = _norm(directions)
    if length == 0:
        return dict.fromkeys(passes.weights, 0.0)
    precision = max(torch.finfo(value.dtype).eps for value in values)
    step = math.sqrt(precision) * _norm(values) / length
    above, below = (
        _products_at(sign * step, passes, compute_loss, collector, weights, values, directions) for sign in (1, -1)
    )
    return {weight: -(above.get(weight, 0.0) - below.get(weight, 0.0)) / (2 * step) for weight in passes.weights}


def _products_at(
    step: float,
    passes: GradientPass,
    compute_loss: Callable[[], Tensor],
    collector: Collector,
    weights: list[Weight],
    values: list[Tensor],
    directions: list[Tensor],
) -> dict[Weight, float]:
    """ΣW⊙∇L(Θ + step g) of each weight; W is that of Θ."""
    original = dict(zip(weights, values, strict=True))
    products: dict[Weight, Callable[[], float]] = {}

    def reduce(weight: Weight, dw: Tensor) -> None:
        products[weight] = _product_sum(collector, dw, original[weight])

    with passes.replaced(
        [weight.parameter for weight in weights], lambda i, value: value.add(directions[i].to(value.dtype), alpha=step)
    ):
        passes.run(compute_loss, reduce)
    collector.fetch()
    return {weight: product() for weight, product in products.items()}


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
