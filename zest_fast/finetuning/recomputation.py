"""Activation checkpointing above the cut: blocks recompute their activations in backward, those below save none anyway.

Below the cut gradients are off, and torch and transformers checkpoint nothing without gradients.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from zest_fast.finetuning.walking import modules_of
from zest_fast.foundation.torch_private import inputs_of_checkpoint

_FUNCTION = "_gradient_checkpointing_func"  # where a transformers module keeps what it checkpoints with
_INPUT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")  # and those of enable_input_require_grads()

_ENABLE = "enable_input_require_grads"


@contextmanager
def non_reentrant(model: nn.Module) -> Iterator[None]:
    """Let transformers checkpoint without re-entering autograd while the block runs.

    Reentrant checkpointing gives the weights inside no gradient unless an input requires one, and above the cut none
    does. The gradients are the same.
    """
    with _exchanging:
        found = [(module, vars(module)[_FUNCTION]) for module in modules_of(model) if _is_reentrant(module)]
        for module, function in found:
            keywords = {**function.keywords, "use_reentrant": False}
            setattr(module, _FUNCTION, partial(function.func, *function.args, **keywords))
            _reentrant[module] = function, 1
        if not found:  # exchanged by the pass of another thread, which may end before this one
            found = [(module, _reentrant[module][0]) for module in modules_of(model) if module in _reentrant]
            for module, function in found:
                _reentrant[module] = function, _reentrant[module][1] + 1
    try:
        yield
    finally:
        with _exchanging:
            for module, function in found:
                passes = _reentrant[module][1] - 1
                if passes:
                    _reentrant[module] = function, passes
                else:
                    del _reentrant[module]
                    setattr(module, _FUNCTION, function)


_exchanging = threading.Lock()
_reentrant: dict[nn.Module, tuple[Any, int]] = {}  # what modules checkpoint with otherwise; passes that run


def _is_reentrant(module: nn.Module) -> bool:
    function = vars(module).get(_FUNCTION)
    return isinstance(function, partial) and bool(function.keywords.get("use_reentrant", True))


def is_lost_in_recomputation() -> bool:
    """Whether this runs in reentrant checkpointing none of whose inputs requires a gradient: weights get none then."""
    inputs = inputs_of_checkpoint()
    return inputs is not None and not any(inputs)


class AboveCut:
    """Checkpoints the blocks of a model, without re-entering autograd, until `remove()`.

    Models of transformers checkpoint the blocks that they know, in train mode as usual; of other models the blocks are
    those members of an nn.ModuleList or nn.Sequential that have modules of their own and a class that repeats there.
    Raises ValueError where there are none.
    """

    def __init__(self, model: nn.Module) -> None:
        names = ("forward", "gradient_checkpointing", _FUNCTION, *_INPUT_HOOKS)
        self._found = [
            (module, {n: vars(module)[n] for n in names if n in vars(module)}) for module in modules_of(model)
        ]
        self._blocks: list[nn.Module] = []
        if _enable_in_transformers(model):
            self._put_back(*_INPUT_HOOKS)
            return
        self._blocks = _repeated_blocks(model)
        if not self._blocks:
            raise ValueError(
                f"checkpoint='above-cut': {type(model).__name__} has no repeated blocks (members of one class in an "
                "nn.ModuleList or nn.Sequential); leave checkpoint=None"
            )
        for block in self._blocks:
            block.forward = _Recomputed(block.forward)

    def remove(self) -> None:
        self._put_back(*(["forward"] if self._blocks else ["gradient_checkpointing", _FUNCTION]))
        self._found.clear()

    def _put_back(self, *names: str) -> None:
        for module, found in self._found:
            if names != ("forward",) or module in self._blocks:
                for name in names:
                    vars(module).pop(name, None)
                vars(module).update({name: found[name] for name in names if name in found})


class InputGradients:
    """Lets `enable_input_require_grads()` of transformers act outside the passes of a cut only, until `remove()`.

    Its hook marks the output of the embeddings, for the sake of reentrant checkpointing, and backward would run down to
    them. Within a pass, and in compiled code, nothing is checkpointed in that way.
    """

    def __init__(self, model: nn.Module) -> None:
        self._switches = [_Switch(module) for module in modules_of(model) if hasattr(type(module), _ENABLE)]

    def remove(self) -> None:
        for switch in self._switches:
            switch.remove()


class _Switch:
    """Stands in for the method of one module; can be copied and pickled with it."""

    def __init__(self, module: Any) -> None:
        self._module = module
        vars(module)[_ENABLE] = self
        self._exchange()

    def __call__(self) -> None:
        type(self._module).enable_input_require_grads(self._module)
        self._exchange()

    def remove(self) -> None:
        if vars(self._module).get(_ENABLE) is self:
            del vars(self._module)[_ENABLE]
        if self._handles():  # with transformers' own hooks again
            self._module.disable_input_require_grads()
            self._module.enable_input_require_grads()

    def _exchange(self) -> None:
        for handle in self._handles():
            hooks: Any = handle.hooks_dict_ref()
            hooks[handle.id] = _require_outside_passes

    def _handles(self) -> list[RemovableHandle]:
        """Those that are on: transformers 4 keeps the handle of a hook that it has removed."""
        found = [vars(self._module).get(name) or () for name in _INPUT_HOOKS]  # a list, in transformers 4 one handle
        handles = [handle for one in found for handle in (one if isinstance(one, list | tuple) else (one,))]
        return [handle for handle in handles if handle.id in (handle.hooks_dict_ref() or ())]


def _require_outside_passes(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and not getattr(_thread, "unmarked", 0):
        output.requires_grad_(True)


@contextmanager
def unmarked() -> Iterator[None]:
    """While the block runs in this thread, `enable_input_require_grads()` has no effect."""
    _thread.unmarked = getattr(_thread, "unmarked", 0) + 1
    try:
        yield
    finally:
        _thread.unmarked -= 1


_thread = threading.local()


class _Recomputed:
    """Stands in for the forward of a block; can be copied and pickled with its model."""

    def __init__(self, original: Callable[..., Any]) -> None:
        update_wrapper(self, original)
        self._original = original

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._original(*args, **keywords)
        return checkpoint(self._original, *args, use_reentrant=False, **keywords)


def _enable_in_transformers(model: nn.Module) -> bool:
    """Whether the model could be told to checkpoint by itself."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    new = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.24
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]
    if any(getattr(model, name, None) for name in _INPUT_HOOKS):  # transformers 4 cannot turn off what is not on
        model.disable_input_require_grads()  # type: ignore[operator]  # turned on with it, of no use above the cut
    return True


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    pending = [model]
    while pending:
        module = pending.pop()
        children = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential):
            repeats = Counter(type(child) for child in children)
            blocks = [c for c in children if repeats[type(c)] > 1 and next(c.children(), None) is not None]
            found += blocks
            children = [child for child in children if child not in blocks]
        pending += children
    return list(dict.fromkeys(found))
