"""What a backend offers: one of two contracts, each fulfilled by the functions of a module, and the choice by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from zest_fast.kernels.moments import GradientMoments, Moments


class NumbersBackend(Protocol):
    """One whose results are numbers at once: "cpu" and "reference"."""

    def moments(self, x: Tensor) -> Moments:
        """Moments of all entries of ``x`` (any shape and strides)."""

    def gradient_moments(self, dw: Tensor, w: Tensor) -> GradientMoments:
        """Moments of dw and w (same shape) and of their product."""

    def linear_gradient_moments(self, x: Tensor, g: Tensor, w: Tensor) -> GradientMoments:
        """``gradient_moments`` of dW = gᵀx for x [T, I], g [T, O], w [O, I]."""

    def channel_products(self, y: Tensor, g: Tensor) -> Tensor:
        """S [N, K] = Σ_p y ⊙ g in float64 for y, g [N, P, K]."""

    def squared_channel_products(self, y: Tensor, g: Tensor, channel_dim: int) -> float:
        """Σ_nk S_nk² of ``channel_products``, for y, g of one shape, samples first and channels in ``channel_dim``."""


class RowsBackend(Protocol):
    """One that writes rows into a device buffer and waits for nothing: "triton" and "cuda".

    Rows are contiguous float64, of the widths and in the order of ``layout``.
    """

    def moments_into(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Moments of every tensor into out [len(tensors), MOMENTS]."""

    def gradient_moments_into(self, dw: Tensor, w: Tensor, out: Tensor) -> None:
        """Moments of dw and w (same shape) and of their product into out [GRADIENT_MOMENTS]."""

    def channel_products(self, y: Tensor, g: Tensor) -> Tensor:
        """S [N, K] = Σ_p y ⊙ g in float64 for y, g [N, P, K], on their device."""


def numbers_backend(name: str) -> NumbersBackend | None:
    """The backend of this name, None where it writes rows."""
    if name == "cpu":
        from zest_fast.kernels import cpu

        return cpu
    if name == "reference":
        from zest_fast.kernels import reference

        return reference
    return None


def rows_backend(name: str) -> RowsBackend:
    """The backend of this name, "triton" or "cuda"."""
    if name == "triton":
        from zest_fast.kernels import triton_kernels

        return triton_kernels
    from zest_fast.kernels import cuda

    return cuda
