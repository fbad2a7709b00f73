"""Run a cheap function again in the backward pass instead of keeping its intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fused = Callable[..., tuple[Tensor, ...] | None]


def recomputed(run: Callable[..., Tensor], *inputs: Tensor, fused: Fused | None = None) -> Tensor:
    """run(*inputs) of which only the inputs are kept; bit for bit what autograd yields, in values and gradients.

    run: without random numbers and side effects; no view of an input; differentiated with respect to its inputs only.
    fused: (gradient, *inputs) -> a gradient for each input, in place of running again; None where it cannot. Its
        gradients are exact to rounding.
    """
    return _Recomputed.apply(run, fused, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], fused: Fused | None, *inputs: Tensor) -> Tensor:
        ctx.run, ctx.fused = run, fused
        kind = inputs[0].device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # a gradient of a gradient is being built
        inputs = ctx.saved_tensors
        at_once = None if again or ctx.fused is None else ctx.fused(*grads, *inputs)
        if at_once is not None:
            return None, None, *at_once
        if not again:
            inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = ctx.run(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grads, create_graph=again))
        return None, None, *(next(found) if need else None for need in needed)
