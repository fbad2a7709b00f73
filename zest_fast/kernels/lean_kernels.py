"""Kernels of lean saving behind one choice: Triton's where they can run, then the CPU's; where neither takes the
tensors the answer is None (or False), and the caller goes on with plain torch.

What each has to compute says lean_reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zest_fast.kernels import cpu, triton_kernels


def gated_backward(activation: str, g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of gate and up, given that of activation(gate) * up.

    activation: "silu", "gelu" or "gelu_tanh".
    """
    gradients = triton_kernels.gated_backward(activation, g, gate, up)
    return gradients or (cpu.silu_gated_backward(g, gate, up) if activation == "silu" else None)


def gated_halves_backward(activation: str, g: Tensor, gate_and_up: Tensor) -> Tensor | None:
    """``gated_backward`` of gate and up side by side, last dimension, as one tensor."""
    at_once = triton_kernels.gated_halves_backward(activation, g, gate_and_up)
    if at_once is not None:
        return at_once
    gate, up = gate_and_up.chunk(2, dim=-1)
    gradients = gated_backward(activation, g, gate, up)
    return None if gradients is None else torch.cat(gradients, dim=-1)


def norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float, centred: bool) -> Tensor | None:
    """The gradient of x, given that of an RMSNorm of it, or of a centred one."""
    return triton_kernels.norm_backward(g, x, weight, eps, offset=offset, centred=centred)


def interval_bits(x: Tensor, low: float, high: float) -> Tensor | None:
    """Whether each entry of x [n] is inside of (low, high), one bit each: uint8 [ceil(n / 8)]."""
    return cpu.interval_bits(x, low, high)


def masked_into(g: Tensor, bits: Tensor, out: Tensor) -> bool:
    """Write g [n] where its bit is set, and zero elsewhere, into out [n]; False, with nothing written, if it cannot."""
    return cpu.masked_into(g, bits, out)
