"""Frozen batch norm that runs on its statistics: an affine map of each channel, so dX needs one factor a channel.

torch keeps the input, in eval mode too (pytorch issue 133566).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zest_fast.lean.forward import plain_forward
from zest_fast.lean.frozen_norms import is_kept_in_eval

CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def obstacle(module: nn.Module) -> str:
    """Why this batch norm is left plain; "" where it can be lean."""
    assert isinstance(module, _BatchNorm)
    if module.running_var is None:
        return "it has no running statistics"
    if module.training and not is_kept_in_eval(module):
        return "it is in training mode, where its statistics depend on the input"
    return ""


def normalise(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:  # put there since
        return plain_forward(module)(x)
    return _FrozenBatchNorm.apply(x, module)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        factor = (module.running_var.to(torch.promote_types(x.dtype, torch.float32)) + module.eps).rsqrt()
        if module.weight is not None:
            factor = factor * module.weight
        ctx.save_for_backward(factor)
        return plain_forward(module)(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        g = grads[0]
        return (g * factor.view(-1, *[1] * (g.dim() - 2))).to(g.dtype), None
