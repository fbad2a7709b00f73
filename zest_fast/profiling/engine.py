"""What torch's autograd engine is doing: the only place that looks into its private parts.

Everything here asks; nothing changes what torch computes. A part that a release of torch no longer has is named by
``tests/profiling/test_engine.py``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _calls

from zest_fast.kernels.storage import is_fake

_OWN_MODES = ("torch", "zest_fast")  # modes of these packages watch, place or fake tensors, and leave values alone


def current_task() -> int:
    """The id of the backward pass that runs on this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor stands for others, inside of ``torch.func`` (vmap, grad, jvp) or forward-mode derivatives."""
    forward_mode = sys.modules["torch.autograd.forward_ad"]
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or (
        forward_mode._current_level >= 0 and forward_mode.unpack_dual(x).tangent is not None
    )


def is_plain(x: object) -> bool:
    """Whether torch's own kernels compute with this tensor; a subclass may do anything."""
    return type(x) in (Tensor, nn.Parameter) or (isinstance(x, Tensor) and is_fake(x))


def is_altered() -> bool:
    """Whether a mode that is not torch's own stands between a module and its kernels, or a hook on all modules."""
    if _calls._global_forward_hooks:
        return True
    if not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()):
        return False
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    modes += [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]
    return any(type(mode).__module__.partition(".")[0] not in _OWN_MODES for mode in modes)


def has_accumulation_hooks(p: Tensor) -> bool:
    """Whether somebody put hooks on the node that adds to the ``.grad`` of a parameter."""
    with torch.enable_grad():
        node: Any = p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    for register in (node.register_prehook, node.register_hook):
        handle = register(lambda *_: None)
        hooks = handle.hooks_dict_ref()
        found = hooks is not None and len(hooks) > 1
        handle.remove()
        if found:
            return True
    return False


def saved_tensors_are_moved() -> bool:
    """Whether hooks decide what becomes of tensors that autograd saves now: checkpointing, offloading."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.6
    return top is None or top(True) is not None


class Spectator(Protocol):
    """Who is told of backward passes as they begin and end, on whichever thread."""

    def begins(self, roots: Any, accumulates: bool, inputs: Iterable[Any]) -> Callable[[], None] | None:
        """A call of ``backward`` (accumulates into ``.grad``) or ``grad``; what is returned is called when it ends."""


class Watching(AbstractContextManager["Watching"]):
    """Tells a spectator of every backward pass that is started from Python while the context lasts."""

    _lock = threading.Lock()
    _spectators: list[Spectator] = []  # noqa: RUF012  # of all threads: the function that is replaced exists once
    _original: Callable[..., Any] | None = None

    def __init__(self, spectator: Spectator) -> None:
        self._spectator = spectator

    def __enter__(self) -> Watching:
        with Watching._lock:
            if not Watching._spectators:
                Watching._original = torch.autograd._engine_run_backward
                torch.autograd._engine_run_backward = _reporting(Watching._original)
            Watching._spectators.append(self._spectator)
        return self

    def __exit__(self, *exception: object) -> None:
        with Watching._lock:
            Watching._spectators.remove(self._spectator)
            if not Watching._spectators:
                torch.autograd._engine_run_backward = Watching._original  # type: ignore[assignment]


def _reporting(run: Callable[..., Any]) -> Callable[..., Any]:
    def reporting(*arguments: Any, **options: Any) -> Any:
        inputs = arguments[4] if len(arguments) > 4 else options.get("inputs", ())
        accumulates = bool(options.get("accumulate_grad", False))
        ends = [spectator.begins(arguments[0], accumulates, inputs) for spectator in tuple(Watching._spectators)]
        try:
            return run(*arguments, **options)
        finally:
            for end in filter(None, ends):
                end()

    return reporting
