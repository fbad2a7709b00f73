"""By what a gradient scaler multiplied the loss, and when it skips a step.

A scaled loss looks like any other. Where the scaler is not handed over, ``torch.amp.GradScaler.scale`` and ``update``
tell of themselves while a logged step lasts: then, and only then, functions that call the originals stand in their
place, and a hook on the node of each scaled loss tells that the backward pass went through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

_lock = threading.Lock()
_listeners: list[LossScales] = []
_originals: dict[str, Callable[..., Any]] = {}


class LossScales(AbstractContextManager["LossScales"]):
    """The scales of the losses of one step.

    A scaler counts in the backward passes that go through a loss that it has scaled: the loss of another model, or a
    second one of this, may be scaled otherwise or not at all.

    Args:
        grad_scaler: whatever has ``get_scale()``, which counts in every pass; None = each ``torch.amp.GradScaler``
            whose losses come from this thread.
        skipped: called after a scaler was updated and lowered its scale, which ends an iteration that it skipped.
    """

    def __init__(self, grad_scaler: Any, skipped: Callable[[], None]) -> None:
        self._given = [grad_scaler] if grad_scaler is not None else []
        self._skipped = skipped
        self._thread = threading.get_ident()
        self._arrived: list[Any] = []  # scalers of the backward pass that runs
        self._known: list[Any] = list(self._given)  # of the step
        self._used: list[float] = []

    def __enter__(self) -> LossScales:
        with _lock:
            if not _listeners:
                for name, replace in (("scale", _telling_scale), ("update", _telling_update)):
                    _originals[name] = getattr(torch.amp.GradScaler, name)
                    setattr(torch.amp.GradScaler, name, replace(_originals[name]))
            _listeners.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            _listeners.remove(self)
            if not _listeners:
                for name, original in _originals.items():
                    setattr(torch.amp.GradScaler, name, original)

    def begin_backward(self) -> None:
        self._arrived = list(self._given)

    def of_this_backward(self) -> float:
        """The factor that the loss of the backward pass that ends carried; NaN where two scalers differ."""
        scales = {float(scaler.get_scale()) for scaler in self._arrived} or {1.0}
        self._known += self._arrived
        self._used.append(scales.pop() if len(scales) == 1 else float("nan"))
        return self._used[-1]

    @property
    def of_the_gradient(self) -> float:
        """The factor that the accumulated gradient carries; NaN where backward passes differ."""
        used = set(self._used) or {1.0}
        return used.pop() if len(used) == 1 else float("nan")

    def _arrives(self, scaler: Any, thread: int) -> None:
        if thread == self._thread and not any(known is scaler for known in self._arrived):
            self._arrived.append(scaler)

    def _was_updated(self, scaler: Any) -> None:
        if any(known is scaler for known in self._known):
            self._skipped()


def _telling_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        thread = threading.get_ident()  # of the loop: a GPU has a thread of its own for the backward pass

        def arrived(*_: Any) -> None:
            for listener in tuple(_listeners):  # those of now: a step may begin after its forward
                listener._arrives(self, thread)

        def told(scaled: Any) -> Any:
            if isinstance(scaled, torch.Tensor):
                if scaled.grad_fn is not None:
                    scaled.grad_fn.register_hook(arrived)
            elif isinstance(scaled, list | tuple):
                for one in scaled:
                    told(one)
            else:
                return map(told, scaled)  # what the original returns for any other iterable
            return scaled

        return told(original(self, outputs))

    return scale


def _telling_update(original: Callable[..., Any]) -> Callable[..., Any]:
    def update(self: Any, *arguments: Any, **options: Any) -> Any:
        before = self.get_scale()
        result = original(self, *arguments, **options)
        if self.get_scale() < before or arguments or options:  # given a new scale it does not tell
            for listener in tuple(_listeners):
                listener._was_updated(self)
        return result

    return update
