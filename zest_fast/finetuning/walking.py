"""Walking the modules of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from zest_fast.foundation.torch_private import is_compiled_in_place


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in a fixed order, a shared one as often as it is registered.

    Several times faster than `model.modules()`, which would show where it runs in every step.
    """
    pending = [model]
    while pending:
        module = pending.pop()
        yield module
        pending += [child for child in module._modules.values() if child is not None]


def compiled_modules(model: nn.Module) -> frozenset[int]:
    """The ids of the modules below `model` that `.compile()` was called on, and of all that run in their code."""
    compiled = [module for module in modules_of(model) if module is not model and is_compiled_in_place(module)]
    return frozenset(id(inside) for module in compiled for inside in modules_of(module))


def upwards(name: str) -> list[str]:
    """The name of a module, those of its parents, and "" for the root."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + ([""] if name else [])
