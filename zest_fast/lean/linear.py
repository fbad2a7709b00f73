"""Frozen Linear under autocast: keeps its weight, where torch keeps the weight's copy in the lower precision.

Without autocast torch's own is lean: it keeps the weight and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import is_any_autocast_enabled
from zest_fast.lean.forward import LeanForward, plain_forward, run_plainly

CLASSES = (nn.Linear,)


class LeanLinear(LeanForward):
    """Most calls are outside autocast: they cost one question."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, multiply)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_any_autocast_enabled():
            return run_plainly(self.module, *args, **kwargs)
        return super().__call__(*args, **kwargs)


def multiply(module: nn.Module, x: Tensor) -> Tensor:
    kind = x.device.type
    if type(module).forward is not nn.Linear.forward:  # a head that is streamed, which keeps nothing of its weight
        return plain_forward(module)(x)
    if not torch.is_autocast_enabled(kind) or module.weight.dtype == torch.get_autocast_dtype(kind):
        return plain_forward(module)(x)
    return _FrozenLinear.apply(x, module)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.save_for_backward(module.weight)
        ctx.dtype = x.dtype
        return plain_forward(module)(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        g = grads[0]
        return torch.matmul(g, weight.to(g.dtype)).to(ctx.dtype), None
