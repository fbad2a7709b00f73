"""Batch norm without a parameter that trains normalises by its running statistics, whatever `model.train()` says.

Otherwise the statistics drift under weights that do not follow. `module.training` is False only while the module runs:
between forward passes it says what the user asked for.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


class _EvalForOneCall:
    """Two hooks around the forward of one module."""

    def __init__(self) -> None:
        self._asked_for = False

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self._asked_for = module.training
        module.training = False

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        module.training = self._asked_for


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
    return any(
        isinstance(getattr(hook, "__self__", None), _EvalForOneCall) for hook in module._forward_pre_hooks.values()
    )
