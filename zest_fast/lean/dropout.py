"""Dropout: keeps one bit for each element, where torch keeps a tensor (CPU) or a byte (GPU); same random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.lean.activation import masked
from zest_fast.lean.bits import blocks, empty_bits, flat, memory_order, pack
from zest_fast.lean.forward import plain_forward

CLASSES = (nn.Dropout,)


def obstacle(module: nn.Module) -> str:
    """Why this dropout is left plain; "" where it can be lean."""
    return "it drops in place" if module.inplace else ""


def drop(module: nn.Module, x: Tensor) -> Tensor:
    if not module.training or module.p in (0.0, 1.0):
        return plain_forward(module)(x)
    return _Dropout.apply(x, module.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if x.is_cuda:
            y, kept = torch.native_dropout(x, p, True)
            ctx.factor = 1 / (1 - p)
        else:
            noise = torch.empty_like(x).bernoulli_(1 - p)  # as F.dropout draws it
            kept = noise != 0
            noise.div_(1 - p)
            y = x * noise
            ctx.factor = torch.ones((), dtype=x.dtype).div_(1 - p)  # rounded as in the forward pass
        ctx.order = memory_order(kept)
        mask, bits = flat(kept, ctx.order), empty_bits(x.numel(), x.device)
        for elements, packed in blocks(x.numel(), x.device):
            pack(mask[elements], bits[packed])
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return masked(grads[0], ctx.saved_tensors[0], ctx.order) * ctx.factor, None
