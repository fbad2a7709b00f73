"""Who is told of the backward passes of torch's autograd engine, which run on any thread and may not be ours.

Nothing here changes what torch computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import run_backward, set_run_backward
from zest_fast.kernels.storage import is_fake


def is_plain(x: object) -> bool:
    """Whether torch's own kernels compute with this tensor; a subclass may do anything."""
    return type(x) in (Tensor, nn.Parameter) or (isinstance(x, Tensor) and is_fake(x))


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


class Spectator(Protocol):
    """Who is told of backward passes as they begin and end, on whichever thread."""

    def begins(self, roots: Any, accumulates: bool, inputs: Iterable[Any]) -> Callable[[bool], None] | None:
        """A call of ``backward`` (accumulates into ``.grad``) or ``grad``.

        What is returned is called when it ends: with True, or with False where it raised.
        """


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
                Watching._original = run_backward()
                set_run_backward(_reporting(Watching._original))
            Watching._spectators.append(self._spectator)
        return self

    def __exit__(self, *exception: object) -> None:
        with Watching._lock:
            Watching._spectators.remove(self._spectator)
            if not Watching._spectators:
                assert Watching._original is not None
                set_run_backward(Watching._original)


def _reporting(run: Callable[..., Any]) -> Callable[..., Any]:
    def reporting(*arguments: Any, **options: Any) -> Any:
        inputs = arguments[4] if len(arguments) > 4 else options.get("inputs", ())
        accumulates = bool(options.get("accumulate_grad", False))
        ends = [spectator.begins(arguments[0], accumulates, inputs) for spectator in tuple(Watching._spectators)]
        completed = False
        try:
            result = run(*arguments, **options)
            completed = True
            return result
        finally:
            for end in filter(None, ends):
                end(completed)

    return reporting
