"""Training in a quadratic model of the loss: where the steps of a recipe lead in a few directions, and what that saves.

Along w = Σ_a shares_a · way_a the loss is taken to be start + slopes·shares + ½ sharesᵀ curvature shares, with the mean
slope of some samples and a Gauss-Newton matrix: one Taylor expansion at the start stands for every step of training
(Deshpande et al., "A linearized framework and a new benchmark for model selection for fine-tuning", 2021, go through
all steps likewise, with the kernel of the whole model).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zest_fast.sweeping.recipe import Recipe

_MOMENTUM = 0.9  # Adam's
_CUTOFF = 1e-3  # eigenvalues below, as shares of the largest, are directions twice


def trained(slopes: Tensor, curvature: Tensor, gram: Tensor, rate: float, recipe: Recipe, *, batch: int) -> Tensor:
    """How far the recipe's steps go along each way, float64 [directions].

    Each step takes Adam's mean gradient of some observations and projects the step that its rate makes of it onto the
    ways, in the metric in which Adam's steps are steepest: ways = gradients / scale, so that is the inverse of `gram`.

    Args:
        slopes: float64 [observations, directions], of the samples that are trained on, in a random order.
        curvature: float64 [directions, directions].
        gram: of the directions; a step along the gradient of direction a alone is `rate` in place a.
        rate: of the layer.
        recipe: steps, samples of a step and decay.
        batch: samples of an observation.
    """
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=_CUTOFF)
    taken = max(1, min(len(slopes), recipe.batch_size // batch))
    shares, mean = torch.zeros(2, slopes.shape[1], dtype=torch.float64)
    for step in range(recipe.steps):
        rows = torch.arange(step * taken, (step + 1) * taken) % len(slopes)
        gradient = slopes[rows].mean(0) + curvature @ shares
        mean = _MOMENTUM * mean + (1 - _MOMENTUM) * (inverse @ gradient)
        shares = shares - rate * recipe.learning_rate_scale(step) * mean / (1 - _MOMENTUM ** (step + 1))
    return shares


def saved(slopes: Tensor, curvature: Tensor, shares: Tensor) -> tuple[float, float]:
    """Loss that is saved on samples that were not trained on, and its standard error over their observations.

    slopes: float64 [observations, directions], of these samples. curvature: of them; its noise is not in the error.
    """
    each = -(slopes @ shares)
    error = float(each.std()) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    return float(each.mean()) - 0.5 * float(shares @ curvature @ shares), error
