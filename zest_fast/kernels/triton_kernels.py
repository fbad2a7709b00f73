"""Triton backend: the functions that a GPU runs, and whether it can. Imports Triton only when one of them is called.

Every function queues kernels on the current stream and returns at once: results stay on the device, nothing
synchronises, no atomics, reductions in a fixed order. A row of moments is count, mean, m2, abs_mean, abs_m2, nonfinite;
of a gradient with its weight these six of dW, then weight_mean, weight_m2, weight_nonfinite, product_sum,
product_abs_sum (``Moments`` and ``GradientMoments`` in zest_fast.kernels.moments).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zest_fast.kernels.availability import AVAILABLE, Availability
from zest_fast.kernels.storage import is_as_it_seems

_OLDEST_TRITON = (3, 6)
_LEAN_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def availability() -> Availability:
    """Whether the kernels can run here (a GPU, or CPU tensors under TRITON_INTERPRET=1), and why not."""
    try:
        import triton
    except ImportError as error:
        return Availability(
            f"Triton cannot be imported ({error}); pip install triton, or a CUDA build of torch, which brings it"
        )
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TRITON:
        needed = ".".join(map(str, _OLDEST_TRITON))
        return Availability(f"Triton {triton.__version__} is installed; {needed} or newer is needed")
    if interpreted():
        return AVAILABLE
    if not torch.cuda.is_available():
        return Availability("torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Availability(f"the GPU has compute capability {major}.{minor}; 8.0 (A100) or newer is needed")
    return AVAILABLE


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: set before Triton's kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def moments_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Moments of each tensor into out [len(tensors), 6], float64; see triton_moments."""
    from zest_fast.kernels import triton_moments

    triton_moments.moments_into(tensors, out)


def gradient_moments_into(dw: Tensor, w: Tensor, out: Tensor) -> None:
    """Moments of dw and w (same shape) and of their product into out [11], float64; see triton_gradient."""
    from zest_fast.kernels import triton_gradient

    triton_gradient.gradient_moments_into(dw, w, out)


def linear_gradient_moments_into(x: Tensor, g: Tensor, w: Tensor, out: Tensor) -> None:
    """``gradient_moments_into`` of dW = gᵀx for x [T, I], g [T, O], w [O, I], dW never stored; see triton_linear.

    Raises:
        NotImplementedError: x and g are float64, which tensor cores do not multiply; take the next backend.
    """
    from zest_fast.kernels import triton_linear

    triton_linear.linear_gradient_moments_into(x, g, w, out)


def channel_products(y: Tensor, g: Tensor) -> Tensor:
    """S [N, K] = Σ_p y ⊙ g in float64 for y, g [N, P, K] of any strides; see triton_channels."""
    from zest_fast.kernels import triton_channels

    return triton_channels.channel_products(y, g)


def gated_backward(activation: str, g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gradients of gate and up, given that of activation(gate) * up; None where Triton cannot; see triton_lean."""
    if not _lean_can_run(g, gate, up) or not g.shape == gate.shape == up.shape:
        return None
    from zest_fast.kernels import triton_lean

    gradients = (torch.empty_like(gate, memory_format=_DENSE), torch.empty_like(up, memory_format=_DENSE))
    triton_lean.gated_backward(activation, g, gate, up, *gradients)
    return gradients


def gated_halves_backward(activation: str, g: Tensor, gate_and_up: Tensor) -> Tensor | None:
    """``gated_backward`` of gate and up side by side, last dimension, as one tensor; None where Triton cannot."""
    if not _lean_can_run(g, gate_and_up) or gate_and_up.shape != (*g.shape[:-1], 2 * g.shape[-1]):
        return None
    from zest_fast.kernels import triton_lean

    gradient = torch.empty_like(gate_and_up, memory_format=_DENSE)
    triton_lean.gated_backward(activation, g, *gate_and_up.chunk(2, -1), *gradient.chunk(2, -1))
    return gradient


def norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float, centred: bool) -> Tensor | None:
    """Gradient of x, given that of an RMSNorm or centred norm of it; None where Triton cannot; see triton_lean."""
    if not _lean_can_run(g, x, weight) or g.shape != x.shape or weight.shape != x.shape[-1:]:
        return None
    from zest_fast.kernels import triton_lean

    if x.shape[-1] > triton_lean.WIDEST_ROW:
        return None
    return triton_lean.norm_backward(g, x, weight, eps, offset=offset, centred=centred)


_DENSE = torch.contiguous_format


def _lean_can_run(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, in types and on a device that the kernels of triton_lean take."""
    device = tensors[0].device
    return (
        (device.type == "cuda" or interpreted())
        and all(type(x) in (Tensor, nn.Parameter) and x.device == device and x.dtype in _LEAN_TYPES for x in tensors)
        and all(x.dim() > 0 and x.numel() > 0 and is_as_it_seems(x) for x in tensors)
        and _lean_works(device)
    )


@functools.cache
def _lean_works(device: torch.device) -> bool:
    """Tried once: a backward pass that torch can run must not fail for want of a C compiler or a newer driver."""
    if not availability():
        return False
    from zest_fast.kernels import triton_lean

    x = torch.ones(1, 1, device=device)
    try:
        triton_lean.gated_backward("silu", x, x, x, x.clone(), x.clone())
    except Exception as error:
        warnings.warn(f"lean saving goes on without Triton, which fails on {device}: {error!r:.300}", stacklevel=2)
        return False
    return True
