"""Try the code of a module's class on a small copy: what it computes, and how much it keeps.

The copy has random parameters, lives on the CPU and has no hooks. The module itself is not run, so no hook of the user
sees a trial, nothing is computed with large weights, and a model on the meta device can be tried too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # of loss and gradients, relative, in float32


def stand_in(module: nn.Module, dtype: torch.dtype, children: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A shallow copy of `module` with random parameters of `dtype` and, if given, other children."""
    small = copy.copy(module)
    vars(small).pop("forward", None)
    small._parameters = {
        name: None if p is None else nn.Parameter(_random(p.shape, dtype), requires_grad=False)
        for name, p in module._parameters.items()
    }
    small._modules = dict(module._modules if children is None else children)
    return small


def small_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32)  # draws no random numbers there
    layer.weight = nn.Parameter(_random((outputs, inputs), torch.float32), requires_grad=False)
    layer.bias = nn.Parameter(_random((outputs,), torch.float32), requires_grad=False)
    return layer


def inputs_like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random tensor that requires a gradient and, as in a model, is the result of something and no leaf."""
    return _random(shape, dtype).requires_grad_(True) * 1.0


def agree(plain: Callable[..., Tensor], lean: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether both yield the same values, and the same gradients of the inputs."""
    results = []
    for run in (plain, lean):
        y = run(*inputs)
        if not isinstance(y, Tensor) or not y.requires_grad:
            return False
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, weights)])
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(a.abs().max()))
        for a, b in zip(*results, strict=True)
    )


def kept_bytes(run: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of run(*inputs): every storage once, parameters left out."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = run(*inputs)  # noqa: F841  else a freed storage's address is used again
    return sum(kept.values())


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)  # the user's random state stays as it is
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
