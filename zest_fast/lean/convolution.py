"""Frozen convolution: keeps its weight, where torch keeps the input as well, of which dX needs only the shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.lean.forward import plain_forward

CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def obstacle(module: nn.Module) -> str:
    """Why this convolution is left plain; "" where it can be lean."""
    assert isinstance(module, CLASSES)
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if _padding(module) is None:
        return "padding='same' is wider on one side for this kernel"
    return ""


def convolve(module: Any, x: Tensor) -> Tensor:
    if x.dim() != module.weight.dim():  # without a batch dimension
        return plain_forward(module)(x)
    return _FrozenConvolution.apply(x, module)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        y = plain_forward(module)(x)
        ctx.save_for_backward(module.weight)
        ctx.stride, ctx.padding, ctx.dilation = list(module.stride), _padding(module), list(module.dilation)
        ctx.groups, ctx.dtype, ctx.is_pointwise = module.groups, x.dtype, _is_pointwise(module)
        # What the strides of the convolution left over at the far end of x.
        ctx.output_padding = [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                x.shape[2:], y.shape[2:], ctx.stride, ctx.padding, ctx.dilation, module.kernel_size, strict=True
            )
        ]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        g = grads[0]  # in the type that autocast gave the output
        weight = weight.to(g.dtype)
        if ctx.is_pointwise and g.device.type == "cpu" and g.is_contiguous():
            return _of_every_point(g, weight).to(ctx.dtype), None
        geometry = (ctx.stride, ctx.padding, ctx.dilation, True, ctx.output_padding, ctx.groups)
        return torch.convolution(g, weight, None, *geometry).to(ctx.dtype), None


def _is_pointwise(module: Any) -> bool:
    """Whether every point of the output is a matrix times one point of the input."""
    sizes = {*module.kernel_size, *module.stride, module.groups}
    return sizes == {1} and not any(_padding(module) or ())


def _of_every_point(g: Tensor, weight: Tensor) -> Tensor:
    """dX [n, inputs, ...] of g [n, outputs, ...]; on a CPU twice as fast as the transposed convolution."""
    transposed = weight.flatten(1).t().expand(len(g), -1, -1)
    return torch.bmm(transposed, g.flatten(2)).unflatten(2, g.shape[2:])


def _padding(module: Any) -> list[int] | None:
    """Zeros on each side by dimension; None where the two sides differ."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size)
    if module.padding != "same":
        return list(module.padding)
    totals = [dilation * (kernel - 1) for dilation, kernel in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(total % 2 for total in totals) else [total // 2 for total in totals]
