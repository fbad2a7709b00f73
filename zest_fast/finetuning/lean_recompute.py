"""Run a cheap function again in the backward pass instead of keeping its intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """run(*inputs) of which only the inputs are kept; bit for bit what autograd yields, in values and gradients.

    run: without random numbers and side effects; no view of an input; differentiated with respect to its inputs only.
    """
    return _Recomputed.apply(run, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run = run
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
        needed = ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()  # a gradient of a gradient is being built
        inputs = ctx.saved_tensors
        if not again:
            inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = ctx.run(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grads, create_graph=again))
        return None, *(next(found) if need else None for need in needed)
