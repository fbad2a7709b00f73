"""Frozen norms over the last dimension (RMSNorm and its like), and activations written out in several operations.

They keep their input, in its own type, and run again in the backward pass; as written in transformers, a bfloat16
RMSNorm keeps a float32 copy of it. They are known by what they own and do, not by name: a trial of the class's code
shows whether lean is exact and in which types it keeps less. torch's own LayerNorm, RMSNorm, SiLU and GELU keep nothing
but their input as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zest_fast.kernels import lean_kernels, lean_reference
from zest_fast.lean.forward import plain_forward
from zest_fast.lean.recompute import recomputed
from zest_fast.lean.stand_in import agree, inputs_like, kept_bytes, stand_in

_ROWS = (2, 3)  # of the trial's input
_WIDTH = 8  # of the trial's input to an activation
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_TYPES = (torch.float32, torch.bfloat16)
_EPSILONS = ("eps", "variance_epsilon")


def is_norm(module: nn.Module) -> bool:
    """Whether it owns what an RMSNorm or LayerNorm owns: a vector, perhaps a second one, and an epsilon."""
    vectors = [p for p in module._parameters.values() if p is not None]
    return (
        not module._modules
        and not module._buffers
        and len(vectors) in (1, 2)
        and all(p.dim() == 1 and p.shape == vectors[0].shape for p in vectors)
        and any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)
    )


def is_activation(module: nn.Module) -> bool:
    """Whether its class is among the activations of torch or transformers, and owns nothing."""
    owned = [*module._parameters, *module._buffers, *module._modules]
    return type(module).__module__ in _ACTIVATIONS and not owned and not getattr(module, "inplace", False)


class NormForm(NamedTuple):
    """y = (weight + offset) x / sqrt(mean(x²) + epsilon), perhaps plus a bias; x less its mean if centred."""

    epsilon: str
    offset: float
    centred: bool

    def backward(self, module: nn.Module, g: Tensor, x: Tensor) -> tuple[Tensor] | None:
        """In one pass on a GPU with Triton; None elsewhere."""
        eps = getattr(module, self.epsilon)
        weight = module._parameters["weight"]
        assert weight is not None
        gradient = lean_kernels.norm_backward(g, x, weight, eps, offset=self.offset, centred=self.centred)
        return None if gradient is None else (gradient,)

    def expected(self, module: nn.Module, g: Tensor, x: Tensor) -> Tensor:
        """The same by its definition: what a class is compared with."""
        weight = module._parameters["weight"]
        assert weight is not None
        eps = getattr(module, self.epsilon)
        return lean_reference.norm_backward(g, x, weight, eps, offset=self.offset, centred=self.centred)


def run_again(module: nn.Module, x: Tensor, form: NormForm | None = None) -> Tensor:
    return recomputed(plain_forward(module), x, fused=None if form is None else partial(form.backward, module))


def lean_of(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """`run_again`, which knows the gradient of the norms that a kernel is there for."""
    form = form_of(module)
    return run_again if form is None else partial(run_again, form=form)


def form_of(module: nn.Module) -> NormForm | None:
    """What a norm's class computes, by a trial of its gradient, also on rows so small that epsilon counts."""
    epsilon = next((name for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    weight = module._parameters.get("weight")
    if epsilon is None or weight is None:
        return None
    small = stand_in(module, torch.float32)
    size = torch.tensor([1.0, getattr(module, epsilon) ** 0.5 or 1.0]).view(2, 1, 1)
    x = inputs_like((2, 3, len(weight)), torch.float32) * size
    g = torch.linspace(-1, 1, x.numel()).view(x.shape)
    found = torch.autograd.grad(plain_forward(small)(x), x, g)[0]
    for form in (NormForm(epsilon, offset, centred) for offset in (0.0, 1.0) for centred in (False, True)):
        expected = form.expected(small, g, x)
        if all(float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) for a, b in zip(found, expected, strict=True)):
            return form
    return None


def element_sizes(module: nn.Module) -> tuple[int, ...] | str:
    """The sizes in bytes of the types in which running it again keeps less; or why it is left plain."""
    try:
        with torch.random.fork_rng(devices=[]):
            sizes = tuple(dtype.itemsize for dtype in _TYPES if _keeps_less(module, dtype))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        return f"its class cannot be tried on a small input ({type(error).__name__}: {error})"
    return sizes or "torch keeps no more than its input as it is"


def _keeps_less(module: nn.Module, dtype: torch.dtype) -> bool:
    small = stand_in(module, dtype)
    plain = plain_forward(small)
    width = next((len(p) for p in module._parameters.values() if p is not None), _WIDTH)
    x = inputs_like((*_ROWS, width), dtype)
    if not agree(plain, lambda x: recomputed(plain, x), x):
        raise ValueError("two runs of it differ")
    return kept_bytes(plain, x) > kept_bytes(lambda x: recomputed(plain, x), x) + x.numel() // 2 * dtype.itemsize
