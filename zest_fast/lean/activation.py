"""Piecewise linear activations: keep one bit for each element, where torch keeps a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import is_view
from zest_fast.kernels.lean_kernels import interval_bits, masked_into
from zest_fast.lean.bits import blocks, empty_bits, empty_in_order, flat, memory_order, pack, unpack
from zest_fast.lean.forward import plain_forward

CLASSES = (nn.ReLU, nn.Hardtanh, nn.ReLU6, nn.LeakyReLU)


def activate(module: nn.Module, x: Tensor) -> Tensor:
    if module.inplace and is_view(x):  # autograd lets no function of ours write into a view
        return plain_forward(module)(x)
    return _PiecewiseLinear.apply(x, module)


class _PiecewiseLinear(torch.autograd.Function):
    """The derivative is 1 where the bit is set and `slope` elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.order, ctx.slope = memory_order(x), getattr(module, "negative_slope", 0.0)
        ctx.save_for_backward(_bits(module, flat(x, ctx.order)))
        if module.inplace:
            ctx.mark_dirty(x)
        return plain_forward(module)(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return masked(grads[0], ctx.saved_tensors[0], ctx.order, ctx.slope), None


def _bits(module: Any, x: Tensor) -> Tensor:
    """Where the derivative is 1, of x [n]."""
    if not isinstance(module, nn.LeakyReLU):
        low, high = (module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else (0.0, math.nan)
        bits = interval_bits(x, low, high)
        if bits is not None:
            return bits
    bits = empty_bits(x.numel(), x.device)
    for elements, packed in blocks(x.numel(), x.device):
        pack(_has_slope_one(module, x[elements]), bits[packed])
    return bits


def _has_slope_one(module: Any, x: Tensor) -> Tensor:
    """As torch's own derivatives have it, NaN included."""
    if isinstance(module, nn.Hardtanh):
        return ~((x <= module.min_val) | (x >= module.max_val))
    return x > 0 if isinstance(module, nn.LeakyReLU) else ~(x <= 0)


def masked(g: Tensor, bits: Tensor, order: list[int], slope: float = 0.0) -> Tensor:
    """g where the bit is set and slope * g elsewhere; order: that in which the bits were packed."""
    if torch.is_grad_enabled():  # a gradient of a gradient is being built
        kept = empty_in_order(g, order)
        flat(kept, order).copy_(unpack(bits, g.numel()) != 0)
        return g * kept + g * (slope * (1 - kept)) if slope else g * kept
    values, out = flat(g, order), empty_in_order(g, order)
    result = flat(out, order)
    if not slope and masked_into(values, bits, result):
        return out
    for elements, packed in blocks(g.numel(), g.device):
        sign = unpack(bits[packed], elements.stop - elements.start).to(g.dtype)  # positive where the bit is set
        if slope:
            torch.ops.aten.leaky_relu_backward.grad_input(
                values[elements], sign, slope, False, grad_input=result[elements]
            )
        else:
            torch.ops.aten.threshold_backward.grad_input(values[elements], sign, 0, grad_input=result[elements])
    return out
