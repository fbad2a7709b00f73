"""The specification: every statistic by its definition, in float64, with plain torch. Slow, obvious, any device.

The fast backends answer to this file. It is also what runs on a device that has no kernels of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zest_fast.kernels.channels import by_channel
from zest_fast.kernels.moments import GradientMoments, Moments

_PRODUCT_ENTRIES = 1 << 21  # of S [N, K] at once (16 MiB)


def moments(x: Tensor) -> Moments:
    """Moments of all entries of ``x`` (any shape)."""
    x = x.detach().double()
    magnitude = x.abs()
    mean, abs_mean = x.mean(), magnitude.mean()
    values = (
        mean,
        (x - mean).square().sum(),
        abs_mean,
        (magnitude - abs_mean).square().sum(),
        x.isfinite().logical_not().sum().double(),
    )
    return Moments.checked(float(x.numel()), *torch.stack(values).tolist())


def gradient_moments(dw: Tensor, w: Tensor) -> GradientMoments:
    """Moments of the gradient ``dw`` and the weight ``w`` (same shape) and of their product."""
    weight = moments(w)
    product = dw.detach().double() * w.detach().double()
    sums = torch.stack([product.sum(), product.abs().sum()]).tolist()
    return GradientMoments.checked(moments(dw), weight.mean, weight.m2, weight.nonfinite, *sums)


def linear_gradient_moments(x: Tensor, g: Tensor, w: Tensor) -> GradientMoments:
    """``gradient_moments`` of dW = gᵀx for x [T, I], g [T, O], w [O, I]."""
    return gradient_moments(g.detach().double().t() @ x.detach().double(), w)


def channel_products(y: Tensor, g: Tensor) -> Tensor:
    """S [N, K] = Σ_p y ⊙ g for y, g [N, P, K]."""
    return torch.einsum("npk,npk->nk", y.detach().double(), g.detach().double())


def squared_channel_products(y: Tensor, g: Tensor, channel_dim: int) -> float:
    """Σ_nk S_nk² of ``channel_products``, formed for a block of samples at a time; channels in ``channel_dim``."""
    y, g = by_channel(y, channel_dim), by_channel(g, channel_dim)
    step = max(1, _PRODUCT_ENTRIES // max(1, y.shape[2]))
    parts = [channel_products(y[i : i + step], g[i : i + step]).square().sum() for i in range(0, len(y), step)]
    return float(torch.stack(parts).sum()) if parts else 0.0
