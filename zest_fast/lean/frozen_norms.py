"""Batch norm without a parameter that trains normalises by its running statistics, whatever `model.train()` says.

Otherwise the statistics drift under weights that do not follow. `module.training` is False only while the module runs:
between forward passes it says what the user asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from zest_fast.foundation.torch_private import forward_pre_hooks


class _EvalForOneCall:
    """Two hooks around the forward of one module, which several threads may call at the same time."""

    def __init__(self) -> None:
        self._asked_for = False
        self._inside = 0  # calls that have not ended

    def enter(self, module: nn.Module, inputs: Any) -> None:
        with _changing:
            if not self._inside:
                self._asked_for = module.training
            self._inside += 1
            module.training = False

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        with _changing:
            self._inside = max(0, self._inside - 1)
            if not self._inside:
                module.training = self._asked_for

    def end(self, module: nn.Module) -> None:
        """After a KeyboardInterrupt, of which hooks are not told."""
        with _changing:
            if self._inside:
                self._inside, module.training = 0, self._asked_for


_changing = threading.Lock()  # of all modules, since a lock cannot be copied with one


def keep_frozen_norms_in_eval(model: nn.Module) -> list[RemovableHandle]:
    """Hook every batch norm of `model` that has no trainable parameter; returns the handles of the hooks."""
    handles = []
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(parameter.requires_grad for parameter in module.parameters()):
            hooks = _EvalForOneCall()
            handles.append(module.register_forward_pre_hook(hooks.enter, prepend=True))
            handles.append(module.register_forward_hook(hooks.leave, always_call=True))  # also when forward raises
    return handles


def is_kept_in_eval(module: nn.Module) -> bool:
    """Whether `keep_frozen_norms_in_eval` has hooked this module, whose forward then always runs in eval mode."""
    return any(True for _ in _hooks_on(module))


def end_calls(model: nn.Module) -> None:
    """Give every module that was interrupted within its forward the mode that the user asked for."""
    for module in model.modules():
        for hooks in _hooks_on(module):
            hooks.end(module)


def _hooks_on(module: nn.Module) -> Iterator[_EvalForOneCall]:
    for hook in forward_pre_hooks(module).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _EvalForOneCall):
            yield owner
