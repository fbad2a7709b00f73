"""By what a gradient scaler multiplied the loss, and when it skips a step.

A scaled loss looks like any other. Where the scaler is not handed over, ``torch.amp.GradScaler.scale`` and ``update``
tell of themselves while a logged step lasts: then, and only then, functions that call the originals stand in their
place.
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

    Args:
        grad_scaler: whatever has ``get_scale()``; None = whichever ``torch.amp.GradScaler`` is used on this thread.
        updated: called after a scaler was updated, which ends an iteration that it skipped.
    """

    def __init__(self, grad_scaler: Any, updated: Callable[[], None]) -> None:
        self._scalers = [grad_scaler] if grad_scaler is not None else []
        self._updated = updated
        self._thread = threading.get_ident()
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

    def of_this_backward(self) -> float:
        """The factor that the loss of the backward pass that begins carries; NaN where two scalers differ."""
        scales = {float(scaler.get_scale()) for scaler in self._scalers} or {1.0}
        self._used.append(scales.pop() if len(scales) == 1 else float("nan"))
        return self._used[-1]

    def forget_this_backward(self) -> None:
        """It was that of another model."""
        self._used.pop()

    @property
    def of_the_gradient(self) -> float:
        """The factor that the accumulated gradient carries; NaN where backward passes differ."""
        used = set(self._used) or {1.0}
        return used.pop() if len(used) == 1 else float("nan")

    def _scaled_by(self, scaler: Any) -> None:
        if threading.get_ident() == self._thread and not any(known is scaler for known in self._scalers):
            self._scalers.append(scaler)

    def _was_updated(self, scaler: Any) -> None:
        if any(known is scaler for known in self._scalers):
            self._updated()


def _telling_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        for listener in tuple(_listeners):
            listener._scaled_by(self)
        return original(self, outputs)

    return scale


def _telling_update(original: Callable[..., Any]) -> Callable[..., Any]:
    def update(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        for listener in tuple(_listeners):
            listener._was_updated(self)
        return result

    return update
