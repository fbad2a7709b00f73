"""The specification of the kernels of lean saving: each result by its definition, in float64, with plain torch.

The compiled kernels answer to this file, as those of statistics do to reference.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated_backward(activation: str, g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """The gradients of gate and up, given that of activation(gate) * up."""
    gate, up = (x.detach().double().requires_grad_(True) for x in (gate, up))
    with torch.enable_grad():
        return torch.autograd.grad(ACTIVATIONS[activation](gate) * up, (gate, up), g.detach().double())


def norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float, centred: bool) -> Tensor:
    """The gradient of x, given that of (weight + offset) x / sqrt(mean(x²) + eps); x less its mean if centred."""
    x = x.detach().double().requires_grad_(True)
    with torch.enable_grad():
        value = x - x.mean(-1, keepdim=True) if centred else x
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
        return torch.autograd.grad((weight.detach().double() + offset) * value, x, g.detach().double())[0]


def interval_bits(x: Tensor, low: float, high: float) -> Tensor:
    """Whether each entry of x [n] is inside of (low, high): uint8 [ceil(n / 8)], bit i of byte i / 8.

    NaN counts as inside, and a bound that is NaN is none.
    """
    x = x.detach().double()
    inside = ~((x <= low) | (x >= high))
    whole = F.pad(inside.to(torch.uint8), (0, -len(x) % 8)).view(-1, 8)
    return (whole << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(1, dtype=torch.uint8)


def masked(g: Tensor, bits: Tensor) -> Tensor:
    """g [n] where its bit is set, and zero elsewhere."""
    places = torch.arange(len(g), device=g.device)
    kept = (bits[places // 8].long() >> (places % 8)) & 1
    return torch.where(kept.bool(), g, torch.zeros_like(g))
