"""A forward that keeps less for the backward pass, put into one module in place of its class's.

It is an attribute of the instance: names, type, hooks and state_dict of the module stay as they are. It copies and
pickles with the module.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import FakeTensor, forward_mode_is_on, transforms_are_active


class LeanForward:
    """Calls `lean(module, x)` where that is exact and pays, and the plain forward of the class everywhere else.

    Everywhere else: below the cut, where x needs no gradient; under no_grad; with other arguments than one tensor; in
    torch.compile, which decides by itself what to keep; in torch.func, torch.jit and forward-mode differentiation; and
    while a parameter of the module itself trains.

    lean: a function of module level, so that the module can be pickled.
    element_sizes: the sizes in bytes of the floating-point types in which lean keeps less than plain.
    """

    def __init__(
        self, module: nn.Module, lean: Callable[[nn.Module, Tensor], Tensor], element_sizes: tuple[int, ...] = (2, 4, 8)
    ) -> None:
        self.module = module
        self.lean = lean
        self.element_sizes = element_sizes
        self.enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._pays(args[0]):
            return self.lean(self.module, args[0])
        return run_plainly(self.module, *args, **kwargs)

    def _pays(self, x: Any) -> bool:
        return (
            builds_plain_graph()
            and self.enabled
            and type(x) in (Tensor, nn.Parameter, FakeTensor)
            and x.requires_grad
            and x.is_floating_point()
            and x.numel() > 0
            and x.element_size() in self.element_sizes
            and not owns_trainable(self.module)
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(plain_forward(self.module))

    def put_in(self) -> None:
        vars(self.module)["forward"] = self
        _put_in.add(self)

    @property
    def is_copied(self) -> bool:
        """Whether it came with a copy or a pickle of a module, so that no handle would remove it."""
        return self not in _put_in

    def remove(self) -> None:
        """Give the module its plain forward back; where someone has wrapped this one since, it becomes a plain one."""
        self.enabled = False
        if vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]


_put_in: weakref.WeakSet[LeanForward] = weakref.WeakSet()


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class."""
    return type(module).forward.__get__(module)


def run_plainly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same, called: a method that is made first is to torch.compile the module's own `forward`, hence endless."""
    return type(module).forward(module, *args, **kwargs)


def builds_plain_graph() -> bool:
    """Whether autograd records what happens now, in the plain way that autograd functions are written for."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not transforms_are_active()
        and not forward_mode_is_on()
    )


def owns_trainable(module: nn.Module) -> bool:
    return any(p is not None and p.requires_grad for p in module._parameters.values())
