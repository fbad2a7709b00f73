"""Which models are wrapped, and which cannot be."""

from __future__ import annotations

import weakref

from torch import nn

from zest_fast.foundation.torch_private import is_compiled_in_place

_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every module of every wrapped model


def mark_wrapped(model: nn.Module) -> None:
    _wrapped.update(model.modules())


def unmark_wrapped(model: nn.Module) -> None:
    _wrapped.difference_update(model.modules())


def refuse_wrapped(model: nn.Module) -> None:
    """Raise RuntimeError for a model that is wrapped, compiled or in data parallelism, TypeError for no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        kind = type(model).__name__
        raise RuntimeError(
            f"the model is in a {kind}, which counts on its gradients: wrap model.module, then build {kind}"
        )
    for module in model.modules():
        if module in _wrapped:
            raise RuntimeError(
                f"{type(module).__name__} is wrapped by a SelectiveBackward already: call its .remove() "
                "(or leave its with block) before wrapping again"
            )
        if hasattr(module, "_orig_mod") or is_compiled_in_place(module):
            raise RuntimeError(
                "the model is compiled, and compiled code misses new hooks: wrap it first, then compile it"
            )
