"""CPU backend: hands addresses, sizes, strides and dtypes to the compiled kernels (csrc/cpu)."""

from __future__ import annotations

import torch  # before the extension: whichever comes first decides which OpenMP runtime both use
from torch import Tensor

from zest_fast import _native
from zest_fast.foundation.torch_private import FakeTensor
from zest_fast.kernels.channels import by_channel
from zest_fast.kernels.layout import DTYPE_NUMBER
from zest_fast.kernels.moments import GradientMoments, Moments
from zest_fast.kernels.storage import is_as_it_seems

# dW is formed in blocks of whole rows of about this many bytes: small enough to be reduced from the cache, large enough
# for the matrix product to run at full speed.
_TILE_BYTES = 4 << 20


def moments(x: Tensor) -> Moments:
    """Moments of all entries of ``x`` (any shape and strides)."""
    found = _native.moments(x.data_ptr(), DTYPE_NUMBER[x.dtype], x.shape, x.stride(), torch.get_num_threads())
    return Moments.checked(*found)


def gradient_moments(dw: Tensor, w: Tensor) -> GradientMoments:
    """Moments of the gradient ``dw`` and the weight ``w`` (same shape, any strides) and of their product."""
    found = _native.gradient_moments(
        dw.data_ptr(),
        DTYPE_NUMBER[dw.dtype],
        dw.stride(),
        w.data_ptr(),
        DTYPE_NUMBER[w.dtype],
        w.stride(),
        w.shape,
        torch.get_num_threads(),
    )
    return GradientMoments.from_row(*found)


def linear_gradient_moments(x: Tensor, g: Tensor, w: Tensor) -> GradientMoments:
    """``gradient_moments`` of dW = gᵀx for x [T, I], g [T, O], w [O, I]; dW exists one block of rows at a time."""
    x, g = _blas_ready(x), _blas_ready(g)
    rows, columns = w.shape
    tile = max(1, min(rows, _TILE_BYTES // max(1, columns * x.element_size())))
    scratch = x.new_empty(tile, columns)
    total = None
    for first in range(0, rows, tile):
        count = min(tile, rows - first)
        dw = torch.mm(g[:, first : first + count].t(), x, out=scratch[:count])
        part = gradient_moments(dw, w[first : first + count])
        total = part if total is None else total.merge(part)
    return gradient_moments(scratch, w) if total is None else total


def channel_products(y: Tensor, g: Tensor) -> Tensor:
    """S [N, K] = Σ_p y ⊙ g in float64 for y, g [N, P, K] of any strides."""
    out = torch.empty(y.shape[0], y.shape[2], dtype=torch.float64)
    _channel_products(y, g, out.data_ptr())
    return out


def squared_channel_products(y: Tensor, g: Tensor, channel_dim: int) -> float:
    """Σ_nk S_nk² of ``channel_products``, without S; y, g of one shape, samples first, channels in ``channel_dim``."""
    found = _native.squared_channel_products(
        y.data_ptr(),
        DTYPE_NUMBER[y.dtype],
        y.stride(),
        g.data_ptr(),
        DTYPE_NUMBER[g.dtype],
        g.stride(),
        y.shape,
        channel_dim,
        torch.get_num_threads(),
    )
    return _channel_products(by_channel(y, channel_dim), by_channel(g, channel_dim), 0) if found is None else found


def silu_gated_backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of gate and up, given that of silu(gate) * up, computed in float32 in one pass.

    None unless all three are plain CPU tensors of one shape and type, float32 or bfloat16, with rows that lie dense.
    Fake ones get fake ones of the same sizes.
    """
    operands = (g, gate, up)
    if not all(_is_plain(x) and x.is_cpu and x.dtype == g.dtype and x.shape == g.shape for x in operands):
        return None
    if not all(_is_fake(x) or is_as_it_seems(x) for x in operands):
        return None
    strides = [stride for x in operands if (stride := _row_stride(x)) is not None]
    if g.dtype not in (torch.float32, torch.bfloat16) or len(strides) < len(operands):
        return None
    gradients = (g.new_empty(g.shape), g.new_empty(g.shape))
    if _is_fake(*operands):
        return gradients
    columns = g.shape[-1]
    _native.silu_gated_backward(
        [x.data_ptr() for x in (*operands, *gradients)],
        [*strides, columns, columns],
        g.numel() // columns,
        columns,
        DTYPE_NUMBER[g.dtype],
        torch.get_num_threads(),
    )
    return gradients


def interval_bits(x: Tensor, low: float, high: float) -> Tensor | None:
    """Whether each entry of x [n] is inside of (low, high), one bit each: uint8 [ceil(n / 8)], bit i of byte i / 8.

    NaN counts as inside, and a bound that is NaN is none. None unless x is a plain dense CPU tensor of float32, float64
    or bfloat16.
    """
    if not _is_dense(x) or x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return None
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    if _is_fake(x):
        return bits
    _native.interval_bits(
        x.data_ptr(), DTYPE_NUMBER[x.dtype], x.numel(), low, high, bits.data_ptr(), torch.get_num_threads()
    )
    return bits


def masked_into(g: Tensor, bits: Tensor, out: Tensor) -> bool:
    """Write g [n] where its bit is set, and zero elsewhere, into out [n]; False, with nothing written, where the three
    are not plain dense CPU tensors, or g and out not of one floating-point type.
    """
    if not all(map(_is_dense, (g, bits, out))) or g.dtype != out.dtype or g.dtype not in DTYPE_NUMBER:
        return False
    if _is_fake(g, bits, out):
        return True
    _native.masked(g.data_ptr(), bits.data_ptr(), g.numel(), g.element_size(), out.data_ptr(), torch.get_num_threads())
    return True


def _is_dense(x: Tensor) -> bool:
    return _is_plain(x) and x.is_cpu and x.is_contiguous() and (_is_fake(x) or is_as_it_seems(x))


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is FakeTensor


def _is_fake(*tensors: Tensor) -> bool:
    """Whether some are: the pass is a plan's then, which needs the results' sizes and has nothing to compute with."""
    return any(type(x) is FakeTensor for x in tensors)


def _row_stride(x: Tensor) -> int | None:
    """Elements from one row (last dimension) to the next where that is one number and rows are dense; else None."""
    if x.dim() < 2 or x.stride(-1) != 1 or x.numel() == 0:
        return None
    if any(x.stride(d) != x.shape[d + 1] * x.stride(d + 1) for d in range(x.dim() - 2) if x.shape[d] != 1):
        return None
    return x.stride(-2)


def _channel_products(y: Tensor, g: Tensor, out: int) -> float:
    return _native.channel_products(
        y.data_ptr(),
        DTYPE_NUMBER[y.dtype],
        y.stride(),
        g.data_ptr(),
        DTYPE_NUMBER[g.dtype],
        g.stride(),
        y.shape,
        out,
        torch.get_num_threads(),
    )


def _blas_ready(x: Tensor) -> Tensor:
    """A matrix that torch.mm reads in place; an expanded one would be copied again for every tile."""
    return x if 1 in x.stride() and 0 not in x.stride() else x.contiguous()
