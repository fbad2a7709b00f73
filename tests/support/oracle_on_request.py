"""The judge of the metrics that take passes of their own: from their definitions, by plain autograd, in float64.

As in `oracle`, nothing is taken from the library, and each function leaves the model that it is given changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from oracle import rows_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Layers = Iterable[str] | None


def gradients(model: nn.Module, compute: Callable[[], Tensor], layers: Layers = None) -> dict[str, Tensor]:
    """dW in float64 of every row that the loss reaches."""
    rows = list(rows_of(model, layers))
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    compute().backward()
    return {row.name: row.weight.grad.to_dense().double() for row in rows if row.weight.grad is not None}


def grasp(model: nn.Module, compute: Callable[[], Tensor], layers: Layers = None) -> dict[str, tuple[float, float]]:
    """-sum of W * (H g) by double backward, with the sum of the magnitudes of its terms."""
    rows = list(rows_of(model, layers))
    weights = list({id(row.weight): row.weight for row in rows}.values())
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(compute(), weights, create_graph=True, allow_unused=True)
        slope = sum((g * g.detach()).sum() for g in first if g is not None)
        second = torch.autograd.grad(slope, weights, allow_unused=True) if slope.requires_grad else [None] * len(first)
    found = {
        id(weight): sums(torch.zeros_like(weight) if hg is None else -weight.detach() * hg)
        for weight, g, hg in zip(weights, first, second, strict=True)
        if g is not None
    }
    return {row.name: found[id(row.weight)] for row in rows if id(row.weight) in found}


def grasp_by_differences(
    model: nn.Module, compute: Callable[[], Tensor], layers: Layers = None
) -> dict[str, tuple[float, float]]:
    """The same where double backward cannot be had; float64 leaves six digits."""
    first = gradients(model, compute, layers)
    weights = {row.name: row.weight for row in rows_of(model, layers) if row.name in first}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    step = 1e-5 / math.sqrt(sum(float(g.square().sum()) for g in first.values()))
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name] + sign * step * first[name])
        slopes.append(gradients(model, compute, layers))
    return {name: sums(-w * (slopes[0][name] - slopes[1][name]) / (2 * step)) for name, w in before.items()}


def sums(terms: Tensor) -> tuple[float, float]:
    """Of the terms and of their magnitudes."""
    return float(terms.detach().sum()), float(terms.detach().abs().sum())


def synflow(model: nn.Module, run: Callable[[nn.Module], Tensor], layers: Layers = None) -> dict[str, float]:
    """sum of |W * dR/dW|; `run` gives R, the sum of what the positive model makes of ones."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.abs())
    with without_normalisation(model):
        found = gradients(model, lambda: run(model), layers)
    weights = {row.name: row.weight.detach() for row in rows_of(model, layers)}
    return {name: float((weights[name] * found[name]).abs().sum()) if name in found else 0.0 for name in weights}


@contextmanager
def without_normalisation(model: nn.Module) -> Iterator[None]:
    """Whatever has Norm in its name returns what it is given; torch's _WeightNorm and _SpectralNorm make weights."""
    named = [(type(module).__name__, module) for module in model.modules()]
    modules = [module for name, module in named if "Norm" in name and not name.startswith("_")]
    for module in modules:
        module.forward = lambda x, *_: x.clone()
    yield
    for module in modules:
        del module.forward


def agreement(even: Mapping[str, Tensor], odd: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[float, float]]]:
    """The three metrics from the gradients of both halves, each with the sum of the magnitudes of its terms."""
    found = {}
    for name, a in even.items():
        b = odd[name]
        norms = float(a.norm() * b.norm()) or math.nan
        found[name] = {
            "agree_dot": sums(a * b),
            "agree_sign": sums((a.sign() * b + a * b.sign()) / 2),
            "agree_cos": sums(a * b / norms),
        }
    return found
