"""The reductions of zest_fast as functions of their own: torch tensors in, named float64 statistics out.

For those who benchmark kernels or build on them. Every backend and the float64 reference answer the same calls; this
file validates the tensors, collector.py makes the one choice of backend, each backend is one file beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from zest_fast.foundation.options import Backend
from zest_fast.kernels.channels import by_channel
from zest_fast.kernels.collector import BACKENDS, Collector, pick_backend
from zest_fast.kernels.layout import DTYPE_NUMBER
from zest_fast.kernels.moments import GradientMoments, Moments
from zest_fast.kernels.storage import has_storage, why_no_storage

__all__ = [
    "BACKENDS",
    "DTYPES",
    "Collector",
    "GradientMoments",
    "Moments",
    "channel_products",
    "gradient_moments",
    "linear_gradient_moments",
    "moments",
    "pick_backend",
    "squared_channel_products",
]

T = TypeVar("T")
DTYPES = tuple(DTYPE_NUMBER)


def moments(tensors: Sequence[Tensor], *, backend: Backend = "auto") -> list[Moments]:
    """Mean, deviation and sum of x and of |x| for each tensor.

    Args:
        tensors: any shapes, strides (channels_last, expanded, empty) and devices; float32, float64, bfloat16 or
            float16.
        backend: "auto" picks by device; see ``BACKENDS``.

    Returns:
        Moments, one for each tensor.

    Raises:
        TypeError: not a sequence of floating-point tensors.
        ValueError: a tensor that is sparse, nested or without memory of its own (meta, fake, DTensor, other wrappers,
            freed storage), or a backend that cannot run on its device (the message says why).

    Examples:
        >>> import torch, zest_fast
        >>> (found,) = zest_fast.kernels.moments([torch.tensor([1.0, -3.0])])
        >>> found.mean, found.abs_mean, found.std
        (-1.0, 2.0, 2.0)
    """
    if isinstance(tensors, Tensor):
        raise TypeError("tensors: found one tensor; pass a list, moments([x])")
    for i, x in enumerate(tensors):
        _require_dense_float(x, f"tensors[{i}]")
    collector = Collector(backend)
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(tensors):
        by_device.setdefault(x.device, []).append(i)
    found: dict[int, Callable[[], Moments]] = {}
    for places in by_device.values():
        found.update(zip(places, collector.moments([tensors[i].detach() for i in places]), strict=True))
    collector.fetch()
    return [found[i]() for i in range(len(tensors))]


def gradient_moments(dw: Tensor, w: Tensor, *, backend: Backend = "auto") -> GradientMoments:
    """Moments of a gradient ``dw``, of its weight ``w`` (same shape), and Σ W⊙dW and Σ|W⊙dW|, in one pass over both.

    Args:
        dw: the gradient of a weight.
        w: the weight.
        backend: as for ``moments``.

    Returns:
        What one pass over both tells.

    Raises:
        TypeError: as of ``moments``.
        ValueError: as of ``moments``, and where shapes or devices differ.

    Examples:
        >>> import torch, zest_fast
        >>> w, dw = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> found = zest_fast.kernels.gradient_moments(dw, w)
        >>> found.product_sum, found.product_abs_sum, found.gradient.mean
        (1.0, 5.0, 1.0)
    """
    _require_dense_float(dw, "dw")
    _require_dense_float(w, "w")
    if dw.shape != w.shape:
        raise ValueError(f"dw has shape {tuple(dw.shape)}, w {tuple(w.shape)}; they must be equal")
    _require_one_device(dw=dw, w=w)
    return _now(backend, lambda collector: collector.gradient_moments(dw.detach(), w.detach()))


def linear_gradient_moments(x: Tensor, g: Tensor, w: Tensor, *, backend: Backend = "auto") -> GradientMoments:
    """``gradient_moments`` of dW = gᵀx, the weight gradient of a linear layer, without ever storing dW.

    Args:
        x: input [T, I]; any T, also 0.
        g: gradient of the loss with respect to the output [T, O], of x's dtype.
        w: weight [O, I].
        backend: as for ``moments``.

    Returns:
        As ``gradient_moments``.

    Raises:
        TypeError: as of ``moments``.
        ValueError: as of ``moments``, and where shapes, dtypes or devices do not fit.

    Examples:
        >>> import torch, zest_fast
        >>> x, g, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0, -1.0]])
        >>> zest_fast.kernels.linear_gradient_moments(x, g, w).product_sum
        -3.0
    """
    for name, tensor in (("x", x), ("g", g), ("w", w)):
        _require_dense_float(tensor, name)
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; a matrix is needed")
    if x.shape[0] != g.shape[0] or w.shape != (g.shape[1], x.shape[1]):
        raise ValueError(
            f"x {tuple(x.shape)}, g {tuple(g.shape)} and w {tuple(w.shape)} do not fit: "
            "[T, I], [T, O] and [O, I] are needed"
        )
    if x.dtype != g.dtype:
        raise ValueError(f"x is {x.dtype}, g is {g.dtype}; they must be equal")
    _require_one_device(x=x, g=g, w=w)
    return _now(backend, lambda collector: collector.linear_gradient_moments(x.detach(), g.detach(), w.detach()))


def channel_products(y: Tensor, g: Tensor, *, channel_dim: int | None = None, backend: Backend = "auto") -> Tensor:
    """S [N, K] = Σ_p Y⊙G per sample and output channel, in float64, in one read of Y and G.

    Args:
        y: output of a layer, samples first.
        g: gradient of the loss with respect to y, same shape.
        channel_dim: dimension of the K channels; None = 1 for four and more dimensions (convolutions), else the last.
        backend: as for ``moments``.

    Returns:
        S, float64, on the device of y.

    Raises:
        TypeError: as of ``moments``.
        ValueError: as of ``moments``, and where shapes, devices or channel_dim do not fit.

    Examples:
        >>> import torch, zest_fast
        >>> y, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> zest_fast.kernels.channel_products(y, g).tolist()
        [[3.0, -2.0]]
    """
    channel_dim = _require_outputs(y, g, channel_dim)
    return Collector(backend).channel_products(by_channel(y, channel_dim), by_channel(g, channel_dim))


def squared_channel_products(
    y: Tensor, g: Tensor, *, channel_dim: int | None = None, backend: Backend = "auto"
) -> float:
    """Σ_nk S_nk² of ``channel_products``, which is 2N times fisher; S is not formed.

    Args:
        y: as for ``channel_products``.
        g: as for ``channel_products``.
        channel_dim: as for ``channel_products``.
        backend: as for ``moments``.

    Returns:
        The sum.

    Raises:
        TypeError: as of ``channel_products``.
        ValueError: as of ``channel_products``.

    Examples:
        >>> import torch, zest_fast
        >>> y, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> zest_fast.kernels.squared_channel_products(y, g)
        13.0
    """
    channel_dim = _require_outputs(y, g, channel_dim)
    return _now(
        backend, lambda collector: collector.squared_channel_products(y.detach(), g.detach(), channel_dim % y.dim())
    )


def _now(backend: Backend, run: Callable[[Collector], Callable[[], T]]) -> T:
    """One result, waited for."""
    collector = Collector(backend)
    later = run(collector)
    collector.fetch()
    return later()


def _require_outputs(y: Tensor, g: Tensor, channel_dim: int | None) -> int:
    _require_dense_float(y, "y")
    _require_dense_float(g, "g")
    if y.shape != g.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, g {tuple(g.shape)}; they must be equal")
    if y.dim() < 2:
        raise ValueError(f"y has shape {tuple(y.shape)}; [samples, ..., channels] is needed")
    _require_one_device(y=y, g=g)
    if channel_dim is None:
        channel_dim = 1 if y.dim() >= 4 else -1
    if not -y.dim() <= channel_dim < y.dim() or channel_dim % y.dim() == 0:
        raise ValueError(f"channel_dim is {channel_dim}; one of 1..{y.dim() - 1} is needed (dimension 0 is the sample)")
    return channel_dim


def _require_dense_float(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a torch tensor is needed")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; float32, float64, bfloat16 or float16 is needed")
    if not has_storage(x):
        raise ValueError(f"{name} is {why_no_storage(x)}")


def _require_one_device(**tensors: Tensor) -> None:
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError("tensors on different devices: " + ", ".join(f"{k} on {x.device}" for k, x in tensors.items()))
