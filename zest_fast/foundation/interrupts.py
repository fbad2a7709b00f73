"""Ctrl-C while a user's model is borrowed: it waits until the model can be left as it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any


class HeldInterrupts(AbstractContextManager["HeldInterrupts"]):
    """Holds SIGINT back, but for the parts that are marked as ``interruptible``; what came is delivered at the end.

    Without effect on other threads than the main one, which alone gets signals, and where SIGINT is not Python's.
    """

    def __init__(self) -> None:
        self._open = False
        self._waiting: tuple[int, FrameType | None] | None = None
        self._before: Any = None

    def __enter__(self) -> HeldInterrupts:
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._arrived)
        return self

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._open = False  # what follows the first one is clearing up
            self._before(number, frame)
        else:
            self._waiting = (number, frame)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The part that may be interrupted, at once where something waits."""
        self._deliver()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _deliver(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._before(*waiting)

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._deliver()
